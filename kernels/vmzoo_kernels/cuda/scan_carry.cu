// Replaces what each segment adds to a state, starting from zero, by the state that it starts from (REVERSE: for the
// backward scan, which starts at the end). One thread a state. Also defined by the launcher: D_STATE.
#include "prelude.cuh"

struct Params {
    const float* A;       // [K, D, N]
    float* states;        // [B, K, segments, N, D]
    const float* deltas;  // [B, K, segments, W, D], summed step sizes
    int batch, num_routes, num_segments, warps, dim, reverse;
};

extern "C" __global__ void __launch_bounds__(128) scan_carry(const __grid_constant__ Params p) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int d = i % p.dim, n = i / p.dim % D_STATE;
    const long long i_sequence = i / p.dim / D_STATE;
    if (i_sequence >= (long long)p.batch * p.num_routes) return;
    const float rate = p.A[((i_sequence % p.num_routes) * p.dim + d) * D_STATE + n] * 1.4426950408889634f;
    float h = 0.0f;
    for (int j = 0; j < p.num_segments; j++) {
        const long long i_segment = i_sequence * p.num_segments + (p.reverse ? p.num_segments - 1 - j : j);
        float* state = p.states + (i_segment * D_STATE + n) * p.dim + d;
        const float* deltas = p.deltas + i_segment * p.warps * p.dim + d;
        float delta = 0.0f;
        for (int w = 0; w < p.warps; w++) delta += deltas[w * p.dim];
        const float added = *state;
        *state = h;
        h = fmaf(ex2(delta * rate), h, added);
    }
}
