// CUDA C++ for the CPU, in the place of prelude.cuh: the same names in plain C++, with the rounding of the GPU.
#pragma once
#define VMZOO_PRELUDE

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>

#include "scheduler.h"

// The language

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define DYNAMIC_SHARED(name) unsigned char *const name = emulator::shared

struct __align__(8) float2 {
    float x, y;
};
struct __align__(16) float4 {
    float x, y, z, w;
};
struct __align__(16) uint4 {
    unsigned x, y, z, w;
};
struct half_t {
    unsigned short v;
};
struct bfloat_t {
    unsigned short v;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Numbers

#define EMULATOR_MIN_MAX(type)                                      \
    inline type min(type a, type b) { return b < a ? b : a; }       \
    inline type max(type a, type b) { return a < b ? b : a; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(long long)
EMULATOR_MIN_MAX(unsigned long long)
#undef EMULATOR_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline unsigned __float_as_uint(float x) {
    unsigned y;
    memcpy(&y, &x, 4);
    return y;
}

inline float __uint_as_float(unsigned x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}

namespace emulator {

inline float flush(float x) { return fabsf(x) < FLT_MIN ? copysignf(0, x) : x; }

}  // namespace emulator

inline float ex2(float x) { return emulator::flush(exp2f(emulator::flush(x))); }
inline float rcp(float x) { return emulator::flush(1 / emulator::flush(x)); }

inline float to_float(float x) { return x; }

inline float to_float(half_t x) {
    unsigned exponent = x.v >> 10 & 31, fraction = x.v & 1023;
    float magnitude = exponent == 0    ? ldexpf(fraction, -24)
                      : exponent == 31 ? (fraction ? NAN : INFINITY)
                                       : __uint_as_float((exponent + 112) << 23 | fraction << 13);
    return x.v & 0x8000 ? -magnitude : magnitude;
}

inline float to_float(bfloat_t x) { return __uint_as_float(unsigned(x.v) << 16); }

template <typename T>
inline T from_float(float x);

template <>
inline float from_float<float>(float x) {
    return x;
}

template <>
inline half_t from_float<half_t>(float x) {
    if (std::isnan(x)) return {0x7fff};
    unsigned sign = __float_as_uint(x) >> 16 & 0x8000, bits = __float_as_uint(x) & 0x7fffffff;
    unsigned magnitude;
    if (bits >= 0x477ff000)  // 65520 and above
        magnitude = 0x7c00;
    else if (bits < 0x38800000)  // subnormal: whole multiples of 2^-24
        magnitude = unsigned(nearbyintf(ldexpf(fabsf(x), 24)));
    else
        magnitude = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
    return {static_cast<unsigned short>(sign | magnitude)};
}

template <>
inline bfloat_t from_float<bfloat_t>(float x) {
    if (std::isnan(x)) return {0x7fff};
    unsigned bits = __float_as_uint(x);
    return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <typename T>
inline float2 unpack2(unsigned x) {
    return {to_float(T{static_cast<unsigned short>(x)}), to_float(T{static_cast<unsigned short>(x >> 16)})};
}

template <typename T>
inline unsigned pack2(float lo, float hi) {
    return from_float<T>(lo).v | unsigned(from_float<T>(hi).v) << 16;
}

// Warps

namespace emulator {

constexpr unsigned WARP = 0xffffffffu;

template <typename T>
struct Shuffle {
    T value, result;
    int source;
};

template <typename T>
inline T shuffle(unsigned mask, T value, int source) {
    Shuffle<T> data = {value, value, source};
    if (!(mask >> source & 1)) fail("a shuffle with mask %08x reads lane %d", mask, source);
    auto perform = [](unsigned mask, void *const *lanes) {
        for (int i = 0; i < 32; i++) {
            if (!(mask >> i & 1)) continue;
            auto *own = static_cast<Shuffle<T> *>(lanes[i]);
            own->result = static_cast<Shuffle<T> *>(lanes[own->source])->value;
        }
    };
    collective("a shuffle", mask, perform, &data);
    return data.result;
}

struct Mma {
    float *d;
    const unsigned *a, *b;
    const float *c;
};

struct tf32_t {};

// Element i of a lane's fragment of a: row and column in [16, K]; and of b: row in [K, 8], the column is lane / 4.
template <typename T>
struct Layout {
    static constexpr int packed = 2;
    static int row_a(int lane, int i) { return lane / 4 + i / 2 % 2 * 8; }
    static int column_a(int lane, int i) { return lane % 4 * 2 + i % 2 + i / 4 * 8; }
    static int row_b(int lane, int i) { return lane % 4 * 2 + i % 2 + i / 2 * 8; }
    static float element(const unsigned *registers, int i) {
        float2 pair = unpack2<T>(registers[i / 2]);
        return i % 2 ? pair.y : pair.x;
    }
};

template <>
struct Layout<tf32_t> {
    static constexpr int packed = 1;
    static int row_a(int lane, int i) { return lane / 4 + i % 2 * 8; }
    static int column_a(int lane, int i) { return lane % 4 + i / 2 * 4; }
    static int row_b(int lane, int i) { return lane % 4 + i * 4; }
    static float element(const unsigned *registers, int i) { return __uint_as_float(registers[i] & ~0x1fffu); }
};

template <typename T, int K>
inline void multiply(unsigned, void *const *lanes) {
    using L = Layout<T>;
    float a[16][K], b[K][8], c[16][8];
    auto row_c = [](int lane, int i) { return lane / 4 + i / 2 * 8; };
    auto column_c = [](int lane, int i) { return lane % 4 * 2 + i % 2; };
    for (int lane = 0; lane < 32; lane++) {
        const Mma &own = *static_cast<Mma *>(lanes[lane]);
        for (int i = 0; i < K / 2; i++) a[L::row_a(lane, i)][L::column_a(lane, i)] = L::element(own.a, i);
        for (int i = 0; i < K / 4; i++) b[L::row_b(lane, i)][lane / 4] = L::element(own.b, i);
        for (int i = 0; i < 4; i++) c[row_c(lane, i)][column_c(lane, i)] = own.c[i];
    }
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < K; k++)
            for (int j = 0; j < 8; j++) c[i][j] += a[i][k] * b[k][j];
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++)
            static_cast<Mma *>(lanes[lane])->d[i] = c[row_c(lane, i)][column_c(lane, i)];
}

struct LoadMatrix {
    unsigned *r;
    const unsigned char *row;
};

template <int matrices, bool trans>
inline void load_matrices(unsigned, void *const *lanes) {
    for (int lane = 0; lane < 32; lane++) {
        for (int i = 0; i < matrices; i++) {
            auto element = [&](int row, int column) {
                unsigned short value;
                memcpy(&value, static_cast<LoadMatrix *>(lanes[8 * i + row])->row + 2 * column, 2);
                return unsigned(value);
            };
            int major = lane / 4, minor = lane % 4 * 2;
            unsigned low = trans ? element(minor, major) : element(major, minor);
            unsigned high = trans ? element(minor + 1, major) : element(major, minor + 1);
            static_cast<LoadMatrix *>(lanes[lane])->r[i] = low | high << 16;
        }
    }
}

template <int matrices, bool trans>
inline void ldmatrix(unsigned *r, const void *smem) {
    if (lane() < 8 * matrices && reinterpret_cast<uintptr_t>(smem) % 16) fail("ldmatrix: the row is not aligned to 16");
    LoadMatrix data = {r, static_cast<const unsigned char *>(smem)};
    collective(matrices == 4 ? "ldmatrix_x4" : "ldmatrix_x2", WARP, load_matrices<matrices, trans>, &data);
}

}  // namespace emulator

inline void __syncwarp(unsigned mask = emulator::WARP) {
    emulator::collective("__syncwarp", mask, [](unsigned, void *const *) {}, nullptr);
}

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source) {
    return emulator::shuffle(mask, value, source & 31);
}

template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return emulator::shuffle(mask, value, (emulator::lane() ^ lanes) & 31);
}

template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
    int source = emulator::lane() - int(delta);
    return emulator::shuffle(mask, value, source < 0 ? emulator::lane() : source);
}

template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
    int source = emulator::lane() + int(delta);
    return emulator::shuffle(mask, value, source > 31 ? emulator::lane() : source);
}

inline void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4]) {
    emulator::Mma data = {d, a, b, c};
    emulator::collective("mma_tf32", emulator::WARP, emulator::multiply<emulator::tf32_t, 8>, &data);
}

template <typename T>
inline void mma_k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4]) {
    emulator::Mma data = {d, a, b, c};
    emulator::collective("mma_k16", emulator::WARP, emulator::multiply<T, 16>, &data);
}

template <typename T>
inline void mma_k8(float (&d)[4], const unsigned (&a)[2], unsigned b, const float (&c)[4]) {
    emulator::Mma data = {d, a, &b, c};
    emulator::collective("mma_k8", emulator::WARP, emulator::multiply<T, 8>, &data);
}

inline void ldmatrix_x4(unsigned (&r)[4], const void *smem) { emulator::ldmatrix<4, false>(r, smem); }
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void *smem) { emulator::ldmatrix<4, true>(r, smem); }
inline void ldmatrix_x2_trans(unsigned (&r)[2], const void *smem) { emulator::ldmatrix<2, true>(r, smem); }

// Blocks and memory

inline void __syncthreads() { emulator::wait_at_barrier(); }

namespace emulator {

// Copies happen when they are waited for, so that a missing wait shows.
inline void copy_later(void *smem, const void *global, int size) {
    if ((reinterpret_cast<uintptr_t>(smem) | reinterpret_cast<uintptr_t>(global)) % size)
        fail("cp_async%d: addresses %p and %p are not aligned to it", size, smem, global);
    current->copies.push_back({smem, global, size, current->groups});
}

inline void finish_copies(int groups) {
    std::vector<Copy> later;
    for (const Copy &copy : current->copies) {
        if (copy.group < groups)
            memcpy(copy.shared, copy.global, copy.size);
        else
            later.push_back(copy);
    }
    current->copies.swap(later);
}

}  // namespace emulator

inline void cp_async4(void *smem, const void *global) { emulator::copy_later(smem, global, 4); }
inline void cp_async16_or_zero(void *smem, const void *global, bool there) {
    alignas(16) static const unsigned char zeros[16] = {};
    emulator::copy_later(smem, there ? global : zeros, 16);
}
inline void cp_async_commit() { emulator::current->groups++; }

template <int n>
inline void cp_async_wait() {
    emulator::finish_copies(emulator::current->groups - n);
}

inline int opaque(int x) { return x; }
inline float opaque(float x) { return x; }
inline unsigned long long opaque(unsigned long long x) { return x; }
inline unsigned long long offset(unsigned long long address, int i, int stride) { return address + (long long)i * stride; }
inline void rarely() {}

inline void store_global(float4 *address, float4 v) { *address = v; }
template <typename T>
inline void store_global(T *address, T v) {
    *address = v;
}

template <typename T>
inline T ldg(const T *address) {
    return *address;
}
