// Backward scan along sequences, from the last tile to the first; see sequence.cuh. States come from those kept at the
// start of each tile. The gradients of B and C are sums over channels: the matrix unit adds up those of a warp, shared
// memory those of a block, and sequence_sums.cu the blocks. Also defined by the launcher: EXACT (these sums in float32
// rather than TF32).
#include "prelude.cuh"
#include "sequence.cuh"

struct Params {
    const IO* dy;           // [B, D, L]
    const IO* u;            // [B, D, L]
    const DELTA* delta;     // [B, D, L]
    const B_IO* B;          // [B, G, N, L]
    const C_IO* C;          // [B, G, N, L]
    const float* A;         // [D, N]
    const float* D;         // [D], or null
    const float* bias;      // [D], or null
    const float* states;    // [B, tiles, D, N], at the start of each tile
    IO* d_u;                // [B, D, L]
    DELTA* d_delta;         // [B, D, L]
    float* d_projections;   // [blocks, B, G, 2 N, tiles x TILE], of B and of C
    float* d_params;        // [B, segments, D, N + 2], of A, bias and D
    float* segment_states;  // [B, segments, D, N], gradients that segments start from, at their end; or what they add
    float* segment_deltas;  // [B, segments, D], their step sizes together
    long long dy_b, dy_d, u_b, u_d, delta_b, delta_d, B_b, B_g, B_n, C_b, C_g, C_n;
    int batch, groups, dim, length, blocks, num_segments, segment_tiles;
};

constexpr int TURN_STATES = D_STATE < 4 ? D_STATE : 4;  // states between two sums over the warps
constexpr int ROW_OF_SUMS = WARPS * TILE / 2;           // of all warps, in pairs of steps

struct State {
    float rate;      // of decay
    float gradient;  // that comes from the tiles after
    float kept[2];   // state at the start of a tile, of two tiles in turn
};

// sums[2 e + j] = the sum over channels of value e (0: of_B, 1: of_C) at step 2 c + j, for the lane's group.
//
// The matrix unit cuts what it multiplies down to TF32, which makes numbers smaller by 1 / 3000 on average:
// sequence_sums.cu puts that right. With EXACT, what is cut off is added too.
__device__ __forceinline__ void sum_channels(float (&sums)[4], const float (&of_B)[STEPS], const float (&of_C)[STEPS],
                                             int g, int c) {
    // Rows of the product are groups; its columns are the even step of the first four channels that it takes and the
    // odd one of the others, in turn. So every lane gets all steps of its group, and picks two.
    const unsigned select[2] = {g & 1 ? 0u : __float_as_uint(1.0f), g & 1 ? __float_as_uint(1.0f) : 0u};
    float all[STEPS / 2][4];
#pragma unroll
    for (int i = 0; i < STEPS / 2; i++) {
        const float v[4] = {of_B[2 * i], of_C[2 * i], of_B[2 * i + 1], of_C[2 * i + 1]};
        unsigned high[4];
#pragma unroll
        for (int j = 0; j < 4; j++) high[j] = __float_as_uint(v[j]);
        const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        mma_tf32(all[i], high, select, zero);
        if (EXACT) {
            unsigned low[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                low[j] = __float_as_uint(v[j] - __uint_as_float(high[j] & 0xffffe000u));
            }
            mma_tf32(all[i], low, select, all[i]);
        }
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float lo = c & 1 ? all[1][j] : all[0][j], hi = c & 1 ? all[3][j] : all[2][j];
        sums[j] = c & 2 ? hi : lo;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MAX_WARPS / WARPS)
    sequence_backward(const __grid_constant__ Params p) {
    DYNAMIC_SHARED(shared);
    const Place at(p);
    const int lane = at.lane, g = at.g;
    const long long tiles = (p.length + TILE - 1) / TILE;

    unsigned char* memory = shared;
    Projections<-1> projections(p, at, at.end - 1, memory);
    constexpr int TURN_PIECES = PIECES<IO> + PIECES<DELTA>;
    uint4* dy_slot = reinterpret_cast<uint4*>(memory) + at.warp * 32 * (PIECES<IO> + 2 * TURN_PIECES) + lane;
    uint4* slots = dy_slot + 32 * PIECES<IO>;  // of u and delta, [2]
    memory += WARPS * 512 * (PIECES<IO> + 2 * TURN_PIECES);
    float2* partial = reinterpret_cast<float2*>(memory);  // [2, TURN_STATES, 2, WARPS, TILE / 2]
    memory += 2 * TURN_STATES * 2 * WARPS * TILE * 4;
    State* state = reinterpret_cast<State*>(memory) + at.warp * STATES;  // [N, CHANNELS]
    memory += WARPS * STATES * sizeof(State);
    float* d_A = reinterpret_cast<float*>(memory) + at.warp * 32 * D_STATE + lane;  // [N, 32]

    const int t0 = (at.end - 1) * TILE + g * STEPS;
    const IO* dys = p.dy + at.batch * p.dy_b + at.d * p.dy_d + t0;
    const IO* u = p.u + at.batch * p.u_b + at.d * p.u_d + t0;
    const DELTA* deltas = p.delta + at.batch * p.delta_b + at.d * p.delta_d + t0;
    long long i_step = ((long long)at.batch * p.dim + at.d) * p.length + t0;  // of d_u and d_delta
    const float bias = p.bias == nullptr ? 0.0f : p.bias[at.d];
    const float skip = p.D == nullptr ? 0.0f : p.D[at.d];
    const long long first_state = (long long)at.first * D_STATE, states = (long long)p.dim * D_STATE;
    const int num_states = at.channels * D_STATE;
    const long long i_segment = (long long)at.batch * p.num_segments + at.segment;
    const float* kept_states = p.states + (at.batch * tiles + at.end - 1) * states + first_state + lane;
    const long long i_group = ((long long)at.block * p.batch + at.batch) * p.groups + at.group;
    float* d_projections = p.d_projections + (i_group * 2 * D_STATE * tiles + at.end - 1) * TILE + 2 * lane;

    auto start = [&](int tile, int turn) {
        const int count = at.count(tile, p.length);
        uint4* slot = slots + turn * 32 * TURN_PIECES;
        fetch(dy_slot, dys, count);
        if (!SUMMARY) fetch(slot, u, count);
        fetch(slot + 32 * PIECES<IO>, deltas, count);
        dys -= TILE, u -= TILE, deltas -= TILE;
        projections.start(p, tile);
        if (!SUMMARY) {
#pragma unroll
            for (int i = 0; i < STATES; i += 32) {
                if (i + lane < num_states) cp_async4(state[place_of(i + lane)].kept + turn, kept_states + i);
            }
            kept_states -= states;
        }
        cp_async_commit();
    };

    for (int i = lane; i < STATES; i += 32) {
        State v = {0.0f, 0.0f, {0.0f, 0.0f}};
        if (i < num_states) {
            v.rate = p.A[first_state + i] * LOG2E;
            if (!SUMMARY && p.segment_states != nullptr) {
                v.gradient = p.segment_states[i_segment * states + first_state + i];
            }
        }
        state[place_of(i)] = v;
    }
    __syncwarp();
    start(at.end - 1, 0);
#pragma unroll 1
    for (int n = 0; n < D_STATE; n++) d_A[32 * n] = 0.0f;
    cp_async_wait<0>();
    projections.convert(0);
    __syncthreads();
    float d_bias = 0.0f, d_skip = 0.0f, delta_sum = 0.0f;
    int parity = 0;  // of the sums over warps

    for (int tile = at.end - 1; tile >= at.begin; tile--) {
        const int turn = (at.end - 1 - tile) & 1, count = at.count(tile, p.length);
        const uint4 *u_slot = slots + turn * 32 * TURN_PIECES, *delta_slot = u_slot + 32 * PIECES<IO>;
        float dy[STEPS], delta[STEPS], u_delta[STEPS];
        receive<IO>(dy, dy_slot);
        receive<DELTA>(delta, delta_slot);
        make_deltas(delta, bias, count);
        if (!SUMMARY) {
            receive<IO>(u_delta, u_slot);
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                d_skip = fmaf(dy[s], u_delta[s], d_skip);
                u_delta[s] *= delta[s];
            }
        }
        if (tile > at.begin) start(tile - 1, turn ^ 1);
        const float sum_delta = sum(delta);
        if (SUMMARY) delta_sum += sum_delta;
        float d_u_delta[STEPS], d_delta[STEPS];  // gradients of delta u, and of delta as a step size
#pragma unroll
        for (int s = 0; s < STEPS; s++) d_u_delta[s] = d_delta[s] = 0.0f;

        const float4* row = projections.row(turn, g);
        State* own = state + at.c;
        float* of_As = d_A;
#pragma unroll 1
        for (int first = 0; first < D_STATE; first += TURN_STATES) {
            float2* sums_of_warp = partial + parity * TURN_STATES * ROW_OF_SUMS * 2 + at.warp * (TILE / 2) + lane;
#pragma unroll 1
            for (int n = 0; n < min(TURN_STATES, D_STATE - first); n++, row += ROW, own += CHANNELS, of_As += 32) {
                float B[STEPS], C[STEPS], decay[STEPS];
                read(C, row + D_STATE * ROW);
                const float rate = own->rate;
#pragma unroll
                for (int s = 0; s < STEPS; s++) decay[s] = ex2(delta[s] * rate);
                const float decay_all = ex2(sum_delta * rate);
                float gradient = 0.0f;  // of the state that the step before leaves
#pragma unroll
                for (int s = STEPS - 1; s >= 0; s--) gradient = decay[s] * fmaf(C[s], dy[s], gradient);
                float end;
                gradient = join<true>(decay_all, gradient, own->gradient, end, lane);
                if (g == GROUPS - 1) own->gradient = end;
                if (SUMMARY) continue;

                read(B, row);
                float h = 0.0f;
#pragma unroll
                for (int s = 0; s < STEPS; s++) h = fmaf(decay[s], h, B[s] * u_delta[s]);
                h = join<false>(decay_all, h, own->kept[turn], end, lane);
                float decayed[STEPS], of_B[STEPS], of_C[STEPS];
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    decayed[s] = decay[s] * h;
                    h = fmaf(B[s], u_delta[s], decayed[s]);
                    of_C[s] = dy[s] * h;
                }
                float of_A = 0.0f;
#pragma unroll
                for (int s = STEPS - 1; s >= 0; s--) {
                    gradient = fmaf(C[s], dy[s], gradient);
                    d_u_delta[s] = fmaf(B[s], gradient, d_u_delta[s]);
                    of_B[s] = u_delta[s] * gradient;
                    const float of_exponent = gradient * decayed[s];
                    d_delta[s] = fmaf(rate, of_exponent, d_delta[s]);
                    of_A = fmaf(delta[s], of_exponent, of_A);
                    gradient *= decay[s];
                }
                *of_As += of_A;
                float sums[4];
                sum_channels(sums, of_B, of_C, g, at.c);
                sums_of_warp[2 * n * ROW_OF_SUMS] = make_float2(sums[0], sums[1]);
                sums_of_warp[(2 * n + 1) * ROW_OF_SUMS] = make_float2(sums[2], sums[3]);
            }
            if (first + TURN_STATES >= D_STATE) {
                if (!SUMMARY) {
                    float v[STEPS];
                    receive<DELTA>(v, delta_slot);
                    float of_u[STEPS];
                    receive<IO>(of_u, u_slot);
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
                        d_delta[s] = fmaf(d_u_delta[s], of_u[s], d_delta[s] * LN2);
                        of_u[s] = fmaf(d_u_delta[s], delta[s], skip * dy[s]);
                        if (SOFTPLUS) d_delta[s] *= rcp(1.0f + ex2(-LOG2E * (v[s] + bias)));
                        d_bias += d_delta[s];
                    }
                    store(p.d_u + i_step, of_u, count);
                    store(p.d_delta + i_step, d_delta, count);
                    i_step -= TILE;
                }
                if (tile > at.begin) {
                    cp_async_wait<0>();
                    projections.convert(turn ^ 1);
                }
            }
            __syncthreads();
            if (SUMMARY) continue;
#pragma unroll
            for (int i = 0; i < 2 * TURN_STATES; i += WARPS) {
                const int row = i + at.warp, n = first + row / 2;  // of B and of C in turn
                if (row >= 2 * TURN_STATES || n >= D_STATE) continue;
                const float2* from = partial + (parity * 2 * TURN_STATES + row) * ROW_OF_SUMS + lane;
                float2 sum = from[0];
#pragma unroll
                for (int w = 1; w < WARPS; w++) {
                    const float2 v = from[w * (TILE / 2)];
                    sum.x += v.x, sum.y += v.y;
                }
                const long long i_row = row & 1 ? D_STATE + n : n;
                *reinterpret_cast<float2*>(d_projections + i_row * tiles * TILE) = sum;
            }
            parity ^= 1;
        }
        d_projections -= TILE;
    }

    __syncwarp();
    if (SUMMARY) {
        delta_sum = sum_groups(delta_sum);
        if (g == 0 && at.valid) p.segment_deltas[i_segment * p.dim + at.d] = delta_sum;
        float* to = p.segment_states + i_segment * states + first_state;
        for (int i = lane; i < num_states; i += 32) to[i] = state[place_of(i)].gradient;
        return;
    }
    float* d_params = p.d_params + (i_segment * p.dim + at.first) * (D_STATE + 2);
    for (int i = lane; i < num_states; i += 32) {
        const int channel = i / D_STATE, n = i % D_STATE;
        float sum = 0.0f;
        for (int group = 0; group < GROUPS; group++) sum += d_A[32 * n + CHANNELS * group + channel - lane];
        d_params[channel * (D_STATE + 2) + n] = sum;
    }
    d_bias = sum_groups(d_bias), d_skip = sum_groups(d_skip);
    if (g == 0 && at.valid) {
        d_params[at.c * (D_STATE + 2) + D_STATE] = d_bias;
        d_params[at.c * (D_STATE + 2) + D_STATE + 1] = d_skip;
    }
}
