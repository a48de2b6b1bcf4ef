// Kernels with the mistakes that the emulator reports. Never for a GPU.
#include "prelude.cuh"

struct Params {
    void* output;
    int n;
};

extern "C" __global__ void beyond_shared(const __grid_constant__ Params p) {
    DYNAMIC_SHARED(memory);
    memory[p.n * int(threadIdx.x)] = 0;
}

extern "C" __global__ void beyond_array(const __grid_constant__ Params p) {
    float registers[4] = {};
    registers[p.n] = 1;
    for (int i = 0; i < 4; i++) static_cast<float*>(p.output)[i] = registers[i];
}

extern "C" __global__ void beyond_memory(const __grid_constant__ Params p) {
    *reinterpret_cast<volatile int*>(p.n) = 0;
}

extern "C" __global__ void misaligned(const __grid_constant__ Params p) {
    *reinterpret_cast<float4*>(static_cast<float*>(p.output) + p.n) = make_float4(0, 0, 0, 0);
}

extern "C" __global__ void divergent(const __grid_constant__ Params p) {
    if (threadIdx.x % 2)
        __shfl_xor_sync(0xffffffffu, p.n, 1);
    else
        __syncwarp();
}

extern "C" __global__ void left_lane(const __grid_constant__ Params p) {
    if (threadIdx.x < p.n) return;
    __syncwarp();
}

extern "C" __global__ void deadlock(const __grid_constant__ Params p) {
    if (threadIdx.x < 16)
        __syncwarp();
    else
        __syncthreads();
}

// Reads what nobody wrote, as the barrier comes too late.
extern "C" __global__ void race(const __grid_constant__ Params p) {
    DYNAMIC_SHARED(memory);
    float* numbers = reinterpret_cast<float*>(memory);
    numbers[threadIdx.x] = 1;
    static_cast<float*>(p.output)[threadIdx.x] = numbers[threadIdx.x ^ p.n];
    __syncthreads();
}

extern "C" __global__ void missing_wait(const __grid_constant__ Params p) {
    DYNAMIC_SHARED(memory);
    float* output = static_cast<float*>(p.output) + threadIdx.x;
    float* number = reinterpret_cast<float*>(memory) + threadIdx.x;
    cp_async4(number, output);
    cp_async_commit();
    *output = *number;
}

extern "C" __global__ void deep_stack(const __grid_constant__ Params p) {
    volatile char bytes[100000];
    bytes[p.n] = 0;
}
