// Small kernels that show what the primitives do, for the emulator and for GPUs.
#include "prelude.cuh"

struct Params {
    const void* input;
    void* output;
    int n;
};

// Input: registers of a, b and c for each of 32 lanes; output: those of d.
template <int A, int B, typename Multiply>
__device__ void multiply_fragments(const Params& p, Multiply multiply) {
    const unsigned* input = static_cast<const unsigned*>(p.input) + threadIdx.x * (A + B + 4);
    unsigned a[A], b[B];
    float d[4];
    for (int i = 0; i < A; i++) a[i] = input[i];
    for (int i = 0; i < B; i++) b[i] = input[A + i];
    for (int i = 0; i < 4; i++) d[i] = __uint_as_float(input[A + B + i]);
    multiply(d, a, b);
    for (int i = 0; i < 4; i++) static_cast<float*>(p.output)[threadIdx.x * 4 + i] = d[i];
}

struct Tf32 {
    __device__ void operator()(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { mma_tf32(d, a, b, d); }
};

template <typename T>
struct K16 {
    __device__ void operator()(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
        mma_k16<T>(d, a, b, d);
    }
};

template <typename T>
struct K8 {
    __device__ void operator()(float (&d)[4], const unsigned (&a)[2], const unsigned (&b)[1]) {
        mma_k8<T>(d, a, b[0], d);
    }
};

extern "C" __global__ void mma_tf32_k8(const __grid_constant__ Params p) { multiply_fragments<4, 2>(p, Tf32()); }
extern "C" __global__ void mma_half_k16(const __grid_constant__ Params p) {
    multiply_fragments<4, 2>(p, K16<half_t>());
}
extern "C" __global__ void mma_half_k8(const __grid_constant__ Params p) { multiply_fragments<2, 1>(p, K8<half_t>()); }
extern "C" __global__ void mma_bfloat_k16(const __grid_constant__ Params p) {
    multiply_fragments<4, 2>(p, K16<bfloat_t>());
}
extern "C" __global__ void mma_bfloat_k8(const __grid_constant__ Params p) {
    multiply_fragments<2, 1>(p, K8<bfloat_t>());
}

// Input: four 8x8 matrices of 16 bits; output: of each lane 4 + 4 + 2 registers.
extern "C" __global__ void load_matrices(const __grid_constant__ Params p) {
    DYNAMIC_SHARED(memory);
    cp_async16_or_zero(memory + 16 * threadIdx.x, static_cast<const unsigned char*>(p.input) + 16 * threadIdx.x, true);
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    const unsigned char* row = memory + 16 * threadIdx.x;
    unsigned x4[4], x4_trans[4], x2_trans[2];
    ldmatrix_x4(x4, row);
    ldmatrix_x4_trans(x4_trans, row);
    ldmatrix_x2_trans(x2_trans, row);
    unsigned* output = static_cast<unsigned*>(p.output) + 10 * threadIdx.x;
    for (int i = 0; i < 4; i++) output[i] = x4[i], output[4 + i] = x4_trans[i];
    for (int i = 0; i < 2; i++) output[8 + i] = x2_trans[i];
}

// Input: n numbers; output: [n, 5], bits.
extern "C" __global__ void convert(const __grid_constant__ Params p) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.n) return;
    float x = ldg(static_cast<const float*>(p.input) + i);
    unsigned* output = static_cast<unsigned*>(p.output) + 5 * i;
    output[0] = from_float<half_t>(x).v;
    output[1] = pack2<half_t>(-1, x) >> 16;
    output[2] = from_float<bfloat_t>(x).v;
    output[3] = pack2<bfloat_t>(x, -1) & 0xffff;
    output[4] = __float_as_uint(from_float<float>(to_float(x)));
}

// Output: [65536, 4], the float of every number of 16 bits.
extern "C" __global__ void widen(const __grid_constant__ Params p) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned short bits = i;
    float* output = static_cast<float*>(p.output) + 4 * i;
    output[0] = to_float(half_t{bits});
    output[1] = unpack2<half_t>(i << 16).y;
    output[2] = to_float(bfloat_t{bits});
    output[3] = unpack2<bfloat_t>(0xffff0000u | i).x;
}

// Input: n positive numbers; output: [n, 2].
extern "C" __global__ void fast_math(const __grid_constant__ Params p) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.n) return;
    float x = static_cast<const float*>(p.input)[i];
    float* output = static_cast<float*>(p.output) + 2 * i;
    output[0] = ex2(x), output[1] = rcp(x);
}

// Output: [32, 6].
extern "C" __global__ void shuffles(const __grid_constant__ Params p) {
    int lane = threadIdx.x;
    int* output = static_cast<int*>(p.output) + 6 * lane;
    output[0] = __shfl_sync(0xffffffffu, lane, 5);
    output[1] = __shfl_xor_sync(0xffffffffu, unsigned(lane), 3);
    output[2] = int(__shfl_up_sync(0xffffffffu, float(lane), 2));
    output[3] = __shfl_down_sync(0xffffffffu, lane, 4);
    output[4] = output[5] = -1;
    if (lane < 8) output[4] = __shfl_xor_sync(0x000000ffu, lane, 1);
    if (lane % 2) output[5] = __shfl_sync(0xaaaaaaaau, lane, 7);
}

// Input: [blocks, threads] numbers; output: the sum of each block.
extern "C" __global__ void __launch_bounds__(256) sum_blocks(const __grid_constant__ Params p) {
    DYNAMIC_SHARED(memory);
    float* sums = reinterpret_cast<float*>(memory);
    int t = threadIdx.x;
    sums[t] = static_cast<const float*>(p.input)[blockIdx.x * blockDim.x + t];
    for (int half = blockDim.x / 2; half; half /= 2) {
        __syncthreads();
        if (t < half) sums[t] += sums[t + half];
    }
    if (t == 0) static_cast<float*>(p.output)[blockIdx.x] = sums[0];
}

// Input: [3, 32, 4] numbers, the second row of which counts as zeros; output: the sums of the first, of the first
// two and of all three rows, [3, 32].
extern "C" __global__ void pipeline(const __grid_constant__ Params p) {
    DYNAMIC_SHARED(memory);
    const float* input = static_cast<const float*>(p.input) + 4 * threadIdx.x;
    float* buffer = reinterpret_cast<float*>(memory) + 12 * threadIdx.x;
    float* output = static_cast<float*>(p.output);
    cp_async16_or_zero(buffer, input, true);
    cp_async_commit();
    cp_async16_or_zero(buffer + 4, input + 128, false);
    cp_async_commit();
    for (int i = 0; i < 4; i++) cp_async4(buffer + 8 + i, input + 256 + i);
    cp_async_commit();
    auto sum = [&](int row) {
        const float* x = buffer + 4 * row;
        return x[0] + x[1] + x[2] + x[3];
    };
    cp_async_wait<2>();
    output[threadIdx.x] = sum(0);
    cp_async_wait<1>();
    output[32 + threadIdx.x] = sum(0) + sum(1);
    cp_async_wait<0>();
    output[64 + threadIdx.x] = sum(0) + sum(1) + sum(2);
}
