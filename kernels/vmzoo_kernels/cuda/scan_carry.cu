// Replaces what each segment adds to a state, starting from zero, by the state that it starts from (REVERSE: for the
// backward scan, which starts at the end). One thread a state. Also defined by the launcher: D_STATE.
#include "prelude.cuh"

struct Params {
    const float* A;       // [K, D, N]
    float* states;        // [B, K, segments, N, D]
    const float* deltas;  // [B, K, segments, D], summed step sizes
    int batch, num_routes, num_segments, dim, reverse;
};

extern "C" __global__ void __launch_bounds__(128) scan_carry(const __grid_constant__ Params p) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int d = i % p.dim, n = i / p.dim % D_STATE;
    const long long i_sequence = i / p.dim / D_STATE;
    if (i_sequence >= (long long)p.batch * p.num_routes) return;
    const float rate = p.A[((i_sequence % p.num_routes) * p.dim + d) * D_STATE + n] * 1.4426950408889634f;
    float h = 0.0f;
    constexpr int AHEAD = 8;  // loads under way at a time
    for (int j0 = 0; j0 < p.num_segments; j0 += AHEAD) {
        float added[AHEAD], delta[AHEAD];
        float* states[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const int turn = min(j0 + j, p.num_segments - 1);
            const long long i_segment = i_sequence * p.num_segments + (p.reverse ? p.num_segments - 1 - turn : turn);
            states[j] = p.states + (i_segment * D_STATE + n) * p.dim + d;
            added[j] = *states[j], delta[j] = ldg(p.deltas + i_segment * p.dim + d);
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            if (j0 + j >= p.num_segments) continue;
            *states[j] = h;
            h = fmaf(ex2(delta[j] * rate), h, added[j]);
        }
    }
}
