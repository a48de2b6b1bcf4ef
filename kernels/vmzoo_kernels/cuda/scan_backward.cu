// Backward scan: all gradients, walking the tiles of every route from the last to the first, from the states that the
// forward scan kept at the start of each tile. Also defined by the launcher: DY (dtype of dy), MAX_WARPS (of a block),
// SHARED_X (one x for all routes, so that dx is a sum over them), and the accumulator of that sum: SHARED_SUM (a map in
// shared memory) or else float32 in global memory; SAME_TABLE, SKIP_ONCE, SEQUENCES and SUMMARY as in the
// forward scan.
//
// A tile is worked at in two halves of its channels, one after the other, so that their values fit the registers.
//
// With g_t = dL/dh_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}, what a step hands back is q_t = exp(delta_t A) g_t.
#include "prelude.cuh"
#define HALVES 1
#include "scan.cuh"

struct Params {
    const DY* dy;           // [B, L, D] or [B, L, K, D]
    const IO* x;            // [B, L, D] or [B, L, K, D]
    const IO* rows;         // [B, L, K, R + 2 N], dt | B | C
    const float* A;         // [K, D, N]
    const float* D;         // [K, D], or null
    const float* weight;    // [K, D, R]
    const float* bias;      // [K, D], or null
    const int* gather;      // [K, steps]
    const int* merge;       // [K, steps]
    const float* states;    // at the start of each tile [B, K, tiles, N, D]
    IO* dx;                 // as x
    float* sums;            // [B, L, D], without SHARED_SUM
    IO* d_rows;             // [channel blocks, B, L, K, R + 2 N]
    float* d_params;        // [blocks of the grid / channel blocks, units, W, K, D, weight (R) | A (N) | bias | D]
    float* segment_states;  // [B, K, segments, N, D], or null
    float* segment_deltas;  // [B, K, segments, W, D]
    long long dy_b, x_b, rows_b, dx_b;
    int dy_l, x_l, rows_l, dx_l;  // bytes; all others are elements
    int dy_k, x_k, rows_k, dx_k;
    int rows_width, positions, steps, sequence, dim, num_routes, batch;
    int blocks, warps, units, items;  // channel blocks, warps of a unit, units of a block, items of a unit
    int segment_steps, num_segments;
    int first_route, route_step, route_count;  // routes of this launch
    int mirrored;                              // every other of these routes walks the segment backwards
    int starts_sum, ends_sum;                  // whether the sum begins, ends with this launch
};

constexpr int PARAMS = RANK + D_STATE + 2;  // gradients of a channel's parameters
constexpr int WIDTH = RANK + 2 * D_STATE;
constexpr int RANK_TILES = (RANK + 7) / 8;

// 1 - exp(-delta), the derivative of softplus where its value is delta, without cancellation.
__device__ __forceinline__ float softplus_slope(float delta) {
    float small = fmaf(fmaf(delta, 1.0f / 6.0f, -0.5f), delta, 1.0f) * delta;
    return delta < 0.0625f ? small : 1.0f - ex2(delta * -LOG2E);
}

// Two neighbouring channels.
__device__ __forceinline__ void load_two(float (&v)[2], const float* p) {
    set(v, ldg(reinterpret_cast<const float2*>(p)));
}
template <typename T>
__device__ __forceinline__ void load_two(float (&v)[2], const T* p) {
    set(v, unpack2<T>(ldg(reinterpret_cast<const unsigned*>(p))));
}

using Mailboxes = Mail<2 * D_STATE, float2>;

// What a lane needs of the parameters of a route, in its own words of shared memory: there is no room in registers.
struct Constants {
    static constexpr int WEIGHTS = 0, BIAS = 2 * ROW_WORDS, TURNED = BIAS + 8, COUNT = TURNED + 2 * RANK_TILES;
    unsigned* memory;  // [COUNT, 32] of the warp
    int lane;

    __device__ __forceinline__ unsigned& word(int i) const { return memory[32 * i + lane]; }

    __device__ __forceinline__ void load(const float* weight, const float* dt_bias, Lane of) const {
        Weights weights;
        weights.load(weight, dt_bias, of);
#pragma unroll
        for (int j = 0; j < 2; j++) {
#pragma unroll
            for (int i = 0; i < ROW_WORDS; i++) word(WEIGHTS + j * ROW_WORDS + i) = weights.b[j][i];
#pragma unroll
            for (int e = 0; e < 4; e++) word(BIAS + 4 * j + e) = __float_as_uint(weights.bias[j][e]);
        }
#pragma unroll
        for (int i = 0; i < RANK_TILES; i++) {  // dt_weight as the second operand of a product over channels
            const int r = 8 * i + of.g;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float* p = weight + channel_of(j, 2 * of.c) * RANK + r;  // and its neighbour
                word(TURNED + 2 * i + j) = r < RANK ? pack2<IO>(p[0], p[RANK]) : 0u;
            }
        }
    }

    __device__ __forceinline__ void read(unsigned (&weights)[ROW_WORDS], float (&bias)[4], int j) const {
#pragma unroll
        for (int i = 0; i < ROW_WORDS; i++) weights[i] = word(WEIGHTS + j * ROW_WORDS + i);
#pragma unroll
        for (int e = 0; e < 4; e++) bias[e] = __uint_as_float(word(BIAS + 4 * j + e));
    }
};

// Sums over the lanes of a group, of b in its first lane and of c in its third.
__device__ __forceinline__ float sum_pair(float b, float c, Lane lane) {
    const bool upper = lane.c & 2;
    float own = (upper ? c : b) + __shfl_xor_sync(FULL, upper ? b : c, 2);
    return own + __shfl_xor_sync(FULL, own, 1);
}

extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS, 1) scan_backward(const __grid_constant__ Params p) {
    DYNAMIC_SHARED(memory);
    const Lane lane;
    const int id = threadIdx.x >> 5, lane_id = threadIdx.x & 31;
    const int slot = id / p.warps, warp = id % p.warps;
    const int block = blockIdx.x % p.blocks, segment = blockIdx.x / p.blocks % p.num_segments;
    const int group = blockIdx.x / p.blocks / p.num_segments;
    const int first_item = (group * p.units + slot) * p.items, items = min(p.items, p.batch - first_item);
    const int d0 = block * CHANNELS, d = d0 + 2 * lane.c;  // the lane's first channel in the first half

    // Shared memory: [rows of each warp | constants | gradients of B, C, if D_STATE > 1 | mailboxes | sum over routes]
    const int all_warps = p.units * p.warps;
    unsigned* words = reinterpret_cast<unsigned*>(memory);
    constexpr int staged_size = 32 * STEPS * WORDS, kept_size = D_STATE > 1 ? 2 * TILE * D_STATE : 0;
    const Rows staged = {words + id * staged_size, lane_id};
    words += all_warps * staged_size;
    const Constants constants = {words + id * 32 * Constants::COUNT, lane_id};
    words += all_warps * 32 * Constants::COUNT;
    float* kept = reinterpret_cast<float*>(words + id * kept_size);  // [8 STEPS, 2, N], of the first half
    words += all_warps * kept_size;
    const int unit_mail = (Mailboxes::SIZE * p.warps + 15) / 16 * 4;
    Mailboxes mail(words + slot * unit_mail, warp, p.warps);
    mail.start(lane_id);
    unsigned received = 0;
    float2* maps = reinterpret_cast<float2*>(words + p.units * unit_mail);
    __syncthreads();

    // Rows of the next tile are fetched while this one is worked at, their positions still earlier.
    int next_pos[STEPS];
    auto fetch_positions = [&](Place place, const Range& range) {
        if (!place.exists(p)) return;
        const int tile = range.tiles - 1 - place.turn;
        load_positions(next_pos, p.gather + (long long)range.k * p.steps + range.begin, tile * TILE + lane.g * STEPS,
                       range.length);
    };
    auto fetch_rows = [&](Place place, const Range& range) {
        if (!place.exists(p)) return;
        const IO* rows = p.rows + (long long)(first_item + place.item) * p.rows_b + (long long)range.k * p.rows_k;
        staged.fetch(rows + column(lane.c, 0), p.rows_l, next_pos, p.rows_width - column(lane.c, 0));
    };
    {
        const Range range(p, 0, segment);
        const Place first = {items > 0 && warp < range.tiles ? 0 : p.route_count, 0, warp};
        fetch_positions(first, range);
        fetch_rows(first, range);
    }

    for (int i_route = 0; i_route < p.route_count; i_route++) {
        const Range range(p, i_route, segment);
        const int k = range.k, i_segment = range.i_segment, begin = range.begin, length = range.length,
                  tiles = range.tiles;
        const int all_tiles = (p.steps + TILE - 1) / TILE, first_tile = (begin + TILE - 1) / TILE;

        const int* merge = pinned(p.merge + (long long)k * p.steps + begin);
        const int d_rows_l = 2 * p.num_routes * WIDTH;
        const float* weight = p.weight + ((long long)k * p.dim + d0) * RANK;
        __syncwarp();
        constants.load(weight, p.bias == nullptr ? nullptr : p.bias + k * p.dim + d0, lane);
        const float* A = p.A + ((long long)k * p.dim + d) * D_STATE;
        const bool starts = p.starts_sum && i_route == 0;
        const bool ends = !SHARED_X || (p.ends_sum && i_route == p.route_count - 1);
        const bool skips = p.D != nullptr && (!SKIP_ONCE || ends);

        // Before the first state is handed on, all warps of the unit must have done with the route before.
        bool joins = i_route > 0;
        float d_A[2][2] = {}, d_bias[2][2] = {}, d_D[2][2] = {}, delta_sum[2][2] = {};
        float d_weight[ROW_WORDS][4];
#pragma unroll
        for (int i = 0; i < ROW_WORDS; i++) {
#pragma unroll
            for (int e = 0; e < 4; e++) d_weight[i][e] = 0.0f;
        }
        const long long i_part = ((long long)blockIdx.x / p.blocks * p.units + slot) * p.warps + warp;
        float* part = p.d_params + ((i_part * p.num_routes + k) * p.dim + d0) * PARAMS;
        if (D_STATE > 1 && !SUMMARY) {
            for (int i = lane_id; i < CHANNELS * D_STATE; i += 32)
                part[i / D_STATE * PARAMS + RANK + i % D_STATE] = 0.0f;
            __syncwarp();
        }

        for (int item = 0; item < items; item++) {
            const long long batch = first_item + item, i_sequence = batch * p.num_routes + k;
            // + 4 (half L + position)
            float2* shared_sum = maps + (long long)(slot * p.items + item) * 8 * p.positions + lane.c;
            float2* global_sum = pinned(reinterpret_cast<float2*>(p.sums + batch * p.positions * p.dim + d));
            const DY* dy = pinned(p.dy + batch * p.dy_b + (long long)k * p.dy_k + d);
            const IO* x = pinned(p.x + batch * p.x_b + (long long)k * p.x_k + d);
            IO* dx = pinned(p.dx + batch * p.dx_b + (long long)k * p.dx_k + d);
            IO* d_rows =
                pinned(p.d_rows + ((block * (long long)p.batch + batch) * p.positions * p.num_routes + k) * WIDTH);
            const float* states = p.states + (i_sequence * all_tiles + first_tile) * D_STATE * p.dim + d;

            for (int turn = warp; turn < tiles; turn += p.warps) {
                const int tile = tiles - 1 - turn;
                const int t0 = tile * TILE + lane.g * STEPS;  // of the segment
                const bool whole = (tile + 1) * TILE <= length;
                int pos[STEPS];
#pragma unroll
                for (int s = 0; s < STEPS; s++) pos[s] = next_pos[s];
                const Place next = Place{i_route, item, turn}.next(p, items, tiles, warp);
                const Range next_range =
                    next.exists(p) && next.i_route != i_route ? Range(p, next.i_route, segment) : range;
                fetch_positions(next, next_range);
                cp_async_wait<0>();
                if (D_STATE > 1) __syncwarp();

                float d_B[STEPS], d_C[STEPS];  // for D_STATE 1
#pragma unroll
                for (int s = 0; s < STEPS; s++) d_B[s] = d_C[s] = 0.0f;
                // dL/d(what goes into the softplus), packed: after both halves the first is in `before`
                unsigned before[STEPS + 1], d_raw[STEPS + 1];
#pragma unroll
                for (int s = 0; s <= STEPS; s++) before[s] = d_raw[s] = 0u;

#pragma unroll 1
                for (int half = 0; half < 2; half++) {
                    unsigned xs[STEPS];
                    float dys[STEPS][2];
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
                        const int from = !whole ? max(pos[s], 0) : pos[s];
                        xs[s] = ldg(reinterpret_cast<const unsigned*>(at(x + 8 * half, from, p.x_l)));
                        if (SAME_TABLE) load_two(dys[s], at(dy + 8 * half, from, p.dy_l));
                    }
                    if (!SAME_TABLE) {
                        int to[STEPS];
                        load_positions(to, merge, t0, length);
#pragma unroll
                        for (int s = 0; s < STEPS; s++) {
                            load_two(dys[s], at(dy + 8 * half, max(to[s], 0), p.dy_l));
#pragma unroll
                            for (int e = 0; e < 2; e++) dys[s][e] = to[s] < 0 ? 0.0f : dys[s][e];
                        }
                    }
                    if (!whole) {
                        rarely();
#pragma unroll
                        for (int s = 0; s < STEPS; s++) {
                            if (pos[s] >= 0) continue;
                            xs[s] = 0u;
                            if (SAME_TABLE) dys[s][0] = dys[s][1] = 0.0f;
                        }
                    }
                    float B[STEPS], C[STEPS];
                    float delta[2 * MMA_ROWS][2];
                    {
                        unsigned row[STEPS][ROW_WORDS], weights[ROW_WORDS];
                        float bias[4];
                        staged.read(row);
                        constants.read(weights, bias, half);
                        project(delta, row, weights, bias);
                        if (D_STATE == 1) {
#pragma unroll
                            for (int s = 0; s < STEPS; s++) {
                                B[s] = broadcast<RANK>(row[s], lane_id);
                                C[s] = broadcast<RANK + 1>(row[s], lane_id);
                            }
                        }
                    }
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
#pragma unroll
                        for (int e = 0; e < 2; e++) delta[s][e] = softplus(delta[s][e]);
                    }
                    if (!whole) {
                        rarely();
#pragma unroll
                        for (int s = 0; s < STEPS; s++) {
#pragma unroll
                            for (int e = 0; e < 2; e++) delta[s][e] = t0 + s < length ? delta[s][e] : 0.0f;
                        }
                    }

                    float d_delta[STEPS][2], d_u[STEPS][2];  // u = delta x
                    float d_rate[2] = {0.0f, 0.0f};
#pragma unroll 1
                    for (int n = 0; n < D_STATE; n++) {
                        float rate[2];
#pragma unroll
                        for (int e = 0; e < 2; e++) rate[e] = ldg(A + (8 * half + e) * D_STATE + n);
                        if (D_STATE > 1) {
#pragma unroll
                            for (int s = 0; s < STEPS; s++) {
                                B[s] = staged.value(s, RANK + n), C[s] = staged.value(s, RANK + D_STATE + n);
                                d_B[s] = d_C[s] = 0.0f;
                            }
                        }
                        float q_after[2] = {0.0f, 0.0f}, h_before[2];
                        const long long i_n = (i_sequence * p.num_segments + i_segment) * D_STATE + n;
                        if (!SUMMARY) load_two(h_before, states + (long long)(tile * D_STATE + n) * p.dim + 8 * half);

                        // What the tile does to q, and of the decays, what it does to h.
                        float decay[STEPS][2];
                        Maps<2> back, map;
#pragma unroll
                        for (int s = STEPS - 1; s >= 0; s--) {
#pragma unroll
                            for (int e = 0; e < 2; e++) {
                                decay[s][e] = ex2(delta[s][e] * (rate[e] * LOG2E));
                                // a new sequence
                                if (SEQUENCES && (begin + t0 + s) % p.sequence == 0) decay[s][e] = 0.0f;
                                back.a[e] = s == STEPS - 1 ? decay[s][e] : back.a[e] * decay[s][e];
                                back.b[e] = s == STEPS - 1 ? C[s] * dys[s][e] : fmaf(C[s], dys[s][e], back.b[e]);
                                back.b[e] *= decay[s][e];
                            }
                        }
#pragma unroll
                        for (int e = 0; e < 2; e++) map.a[e] = back.a[e];
                        const Maps<2> total = back.scan<true>(lane);
                        if (p.warps > 1 && joins) {
                            bar_sync(1 + slot, 32 * p.warps);
                            joins = false;
                        }
                        if (turn > 0) {
                            mail.receive(q_after, 2 * n + half, lane.c, received);
                        } else if (p.segment_states != nullptr && !SUMMARY) {
                            set(q_after,
                                *reinterpret_cast<const float2*>(p.segment_states + i_n * p.dim + d + 8 * half));
                        }
                        if (lane.g == 0) {
                            float first[2];
#pragma unroll
                            for (int e = 0; e < 2; e++) first[e] = fmaf(total.a[e], q_after[e], total.b[e]);
                            if (turn + 1 < tiles) {
                                mail.send(first, 2 * n + half, lane.c);
                            } else if (SUMMARY) {
                                *reinterpret_cast<float2*>(p.segment_states + i_n * p.dim + d + 8 * half) = get(first);
                            }
                        }
                        if (SUMMARY) continue;
#pragma unroll
                        for (int e = 0; e < 2; e++) q_after[e] = fmaf(back.a[e], q_after[e], back.b[e]);

                        // The states before each step.
#pragma unroll
                        for (int s = 0; s < STEPS; s++) {
                            const float2 pair = unpack2<IO>(xs[s]);
#pragma unroll
                            for (int e = 0; e < 2; e++) {
                                const float input = delta[s][e] * (e == 0 ? pair.x : pair.y) * B[s];
                                map.b[e] = s == 0 ? input : fmaf(decay[s][e], map.b[e], input);
                            }
                        }
                        map.scan<false>(lane);
                        float decayed[STEPS][2];  // exp(delta_t A) h_{t-1}: the state without the step's own input
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            float h = fmaf(map.a[e], h_before[e], map.b[e]);
#pragma unroll
                            for (int s = 0; s < STEPS; s++) {
                                const float2 pair = unpack2<IO>(xs[s]);
                                decayed[s][e] = decay[s][e] * h;
                                h = fmaf(delta[s][e] * (e == 0 ? pair.x : pair.y), B[s], decayed[s][e]);
                                d_C[s] = fmaf(h, dys[s][e], d_C[s]);
                            }
                        }
                        d_rate[0] = d_rate[1] = 0.0f;
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            float after = q_after[e];
#pragma unroll
                            for (int s = STEPS - 1; s >= 0; s--) {
                                const float2 pair = unpack2<IO>(xs[s]);
                                const float g = fmaf(C[s], dys[s][e], after);
                                after = decay[s][e] * g;
                                d_B[s] = fmaf(g, delta[s][e] * (e == 0 ? pair.x : pair.y), d_B[s]);
                                d_u[s][e] = n == 0 ? g * B[s] : fmaf(g, B[s], d_u[s][e]);
                                const float d_log = g * decayed[s][e];  // dL/d(delta A)
                                d_delta[s][e] = n == 0 ? d_log * rate[e] : fmaf(d_log, rate[e], d_delta[s][e]);
                                d_rate[e] = fmaf(d_log, delta[s][e], d_rate[e]);
                            }
                        }
                        if (D_STATE > 1) {
#pragma unroll
                            for (int s = 0; s < STEPS; s++) {
                                float sum = sum_pair(d_B[s], d_C[s], lane);
                                if (lane.c % 2) continue;
                                float* first = kept + ((lane.g * STEPS + s) * 2 + lane.c / 2) * D_STATE + n;
                                if (half == 0) {
                                    *first = sum;
                                } else if (pos[s] >= 0) {
                                    IO* to = at(d_rows, pos[s], d_rows_l) + RANK + n + lane.c / 2 * D_STATE;
                                    store_global(to, from_float<IO>(*first + sum));
                                }
                            }
#pragma unroll
                            for (int e = 0; e < 2; e++) {
                                float sum = sum_groups(d_rate[e]);
                                if (lane.g == 0) part[(8 * half + 2 * lane.c + e) * PARAMS + RANK + n] += sum;
                            }
                        }
                    }
                    if (SUMMARY) {
#pragma unroll
                        for (int s = 0; s < STEPS; s++) {
#pragma unroll
                            for (int e = 0; e < 2; e++) {
                                delta_sum[0][e] += half == 0 ? delta[s][e] : 0.0f,
                                    delta_sum[1][e] += half == 1 ? delta[s][e] : 0.0f;
                            }
                        }
                        continue;
                    }

                    // dx, and what goes into the softplus
                    float d_x[STEPS][2], bias_sum[2] = {0.0f, 0.0f}, skip_sum[2] = {0.0f, 0.0f};
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
                        const float2 pair = unpack2<IO>(xs[s]);
                        float v[2];
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            d_x[s][e] = d_u[s][e] * delta[s][e];
                            v[e] =
                                fmaf(d_u[s][e], e == 0 ? pair.x : pair.y, d_delta[s][e]) * softplus_slope(delta[s][e]);
                            bias_sum[e] += v[e];
                        }
                        before[s] = d_raw[s];
                        d_raw[s] = pack2<IO>(v[0], v[1]);
                    }
                    if (skips) {
                        rarely();
                        float skip[2] = {0.0f, 0.0f};  // D, summed over the routes that are
                        for (int i = SKIP_ONCE ? 0 : k; i < (SKIP_ONCE ? p.num_routes : k + 1); i++) {
                            const float2 v = ldg(reinterpret_cast<const float2*>(p.D + i * p.dim + d + 8 * half));
                            skip[0] += v.x, skip[1] += v.y;
                        }
#pragma unroll
                        for (int s = 0; s < STEPS; s++) {
                            const float2 pair = unpack2<IO>(xs[s]);
#pragma unroll
                            for (int e = 0; e < 2; e++) {
                                d_x[s][e] = fmaf(skip[e], dys[s][e], d_x[s][e]);
                                skip_sum[e] = fmaf(e == 0 ? pair.x : pair.y, dys[s][e], skip_sum[e]);
                            }
                        }
                    }
#pragma unroll
                    for (int j = 0; j < 2; j++) {
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            d_A[j][e] += half == j ? d_rate[e] : 0.0f;
                            d_bias[j][e] += half == j ? bias_sum[e] : 0.0f;
                            d_D[j][e] += half == j ? skip_sum[e] : 0.0f;
                        }
                    }
                    if (SHARED_X && !starts) {
#pragma unroll
                        for (int s = 0; s < STEPS; s++) {
                            const int to = !whole ? max(pos[s], 0) : pos[s];
                            float2 v = SHARED_SUM ? shared_sum[4 * (half * p.positions + to)]
                                                  : load_global(at(global_sum + 4 * half, to, 4 * p.dim));
                            d_x[s][0] += v.x, d_x[s][1] += v.y;
                        }
                    }
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
                        if (pos[s] < 0) continue;
                        if (ends) {
                            store_global(reinterpret_cast<unsigned*>(at(dx + 8 * half, pos[s], p.dx_l)),
                                         pack2<IO>(d_x[s][0], d_x[s][1]));
                        } else if (SHARED_SUM) {
                            shared_sum[4 * (half * p.positions + pos[s])] = get(d_x[s]);
                        } else {
                            store_global(at(global_sum + 4 * half, pos[s], 4 * p.dim), get(d_x[s]));
                        }
                    }
                }
                if (turn > 0) received++;
                if (SUMMARY) {
                    __syncwarp();
                    fetch_rows(next, next_range);
                    continue;
                }

                if (D_STATE == 1) {
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
                        float sum = sum_pair(d_B[s], d_C[s], lane);
                        if (pos[s] >= 0 && lane.c % 2 == 0) {
                            store_global(at(d_rows, pos[s], d_rows_l) + RANK + lane.c / 2, from_float<IO>(sum));
                        }
                    }
                }
                // d_dt = d_raw . weight
#pragma unroll
                for (int i = 0; i < RANK_TILES; i++) {
                    const unsigned b[2] = {constants.word(Constants::TURNED + 2 * i),
                                           constants.word(Constants::TURNED + 2 * i + 1)};
#pragma unroll
                    for (int m = 0; m < MMA_ROWS; m++) {
                        const unsigned a[4] = {before[2 * m], before[2 * m + 1], d_raw[2 * m], d_raw[2 * m + 1]};
                        const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                        float v[4];
                        mma_k16<IO>(v, a, b, zero);
#pragma unroll
                        for (int row = 0; row < 2; row++) {
                            const int s = 2 * m + row, r = 8 * i + 2 * lane.c;
                            if (s >= STEPS || pos[s % STEPS] < 0) continue;
                            IO* to = at(d_rows, pos[s % STEPS], d_rows_l) + r;
                            if (RANK % 2 == 0 && WIDTH % 2 == 0) {
                                if (r < RANK)
                                    store_global(reinterpret_cast<unsigned*>(to),
                                                 pack2<IO>(v[2 * row], v[2 * row + 1]));
                            } else {
                                if (r < RANK) store_global(to, from_float<IO>(v[2 * row]));
                                if (r + 1 < RANK) store_global(to + 1, from_float<IO>(v[2 * row + 1]));
                            }
                        }
                    }
                }
                // d_weight += d_raw^T . dt
#pragma unroll
                for (int s = 0; s < STEPS; s += 2) {
                    const bool second = s + 1 < STEPS;
                    const unsigned a[4] = {transpose(before[s]), transpose(d_raw[s]),
                                           second ? transpose(before[s + 1]) : 0u,
                                           second ? transpose(d_raw[s + 1]) : 0u};
                    unsigned row[2][ROW_WORDS];
                    staged.read(row[0], s);
                    if (second) staged.read(row[1], s + 1);
#pragma unroll
                    for (int i = 0; i < ROW_WORDS; i++) {
                        if (column(0, i) >= RANK) continue;
                        const unsigned b[2] = {transpose(row[0][i]), second ? transpose(row[1][i]) : 0u};
                        mma_k16<IO>(d_weight[i], a, b, d_weight[i]);
                    }
                }
                __syncwarp();
                fetch_rows(next, next_range);
            }
        }
        if (p.warps > 1 && joins) bar_sync(1 + slot, 32 * p.warps);
        __syncwarp();

        if (SUMMARY) {
            // The lanes of a warp hold different steps, its warps different tiles.
            const long long i_deltas =
                (((long long)first_item * p.num_routes + k) * p.num_segments + i_segment) * p.warps + warp;
#pragma unroll
            for (int j = 0; j < 2; j++) {
#pragma unroll
                for (int e = 0; e < 2; e++) delta_sum[j][e] = sum_groups(delta_sum[j][e]);
                if (lane.g == 0)
                    *reinterpret_cast<float2*>(p.segment_deltas + i_deltas * p.dim + d + 8 * j) = get(delta_sum[j]);
            }
            continue;
        }
        // Gradients of the parameters, from this warp's steps.
#pragma unroll
        for (int i = 0; i < ROW_WORDS; i++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int r = column(lane.c, i) + e % 2;
                if (r < RANK) part[channel_of(e / 2, lane.g) * PARAMS + r] = d_weight[i][e];
            }
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float a = D_STATE == 1 ? sum_groups(d_A[j][e]) : 0.0f, b = sum_groups(d_bias[j][e]),
                      v = sum_groups(d_D[j][e]);
                float* of_channel = part + channel_of(j, 2 * lane.c + e) * PARAMS + RANK;
                if (lane.g == 0) {
                    if (D_STATE == 1) of_channel[0] = a;
                    of_channel[D_STATE] = b, of_channel[D_STATE + 1] = v;
                }
            }
        }
    }
}
