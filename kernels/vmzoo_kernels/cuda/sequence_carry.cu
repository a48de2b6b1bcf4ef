// Replaces what each segment adds to a state, starting from zero, by the state that it starts from (reverse: for the
// backward scan, which starts at the end). One thread a state. Defined by the launcher: D_STATE.
#include "prelude.cuh"

struct Params {
    const float* A;       // [D, N]
    float* states;        // [B, segments, D, N]
    const float* deltas;  // [B, segments, D], step sizes together
    int batch, num_segments, dim, reverse;
};

extern "C" __global__ void __launch_bounds__(128) sequence_carry(const __grid_constant__ Params p) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x, states = (long long)p.dim * D_STATE;
    const long long batch = i / states, state = i % states;
    if (batch >= p.batch) return;
    const float rate = p.A[state] * 1.4426950408889634f;
    float h = 0.0f;
    for (int j = 0; j < p.num_segments; j++) {
        const long long segment = batch * p.num_segments + (p.reverse ? p.num_segments - 1 - j : j);
        float* at = p.states + segment * states + state;
        const float added = *at, delta = p.deltas[segment * p.dim + state / D_STATE];
        *at = h;
        h = fmaf(ex2(delta * rate), h, added);
    }
}
