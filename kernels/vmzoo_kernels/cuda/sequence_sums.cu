// Adds up what the blocks of the backward scan along sequences found, in a fixed order. Defined by the launcher: B_IO
// and C_IO (of B and C), D_STATE.
#include "prelude.cuh"

constexpr int TILE = 64;               // sequence.cuh
constexpr int PARAMS = D_STATE + 2;    // of a channel
constexpr int COLUMNS = 32, ROWS = 8;  // of a block of sum_sequence_params

struct ProjectionsParams {
    const float* parts;  // [blocks, B, G, 2 N, tiles x TILE], of B and of C
    B_IO* B;             // [B, G, N, L]
    C_IO* C;             // [B, G, N, L]
    long long rows;      // B G 2 N
    int blocks, length;
    float scale;
};

template <typename T>
__device__ __forceinline__ void store(T* row, int t, float2 v, int length) {
    if (t < length) row[t] = from_float<T>(v.x);
    if (t + 1 < length) row[t + 1] = from_float<T>(v.y);
}

// A thread two neighbouring steps.
extern "C" __global__ void __launch_bounds__(256) sum_projections(const __grid_constant__ ProjectionsParams p) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int pairs = (p.length + TILE - 1) / TILE * (TILE / 2);
    const long long row = i / pairs;
    if (row >= p.rows) return;
    const float2* from = reinterpret_cast<const float2*>(p.parts) + i;
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll 4
    for (int j = 0; j < p.blocks; j++) {
        const float2 v = ldg(from + j * p.rows * pairs);
        sum.x += v.x, sum.y += v.y;
    }
    const int t = i % pairs * 2, n = row % (2 * D_STATE);
    sum.x *= p.scale, sum.y *= p.scale;
    const long long group = row / (2 * D_STATE);
    if (n < D_STATE) {
        store(p.B + (group * D_STATE + n) * p.length, t, sum, p.length);
    } else {
        store(p.C + (group * D_STATE + n - D_STATE) * p.length, t, sum, p.length);
    }
}

struct ParamsParams {
    const float* parts;   // [parts, D, A (N) | bias | D]
    float *A, *bias, *D;  // [D, N], [D], [D]
    int num_parts, dim;
};

// A column of threads a value.
extern "C" __global__ void __launch_bounds__(COLUMNS* ROWS)
    sum_sequence_params(const __grid_constant__ ParamsParams p) {
    DYNAMIC_SHARED(memory);
    float* sums = reinterpret_cast<float*>(memory);  // [ROWS, COLUMNS]
    const int x = threadIdx.x % COLUMNS, y = threadIdx.x / COLUMNS;
    const int size = p.dim * PARAMS, i = blockIdx.x * COLUMNS + x;
    float sum = 0.0f;
    if (i < size) {
#pragma unroll 4
        for (int j = y; j < p.num_parts; j += ROWS) sum += ldg(p.parts + (long long)j * size + i);
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (y > 0 || i >= size) return;
    for (int j = 1; j < ROWS; j++) sum += sums[j * COLUMNS + x];
    const int column = i % PARAMS, channel = i / PARAMS;
    if (column < D_STATE) {
        p.A[channel * D_STATE + column] = sum;
    } else {
        (column == D_STATE ? p.bias : p.D)[channel] = sum;
    }
}
