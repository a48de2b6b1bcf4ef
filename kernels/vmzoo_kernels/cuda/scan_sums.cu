// Adds up what the warps of the scans found, in a fixed order: y or dx over routes, gradients of rows over blocks of
// channels, those of parameters over batch items and segments. Defined by the launcher: IO, RANK, D_STATE, and FROM and
// TO, the dtypes of the parts of y or dx and of their sum.
#include "prelude.cuh"

// Eight neighbouring values.
__device__ __forceinline__ void load8(float (&v)[8], const float* from) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float4 four = ldg(reinterpret_cast<const float4*>(from) + i);
        v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
    }
}
template <typename T>
__device__ __forceinline__ void load8(float (&v)[8], const T* from) {
    const uint4 words = ldg(reinterpret_cast<const uint4*>(from));
    const unsigned pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 two = unpack2<T>(pairs[i]);
        v[2 * i] = two.x, v[2 * i + 1] = two.y;
    }
}
__device__ __forceinline__ void store8(float* to, const float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 2; i++)
        reinterpret_cast<float4*>(to)[i] = make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
}
template <typename T>
__device__ __forceinline__ void store8(T* to, const float (&v)[8]) {
    *reinterpret_cast<uint4*>(to) =
        make_uint4(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]), pack2<T>(v[4], v[5]), pack2<T>(v[6], v[7]));
}

constexpr int WIDTH = RANK + 2 * D_STATE;
constexpr int RANK_PAIRS = (RANK + 1) / 2, PAIRS = RANK_PAIRS + D_STATE;  // of a part: dt, then B and C of each state
constexpr int PARAMS = RANK + D_STATE + 2;
constexpr int THREADS = 256, COLUMNS = 32;

struct Params {
    const FROM* routes;                            // [rows, K, D]
    TO* routes_sum;                                // [rows, D]
    const unsigned* rows;                          // [channel blocks, rows, K, PAIRS]
    IO* rows_sum;                                  // [rows, K, pitch], dt | B | C | zeros
    const float* params;                           // [parts, K, D, weight (R) | A (N) | bias | D]
    float *weight_sum, *A_sum, *bias_sum, *D_sum;  // [K, D, R], [K, D, N], [K, D], [K, D]
    long long num_rows;
    int num_routes, dim, channel_blocks, pitch, param_parts;
    int routes_blocks, rows_blocks;  // blocks of the grid for each, the others for params
};

// A thread eight values of the sum.
__device__ __forceinline__ void sum_routes(const Params& p, long long i) {
    const int eights = p.dim / 8;
    const long long row = i / eights;
    const int d = i % eights * 8;
    if (row >= p.num_rows) return;
    const FROM* from = p.routes + row * p.num_routes * p.dim + d;
    float sum[8];
    load8(sum, from);
#pragma unroll 3
    for (int k = 1; k < p.num_routes; k++) {
        float v[8];
        load8(v, from + k * p.dim);
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] += v[j];
    }
    store8(p.routes_sum + row * p.dim + d, sum);
}

// A thread a pair of values of the sum, or of the zeros.
__device__ __forceinline__ void sum_rows(const Params& p, long long i) {
    const int threads = PAIRS + (p.pitch - WIDTH + 1) / 2;
    const long long row = i / threads, num_rows = p.num_rows * p.num_routes;
    const int pair = i % threads;
    if (row >= num_rows) return;
    float lo = 0.0f, hi = 0.0f;
    if (pair < PAIRS) {
        const unsigned* from = p.rows + row * PAIRS + pair;
#pragma unroll 8
        for (int j = 0; j < p.channel_blocks; j++) {
            const float2 v = unpack2<IO>(ldg(from + j * num_rows * PAIRS));
            lo += v.x, hi += v.y;
        }
    }
    const bool dt = pair < RANK_PAIRS, state = !dt && pair < PAIRS;
    const int n = pair - RANK_PAIRS, zero = WIDTH + 2 * (pair - PAIRS);
    const int first = dt ? 2 * pair : state ? RANK + n : zero;
    const int second = dt ? 2 * pair + 1 : state ? RANK + D_STATE + n : zero + 1;
    IO* to = p.rows_sum + row * p.pitch;
    if (RANK % 2 == 0 && D_STATE == 1) {
        *reinterpret_cast<unsigned*>(to + first) = pack2<IO>(lo, hi);
    } else {
        to[first] = from_float<IO>(lo);
        if (!(dt && second >= RANK) && second < p.pitch) to[second] = from_float<IO>(hi);
    }
}

// A column of threads a value.
__device__ __forceinline__ void sum_params(const Params& p, int block, float* sums) {
    const int x = threadIdx.x % COLUMNS, y = threadIdx.x / COLUMNS;
    const int size = p.num_routes * p.dim * PARAMS;
    const int i = block * COLUMNS + x, column = i % PARAMS, channel = i / PARAMS;
    float sum = 0.0f;
    if (i < size) {
#pragma unroll 8
        for (int j = y; j < p.param_parts; j += THREADS / COLUMNS) sum += ldg(p.params + (long long)j * size + i);
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (y > 0 || i >= size) return;
    for (int j = 1; j < THREADS / COLUMNS; j++) sum += sums[j * COLUMNS + x];
    if (column < RANK) {
        p.weight_sum[channel * RANK + column] = sum;
    } else if (column < RANK + D_STATE) {
        p.A_sum[channel * D_STATE + column - RANK] = sum;
    } else {
        (column == RANK + D_STATE ? p.bias_sum : p.D_sum)[channel] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) scan_sums(const __grid_constant__ Params p) {
    DYNAMIC_SHARED(memory);
    const int block = blockIdx.x, after = block - p.routes_blocks;
    if (after < 0) {
        sum_routes(p, (long long)block * THREADS + threadIdx.x);
    } else if (after < p.rows_blocks) {
        sum_rows(p, (long long)after * THREADS + threadIdx.x);
    } else {
        sum_params(p, after - p.rows_blocks, reinterpret_cast<float*>(memory));
    }
}
