// Adds up what the blocks and warps of the backward scan found, in a fixed order. Also defined by the launcher: IO,
// RANK, D_STATE.
#include "prelude.cuh"

constexpr int WIDTH = RANK + 2 * D_STATE;
constexpr int PARAMS = RANK + D_STATE + 2;
constexpr int COLUMNS = 32, ROWS = 8;  // of a block of sum_params

struct RowsParams {
    const IO* parts;  // [parts, rows, R + 2 N]
    IO* sum;          // [rows, pitch], zero beyond R + 2 N
    long long rows;
    int num_parts, pitch;
};

// A thread a pair of values of the sum.
extern "C" __global__ void __launch_bounds__(256) sum_rows(const __grid_constant__ RowsParams p) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int pairs = p.pitch / 2;
    const long long row = i / pairs;
    const int col = i % pairs * 2;
    if (row >= p.rows) return;
    const long long stride = p.rows * WIDTH;
    const IO* from = p.parts + row * WIDTH + col;
    float lo = 0.0f, hi = 0.0f;
    if (WIDTH % 2 == 0) {
        if (col < WIDTH) {
#pragma unroll 8
            for (int j = 0; j < p.num_parts; j++) {
                float2 v = unpack2<IO>(ldg(reinterpret_cast<const unsigned*>(from + j * stride)));
                lo += v.x, hi += v.y;
            }
        }
    } else {
        for (int j = 0; j < p.num_parts; j++) {
            if (col < WIDTH) lo += to_float(from[j * stride]);
            if (col + 1 < WIDTH) hi += to_float(from[j * stride + 1]);
        }
    }
    *reinterpret_cast<unsigned*>(p.sum + row * p.pitch + col) = pack2<IO>(lo, hi);
}

struct ParamsParams {
    const float* parts;                      // [parts, K, D, weight (R) | A (N) | bias | D]
    float *weight, *A, *bias, *D;            // [K, D, R], [K, D, N], [K, D], [K, D]
    int num_parts, num_routes, dim, shared;  // shared: the gradient of D is that of the last route, for all
};

// A column of threads a value.
extern "C" __global__ void __launch_bounds__(COLUMNS* ROWS) sum_params(const __grid_constant__ ParamsParams p) {
    DYNAMIC_SHARED(memory);
    float* sums = reinterpret_cast<float*>(memory);  // [ROWS, COLUMNS]
    const int x = threadIdx.x % COLUMNS, y = threadIdx.x / COLUMNS;
    const int size = p.num_routes * p.dim * PARAMS, i = blockIdx.x * COLUMNS + x;
    const int column = i % PARAMS, channel = i / PARAMS;
    float sum = 0.0f;
    if (i < size) {
        const bool last = p.shared && column == PARAMS - 1;
        const int from = last ? ((p.num_routes - 1) * p.dim + channel % p.dim) * PARAMS + column : i;
#pragma unroll 4
        for (int j = y; j < p.num_parts; j += ROWS) sum += ldg(p.parts + (long long)j * size + from);
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (y > 0 || i >= size) return;
    for (int j = 1; j < ROWS; j++) sum += sums[j * COLUMNS + x];
    if (column < RANK) {
        p.weight[channel * RANK + column] = sum;
    } else if (column < RANK + D_STATE) {
        p.A[channel * D_STATE + column - RANK] = sum;
    } else {
        (column == RANK + D_STATE ? p.bias : p.D)[channel] = sum;
    }
}
