// Forward scan along sequences; see sequence.cuh.
#include "prelude.cuh"
#include "sequence.cuh"

struct Params {
    const IO* u;            // [B, D, L]
    const DELTA* delta;     // [B, D, L]
    const B_IO* B;          // [B, G, N, L]
    const C_IO* C;          // [B, G, N, L]
    const float* A;         // [D, N]
    const float* D;         // [D], or null
    const float* bias;      // [D], or null
    IO* y;                  // [B, D, L]
    float* last;            // [B, D, N]
    float* states;          // [B, tiles, D, N], at the start of each tile; or null
    float* segment_states;  // [B, segments, D, N], where segments start; what they add to the state with SUMMARY
    float* segment_deltas;  // [B, segments, D], their step sizes together
    long long u_b, u_d, delta_b, delta_d, B_b, B_g, B_n, C_b, C_g, C_n;
    int groups, dim, length, blocks, num_segments, segment_tiles;
};

constexpr int UNROLL = D_STATE < 4 ? D_STATE : 2;

extern "C" __global__ void __launch_bounds__(THREADS, MAX_WARPS / WARPS)
    sequence_forward(const __grid_constant__ Params p) {
    DYNAMIC_SHARED(shared);
    const Place at(p);
    const int lane = at.lane, g = at.g;
    const long long tiles = (p.length + TILE - 1) / TILE;

    unsigned char* memory = shared;
    Projections<1> projections(p, at, at.begin, memory);
    uint4* u_slot = reinterpret_cast<uint4*>(memory) + at.warp * 32 * (PIECES<IO> + PIECES<DELTA>)+lane;
    uint4* delta_slot = u_slot + 32 * PIECES<IO>;
    memory += WARPS * 512 * (PIECES<IO> + PIECES<DELTA>);
    float2* state = reinterpret_cast<float2*>(memory) + at.warp * STATES;  // [N, CHANNELS], rate of decay and state

    const int t0 = at.begin * TILE + g * STEPS;
    const IO* u = p.u + at.batch * p.u_b + at.d * p.u_d + t0;
    const DELTA* deltas = p.delta + at.batch * p.delta_b + at.d * p.delta_d + t0;
    IO* y = p.y + ((long long)at.batch * p.dim + at.d) * p.length + t0;
    const float bias = p.bias == nullptr ? 0.0f : p.bias[at.d];
    const float skip = p.D == nullptr ? 0.0f : p.D[at.d];
    const long long first_state = (long long)at.first * D_STATE, states = (long long)p.dim * D_STATE;
    const int num_states = at.channels * D_STATE;
    const long long i_segment = (long long)at.batch * p.num_segments + at.segment;
    float* kept = p.states + (at.batch * tiles + at.begin) * states + first_state + lane;

    auto start = [&](int tile) {
        const int count = at.count(tile, p.length);
        fetch(u_slot, u, count);
        fetch(delta_slot, deltas, count);
        u += TILE, deltas += TILE;
        projections.start(p, tile);
        cp_async_commit();
    };

    start(at.begin);
    for (int i = lane; i < STATES; i += 32) {
        float2 v = make_float2(0.0f, 0.0f);
        if (i < num_states) {
            v.x = p.A[first_state + i] * LOG2E;
            if (!SUMMARY && p.segment_states != nullptr) v.y = p.segment_states[i_segment * states + first_state + i];
        }
        state[place_of(i)] = v;
    }
    cp_async_wait<0>();
    projections.convert(0);
    float delta_sum = 0.0f;

    for (int tile = at.begin; tile < at.end; tile++) {
        const int turn = (tile - at.begin) & 1, count = at.count(tile, p.length);
        __syncthreads();
        float u_delta[STEPS], delta[STEPS], out[STEPS];
        receive<IO>(u_delta, u_slot);
        receive<DELTA>(delta, delta_slot);
        make_deltas(delta, bias, count);
#pragma unroll
        for (int s = 0; s < STEPS; s++) out[s] = skip * u_delta[s], u_delta[s] *= delta[s];
        if (tile + 1 < at.end) start(tile + 1);
        const float sum_delta = sum(delta);
        if (SUMMARY) delta_sum += sum_delta;
        if (!SUMMARY && p.states != nullptr) {
#pragma unroll
            for (int i = 0; i < STATES; i += 32) {
                if (i + lane < num_states) kept[i] = state[place_of(i + lane)].y;
            }
            kept += states;
            __syncwarp();
        }

        const float4* row = projections.row(turn, g);
        float2* own = state + at.c;
#pragma unroll UNROLL
        for (int n = 0; n < D_STATE; n++, row += ROW, own += CHANNELS) {
            float B[STEPS], C[STEPS], decay[STEPS];
            read(B, row);
            if (!SUMMARY) read(C, row + D_STATE * ROW);
            const float rate = own->x;
            float h = 0.0f;
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                decay[s] = ex2(delta[s] * rate);
                B[s] *= u_delta[s];
                h = s == 0 ? B[0] : fmaf(decay[s], h, B[s]);
            }
            float end;
            h = join<false>(ex2(sum_delta * rate), h, own->y, end, lane);
            if (g == 0) own->y = end;
            if (SUMMARY) continue;
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                h = fmaf(decay[s], h, B[s]);
                out[s] = fmaf(C[s], h, out[s]);
            }
        }
        if (!SUMMARY) store(y, out, count);
        y += TILE;
        if (tile + 1 < at.end) {
            cp_async_wait<0>();
            projections.convert(turn ^ 1);
        }
    }

    __syncwarp();
    if (SUMMARY) {
        delta_sum = sum_groups(delta_sum);
        if (g == 0 && at.valid) p.segment_deltas[i_segment * p.dim + at.d] = delta_sum;
    }
    float* to = SUMMARY                            ? p.segment_states + i_segment * states
                : at.segment + 1 == p.num_segments ? p.last + at.batch * states
                                                   : nullptr;
    if (to != nullptr) {
        for (int i = lane; i < num_states; i += 32) to[first_state + i] = state[place_of(i)].y;
    }
}
