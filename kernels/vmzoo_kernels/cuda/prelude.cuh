// What the kernels need of the device, for NVRTC without any header of CUDA: fast math, 16-bit floats, tensor cores,
// asynchronous copies. Needs compute capability 8.0.
//
// The tests run the kernels on the CPU with tests/kernels/emulator/emulator.h in place of this file: it defines this
// guard and every name below.
#ifndef VMZOO_PRELUDE
#define VMZOO_PRELUDE

// The dynamic shared memory of the block: `DYNAMIC_SHARED(memory);` declares bytes, aligned to 16.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

struct half_t {
    unsigned short v;
};

struct bfloat_t {
    unsigned short v;
};

// Fast math: subnormal numbers count as zero.

__device__ __forceinline__ float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float rcp(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The same number, but the compiler does not know it: it stays in its register.
__device__ __forceinline__ int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

__device__ __forceinline__ float opaque(float x) {
    asm volatile("" : "+f"(x));
    return x;
}

__device__ __forceinline__ unsigned long long opaque(unsigned long long x) {
    asm volatile("" : "+l"(x));
    return x;
}

// address + i * stride bytes, in one instruction.
__device__ __forceinline__ unsigned long long offset(unsigned long long address, int i, int stride) {
    unsigned long long y;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(y) : "r"(i), "r"(stride), "l"(address));
    return y;
}

// In a rarely taken branch: keeps the compiler from computing both sides and selecting.
__device__ __forceinline__ void rarely() { asm volatile(""); }

// Conversions, to the nearest: 16-bit floats are rounded to even.

__device__ __forceinline__ float to_float(float x) { return x; }

__device__ __forceinline__ float to_float(half_t x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.v));
    return y;
}

__device__ __forceinline__ float to_float(bfloat_t x) { return __uint_as_float((unsigned)x.v << 16); }

template <typename T>
__device__ __forceinline__ T from_float(float x);

template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}

template <>
__device__ __forceinline__ half_t from_float<half_t>(float x) {
    half_t y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.v) : "f"(x));
    return y;
}

template <>
__device__ __forceinline__ bfloat_t from_float<bfloat_t>(float x) {
    bfloat_t y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.v) : "f"(x));
    return y;
}

// Two 16-bit floats in a register, the first in the low half.

template <typename T>
__device__ __forceinline__ float2 unpack2(unsigned x);

template <>
__device__ __forceinline__ float2 unpack2<half_t>(unsigned x) {
    float2 y;
    asm("{\n"
        ".reg .b16 low, high;\n"
        "mov.b32 {low, high}, %2;\n"
        "cvt.f32.f16 %0, low;\n"
        "cvt.f32.f16 %1, high;\n"
        "}"
        : "=f"(y.x), "=f"(y.y)
        : "r"(x));
    return y;
}

template <>
__device__ __forceinline__ float2 unpack2<bfloat_t>(unsigned x) {
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}

template <typename T>
__device__ __forceinline__ unsigned pack2(float lo, float hi);

template <>
__device__ __forceinline__ unsigned pack2<half_t>(float lo, float hi) {
    unsigned y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}

template <>
__device__ __forceinline__ unsigned pack2<bfloat_t>(float lo, float hi) {
    unsigned y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}

// d = a b + c by a warp: a [16, K] in rows, b [K, 8] in columns, c and d [16, 8] in float32.

#define VMZOO_MMA_4_2(type)                                                                                  \
    asm("mma.sync.aligned." type " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"      \
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                     \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), \
          "f"(c[3]))

#define VMZOO_MMA_2_1(type)                                                              \
    asm("mma.sync.aligned." type " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};" \
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                 \
        : "r"(a[0]), "r"(a[1]), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]))

__device__ __forceinline__ void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                         const float (&c)[4]) {
    VMZOO_MMA_4_2("m16n8k8.row.col.f32.tf32.tf32.f32");
}

template <typename T>
__device__ __forceinline__ void mma_k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                        const float (&c)[4]);

template <>
__device__ __forceinline__ void mma_k16<half_t>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                                const float (&c)[4]) {
    VMZOO_MMA_4_2("m16n8k16.row.col.f32.f16.f16.f32");
}

template <>
__device__ __forceinline__ void mma_k16<bfloat_t>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                                  const float (&c)[4]) {
    VMZOO_MMA_4_2("m16n8k16.row.col.f32.bf16.bf16.f32");
}

template <typename T>
__device__ __forceinline__ void mma_k8(float (&d)[4], const unsigned (&a)[2], unsigned b, const float (&c)[4]);

template <>
__device__ __forceinline__ void mma_k8<half_t>(float (&d)[4], const unsigned (&a)[2], unsigned b, const float (&c)[4]) {
    VMZOO_MMA_2_1("m16n8k8.row.col.f32.f16.f16.f32");
}

template <>
__device__ __forceinline__ void mma_k8<bfloat_t>(float (&d)[4], const unsigned (&a)[2], unsigned b,
                                                 const float (&c)[4]) {
    VMZOO_MMA_2_1("m16n8k8.row.col.f32.bf16.bf16.f32");
}

#undef VMZOO_MMA_4_2
#undef VMZOO_MMA_2_1

// Matrices of 8x8 16-bit values from shared memory: lane 8 i + j holds the address of row j of matrix i (16 bytes,
// aligned to 16), and r[i] becomes what mma takes of matrix i.

__device__ __forceinline__ unsigned shared_address(const void* smem) {
    return (unsigned)__cvta_generic_to_shared(smem);
}

#define VMZOO_LDMATRIX_X4(trans)                                                             \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" trans ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                            \
                 : "r"(shared_address(smem))                                                 \
                 : "memory")

__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* smem) { VMZOO_LDMATRIX_X4(""); }

__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* smem) { VMZOO_LDMATRIX_X4(".trans"); }

__device__ __forceinline__ void ldmatrix_x2_trans(unsigned (&r)[2], const void* smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(smem))
                 : "memory");
}

#undef VMZOO_LDMATRIX_X4

// Copies to shared memory that run beside the thread. Both addresses are aligned to the size. 16 bytes bypass L1.

__device__ __forceinline__ void cp_async4(void* smem, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(smem)), "l"(global) : "memory");
}

// Zeros if there is nothing to copy.
__device__ __forceinline__ void cp_async16_or_zero(void* smem, const void* global, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(smem)), "l"(global),
                 "r"(there ? 16 : 0)
                 : "memory");
}

// Ends a group of copies.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for the thread's own groups but the last n; other threads see the copies after a barrier.
template <int n>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

// Stores to global memory whose address the compiler cannot trace back.

__device__ __forceinline__ void store_global(float4* address, float4 v) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
}

__device__ __forceinline__ void store_global(uint4* address, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ void store_global(unsigned* address, unsigned v) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(address), "r"(v) : "memory");
}

// A load by the read-only path, of memory that nothing writes while the kernel runs.
template <typename T>
__device__ __forceinline__ T ldg(const T* address) {
    return __ldg(address);
}

#endif
