// Backward scan: all gradients, walking the tiles of every route from the last to the first, from the states that the
// forward scan kept at the start of each tile. Also defined by the launcher: DY (dtype of dy), MAX_WARPS (of a block),
// SHARED_X (one x for all routes, so that dx is a sum over them), and the accumulator of that sum: SHARED_SUM (a map in
// shared memory) or else float32 in global memory; SAME_TABLE, SKIP_ONCE, SEQUENCES and SUMMARY as in the
// forward scan.
//
// With g_t = dL/dh_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}, what a step hands back is q_t = exp(delta_t A) g_t.
#include "prelude.cuh"
#include "scan.cuh"

struct Params {
    const DY* dy;            // [B, L, D] or [B, L, K, D]
    const IO* x;             // [B, L, D] or [B, L, K, D]
    const IO* rows;          // [B, L, K, R + 2 N], dt | B | C
    const float* A;          // [K, D, N]
    const float* D;          // [K, D], or null
    const float* weight;     // [K, D, R]
    const float* bias;       // [K, D], or null
    const int* gather;       // [K, steps]
    const int* merge;        // [K, steps]
    const float* states;     // at the start of each tile [B, K, tiles, N, D]
    IO* dx;                  // as x
    float* sums;             // [B, L, D], without SHARED_SUM
    IO* d_rows;              // [channel blocks, B, L, K, R + 2 N]
    float* d_params;         // [blocks of the grid / channel blocks, units, W, K, D, weight (R) | A (N) | bias | D]
    float* segment_states;   // [B, K, segments, N, D], or null
    float* segment_deltas;   // [B, K, segments, W, D]
    long long dy_b, x_b, rows_b, dx_b;
    int dy_l, x_l, rows_l, dx_l;  // bytes; all others are elements
    int dy_k, x_k, rows_k, dx_k;
    int rows_width, positions, steps, sequence, dim, num_routes, batch;
    int blocks, warps, units, items;           // channel blocks, warps of a unit, units of a block, batch items of a unit
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

__device__ __forceinline__ void load_four(float (&v)[4], const float* p) { set(v, ldg(reinterpret_cast<const float4*>(p))); }
template <typename T>
__device__ __forceinline__ void load_four(float (&v)[4], const T* p) {
    uint2 w = ldg(reinterpret_cast<const uint2*>(p));
    float2 lo = unpack2<T>(w.x), hi = unpack2<T>(w.y);
    v[0] = lo.x, v[1] = lo.y, v[2] = hi.x, v[3] = hi.y;
}

// dt_weight of the unit's channels as the second operand of a product over channels.
struct TurnedWeights {
    unsigned b[RANK_TILES][2];

    __device__ __forceinline__ void load(const float* weight, Lane lane) {
#pragma unroll
        for (int i = 0; i < RANK_TILES; i++) {
            const int r = 8 * i + lane.g;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float* p = weight + channel_of(j, 2 * lane.c) * RANK + r;
                b[i][j] = r < RANK ? pack2<IO>(p[0], p[RANK]) : 0u;  // neighbouring channels
            }
        }
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
    const int d0 = block * CHANNELS, d = d0 + 4 * lane.c;

    // Shared memory: [rows of each warp | mailboxes | gradient of A, if D_STATE > 1 | sum over routes of each unit]
    const int all_warps = p.units * p.warps;
    constexpr int staged_size = 32 * STEPS * WORDS;
    const Rows staged = {reinterpret_cast<unsigned*>(memory) + id * staged_size, lane_id};
    unsigned char* mailboxes = memory + 4 * all_warps * staged_size;
    const int unit_mail = (Mail::SIZE * p.warps + 15) / 16 * 16;
    Mail mail(mailboxes + slot * unit_mail, warp, p.warps);
    mail.start(lane_id);
    unsigned received = 0;
    float* d_rates = reinterpret_cast<float*>(mailboxes + p.units * unit_mail) + id * CHANNELS * D_STATE;
    float4* maps = reinterpret_cast<float4*>(mailboxes + p.units * unit_mail) + (D_STATE > 1 ? 4 * D_STATE * all_warps : 0);
    __syncthreads();

    float skip[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // D, summed over the routes that are
    if (SKIP_ONCE && p.D != nullptr) {
        for (int k = 0; k < p.num_routes; k++) {
            float v[4];
            load_four(v, p.D + k * p.dim + d);
#pragma unroll
            for (int q = 0; q < 4; q++) skip[q] += v[q];
        }
    }

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
        const int k = range.k, i_segment = range.i_segment, begin = range.begin, length = range.length, tiles = range.tiles;
        const int all_tiles = (p.steps + TILE - 1) / TILE, first_tile = (begin + TILE - 1) / TILE;

        const int* merge = pinned(p.merge + (long long)k * p.steps + begin);
        const int d_rows_l = 2 * p.num_routes * WIDTH;
        const float* weight = p.weight + ((long long)k * p.dim + d0) * RANK;
        Weights weights;
        weights.load(weight, p.bias == nullptr ? nullptr : p.bias + k * p.dim + d, lane);
        TurnedWeights turned;
        if (!SUMMARY) turned.load(weight, lane);
        const float* A = p.A + ((long long)k * p.dim + d) * D_STATE;
        if (!SKIP_ONCE && p.D != nullptr) load_four(skip, p.D + k * p.dim + d);
        const bool starts = p.starts_sum && i_route == 0;
        const bool ends = !SHARED_X || (p.ends_sum && i_route == p.route_count - 1);
        const bool skips = p.D != nullptr && (!SKIP_ONCE || ends);

        float rate[4], d_A[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // for D_STATE 1
        if (D_STATE == 1) load_four(rate, A);
        float d_bias[4] = {0.0f, 0.0f, 0.0f, 0.0f}, d_D[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        float delta_sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        float d_weight[ROW_WORDS][4];
#pragma unroll
        for (int i = 0; i < ROW_WORDS; i++) {
#pragma unroll
            for (int e = 0; e < 4; e++) d_weight[i][e] = 0.0f;
        }
        // Before the first state is handed on, all warps of the unit must have done with the route before.
        bool joins = i_route > 0;
        if (D_STATE > 1) {
            for (int i = lane_id; i < CHANNELS * D_STATE; i += 32) d_rates[i] = 0.0f;
            __syncwarp();
        }

        for (int item = 0; item < items; item++) {
            const long long batch = first_item + item, i_sequence = batch * p.num_routes + k;
            float4* shared_sum = maps + (long long)(slot * p.items + item) * 4 * p.positions + lane.c;  // + 4 position
            float4* global_sum = pinned(reinterpret_cast<float4*>(p.sums + batch * p.positions * p.dim + d));
            const DY* dy = pinned(p.dy + batch * p.dy_b + (long long)k * p.dy_k + d);
            const IO* x = pinned(p.x + batch * p.x_b + (long long)k * p.x_k + d);
            IO* dx = pinned(p.dx + batch * p.dx_b + (long long)k * p.dx_k + d);
            IO* d_rows = pinned(p.d_rows + ((block * (long long)p.batch + batch) * p.positions * p.num_routes + k) * WIDTH);
            const float* states = p.states + (i_sequence * all_tiles + first_tile) * D_STATE * p.dim + d;

            for (int turn = warp; turn < tiles; turn += p.warps) {
                const int tile = tiles - 1 - turn;
                const int t0 = tile * TILE + lane.g * STEPS;  // of the segment
                const bool whole = (tile + 1) * TILE <= length;
                int pos[STEPS];
#pragma unroll
                for (int s = 0; s < STEPS; s++) pos[s] = next_pos[s];
                uint2 xs[STEPS];
                float dys[STEPS][4];
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    const int from = !whole ? max(pos[s], 0) : pos[s];
                    xs[s] = ldg(reinterpret_cast<const uint2*>(at(x, from, p.x_l)));
                    if (SAME_TABLE) load_four(dys[s], at(dy, from, p.dy_l));
                }
                const Place next = Place{i_route, item, turn}.next(p, items, tiles, warp);
                const Range next_range = next.exists(p) && next.i_route != i_route ? Range(p, next.i_route, segment) : range;
                fetch_positions(next, next_range);
                unsigned row[STEPS][ROW_WORDS];
                cp_async_wait<0>();
                if (D_STATE > 1) __syncwarp();
                staged.read(row);
                if (!SAME_TABLE) {
                    int to[STEPS];
                    load_positions(to, merge, t0, length);
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
                        load_four(dys[s], at(dy, max(to[s], 0), p.dy_l));
#pragma unroll
                        for (int q = 0; q < 4; q++) dys[s][q] = to[s] < 0 ? 0.0f : dys[s][q];
                    }
                }
                if (!whole) {
                    rarely();
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
                        if (pos[s] >= 0) continue;
                        xs[s] = make_uint2(0u, 0u);
                        if (SAME_TABLE) {
#pragma unroll
                            for (int q = 0; q < 4; q++) dys[s][q] = 0.0f;
                        }
                    }
                }
                float delta[2 * MMA_ROWS][4];
                project(delta, row, weights);
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
#pragma unroll
                    for (int q = 0; q < 4; q++) delta[s][q] = softplus(delta[s][q]);
                }
                if (!whole) {
                    rarely();
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
#pragma unroll
                        for (int q = 0; q < 4; q++) delta[s][q] = t0 + s < length ? delta[s][q] : 0.0f;
                    }
                }
                if (SUMMARY) {
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
#pragma unroll
                        for (int q = 0; q < 4; q++) delta_sum[q] += delta[s][q];
                    }
                }

                float d_delta[STEPS][4], d_u[STEPS][4];  // u = delta x
#pragma unroll 1
                for (int n = 0; n < D_STATE; n++) {
                    float B[STEPS], C[STEPS], d_B[STEPS], d_C[STEPS];
                    if (D_STATE > 1) {
#pragma unroll
                        for (int q = 0; q < 4; q++) rate[q] = ldg(A + q * D_STATE + n);
                    }
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
                        if (D_STATE == 1) {
                            B[s] = broadcast<RANK>(row[s], lane_id);
                            C[s] = broadcast<RANK + 1>(row[s], lane_id);
                        } else {
                            B[s] = staged.value(s, RANK + n);
                            C[s] = staged.value(s, RANK + D_STATE + n);
                        }
                        d_B[s] = d_C[s] = 0.0f;
                    }
                    if (D_STATE == 1 && ROW_WORDS <= 2) fetch_rows(next, next_range);
                    float q_after[4] = {0.0f, 0.0f, 0.0f, 0.0f}, h_before[4];
                    const long long i_n = (i_sequence * p.num_segments + i_segment) * D_STATE + n;
                    if (!SUMMARY) load_four(h_before, states + (long long)(tile * D_STATE + n) * p.dim);

                    // What the tile does to q.
                    float decay[STEPS][4];
                    Maps back;
#pragma unroll
                    for (int s = STEPS - 1; s >= 0; s--) {
#pragma unroll
                        for (int q = 0; q < 4; q++) {
                            decay[s][q] = ex2(delta[s][q] * (rate[q] * LOG2E));
                            if (SEQUENCES && (begin + t0 + s) % p.sequence == 0) decay[s][q] = 0.0f;  // a new sequence
                            back.a[q] = s == STEPS - 1 ? decay[s][q] : back.a[q] * decay[s][q];
                            back.b[q] = s == STEPS - 1 ? C[s] * dys[s][q] : fmaf(C[s], dys[s][q], back.b[q]);
                            back.b[q] *= decay[s][q];
                        }
                    }
                    Maps map;  // what it does to h; of the decays both need the product
#pragma unroll
                    for (int q = 0; q < 4; q++) map.a[q] = back.a[q];
                    const Maps total = back.scan<true>(lane);
                    if (p.warps > 1 && joins) {
                        bar_sync(1 + slot, 32 * p.warps);
                        joins = false;
                    }
                    if (turn > 0) {
                        mail.receive(q_after, n, lane.c, received);
                    } else if (p.segment_states != nullptr && !SUMMARY) {
                        set(q_after, *reinterpret_cast<const float4*>(p.segment_states + i_n * p.dim + d));
                    }
                    if (lane.g == 0) {
                        float before[4];
#pragma unroll
                        for (int q = 0; q < 4; q++) before[q] = fmaf(total.a[q], q_after[q], total.b[q]);
                        if (turn + 1 < tiles) {
                            mail.send(before, n, lane.c);
                        } else if (SUMMARY) {
                            *reinterpret_cast<float4*>(p.segment_states + i_n * p.dim + d) = get(before);
                        }
                    }
                    if (SUMMARY) continue;
#pragma unroll
                    for (int q = 0; q < 4; q++) q_after[q] = fmaf(back.a[q], q_after[q], back.b[q]);

                    // The states before each step.
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
                        float2 lo = unpack2<IO>(xs[s].x), hi = unpack2<IO>(xs[s].y);
                        const float x4[4] = {lo.x, lo.y, hi.x, hi.y};
#pragma unroll
                        for (int q = 0; q < 4; q++) {
                            float input = delta[s][q] * x4[q] * B[s];
                            map.b[q] = s == 0 ? input : fmaf(decay[s][q], map.b[q], input);
                        }
                    }
                    map.scan<false>(lane);
                    float d_rate[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        float decayed[STEPS][2];  // exp(delta_t A) h_{t-1}: the state without the step's own input
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            const int q = 2 * j + e;
                            float h = fmaf(map.a[q], h_before[q], map.b[q]);
#pragma unroll
                            for (int s = 0; s < STEPS; s++) {
                                float2 pair = unpack2<IO>(j == 0 ? xs[s].x : xs[s].y);
                                decayed[s][e] = decay[s][q] * h;
                                h = fmaf(delta[s][q] * (e == 0 ? pair.x : pair.y), B[s], decayed[s][e]);
                                d_C[s] = fmaf(h, dys[s][q], d_C[s]);
                            }
                            float after = q_after[q];
#pragma unroll
                            for (int s = STEPS - 1; s >= 0; s--) {
                                float2 pair = unpack2<IO>(j == 0 ? xs[s].x : xs[s].y);
                                float g = fmaf(C[s], dys[s][q], after);
                                after = decay[s][q] * g;
                                d_B[s] = fmaf(g, delta[s][q] * (e == 0 ? pair.x : pair.y), d_B[s]);
                                d_u[s][q] = n == 0 ? g * B[s] : fmaf(g, B[s], d_u[s][q]);
                                float d_log = g * decayed[s][e];  // dL/d(delta A)
                                d_delta[s][q] = n == 0 ? d_log * rate[q] : fmaf(d_log, rate[q], d_delta[s][q]);
                                d_rate[q] = fmaf(d_log, delta[s][q], d_rate[q]);
                            }
                        }
                    }
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
                        float sum = sum_pair(d_B[s], d_C[s], lane);
                        if (pos[s] >= 0 && lane.c % 2 == 0) {
                            store_global(at(d_rows, pos[s], d_rows_l) + RANK + n + (lane.c == 0 ? 0 : D_STATE), from_float<IO>(sum));
                        }
                    }
                    if (D_STATE == 1) {
#pragma unroll
                        for (int q = 0; q < 4; q++) d_A[q] += d_rate[q];
                    } else {
#pragma unroll
                        for (int q = 0; q < 4; q++) {
                            float sum = sum_groups(d_rate[q]);
                            if (lane.g == 0) d_rates[(4 * lane.c + q) * D_STATE + n] += sum;
                        }
                    }
                }
                if (turn > 0) received++;
                if (SUMMARY) {
                    if (D_STATE > 1 || ROW_WORDS > 2) {
                        __syncwarp();
                        fetch_rows(next, next_range);
                    }
                    continue;
                }

                unsigned d_raw[STEPS + 1][2];  // before the softplus, packed
                float d_x[STEPS][4];
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    float2 lo = unpack2<IO>(xs[s].x), hi = unpack2<IO>(xs[s].y);
                    const float x4[4] = {lo.x, lo.y, hi.x, hi.y};
                    float v[4];
#pragma unroll
                    for (int q = 0; q < 4; q++) {
                        d_x[s][q] = d_u[s][q] * delta[s][q];
                        v[q] = fmaf(d_u[s][q], x4[q], d_delta[s][q]) * softplus_slope(delta[s][q]);
                        d_bias[q] += v[q];
                    }
                    d_raw[s][0] = pack2<IO>(v[0], v[1]), d_raw[s][1] = pack2<IO>(v[2], v[3]);
                }
                d_raw[STEPS][0] = d_raw[STEPS][1] = 0u;
                if (skips) {
                    rarely();
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
                        float2 lo = unpack2<IO>(xs[s].x), hi = unpack2<IO>(xs[s].y);
                        const float x4[4] = {lo.x, lo.y, hi.x, hi.y};
#pragma unroll
                        for (int q = 0; q < 4; q++) {
                            d_x[s][q] = fmaf(skip[q], dys[s][q], d_x[s][q]);
                            d_D[q] = fmaf(x4[q], dys[s][q], d_D[q]);
                        }
                    }
                }

                // d_dt = d_raw . weight
#pragma unroll
                for (int m = 0; m < MMA_ROWS; m++) {
                    const unsigned a[4] = {d_raw[2 * m][0], d_raw[2 * m + 1][0], d_raw[2 * m][1], d_raw[2 * m + 1][1]};
#pragma unroll
                    for (int i = 0; i < RANK_TILES; i++) {
                        const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                        float v[4];
                        mma_k16<IO>(v, a, turned.b[i], zero);
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            const int s = 2 * m + half, r = 8 * i + 2 * lane.c;
                            if (s >= STEPS || pos[s % STEPS] < 0) continue;
                            IO* to = at(d_rows, pos[s % STEPS], d_rows_l) + r;
                            if (RANK % 2 == 0 && WIDTH % 2 == 0) {
                                if (r < RANK) store_global(reinterpret_cast<unsigned*>(to), pack2<IO>(v[2 * half], v[2 * half + 1]));
                            } else {
                                if (r < RANK) store_global(to, from_float<IO>(v[2 * half]));
                                if (r + 1 < RANK) store_global(to + 1, from_float<IO>(v[2 * half + 1]));
                            }
                        }
                    }
                }
                // d_weight += d_raw^T . dt
#pragma unroll
                for (int s = 0; s < STEPS; s += 2) {
                    const bool second = s + 1 < STEPS;
                    if (ROW_WORDS > 2) {  // long rows were not kept in registers
                        staged.read(row[s], s);
                        if (second) staged.read(row[(s + 1) % STEPS], s + 1);
                    }
                    const unsigned a[4] = {transpose(d_raw[s][0]), transpose(d_raw[s][1]),
                                           second ? transpose(d_raw[s + 1][0]) : 0u, second ? transpose(d_raw[s + 1][1]) : 0u};
#pragma unroll
                    for (int i = 0; i < ROW_WORDS; i++) {
                        if (column(0, i) >= RANK) continue;
                        const unsigned b[2] = {transpose(row[s][i]), second ? transpose(row[(s + 1) % STEPS][i]) : 0u};
                        mma_k16<IO>(d_weight[i], a, b, d_weight[i]);
                    }
                }

                if (D_STATE > 1 || ROW_WORDS > 2) {
                    __syncwarp();
                    fetch_rows(next, next_range);
                }

                // dx
                if (SHARED_X && !starts) {
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
                        const int to = !whole ? max(pos[s], 0) : pos[s];
                        float4 v = SHARED_SUM ? shared_sum[4 * to] : load_global(at(global_sum, to, 4 * p.dim));
                        d_x[s][0] += v.x, d_x[s][1] += v.y, d_x[s][2] += v.z, d_x[s][3] += v.w;
                    }
                }
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    if (pos[s] < 0) continue;
                    if (ends) {
                        store_global(reinterpret_cast<uint2*>(at(dx, pos[s], p.dx_l)),
                                     make_uint2(pack2<IO>(d_x[s][0], d_x[s][1]), pack2<IO>(d_x[s][2], d_x[s][3])));
                    } else if (SHARED_SUM) {
                        shared_sum[4 * pos[s]] = get(d_x[s]);
                    } else {
                        store_global(at(global_sum, pos[s], 4 * p.dim), get(d_x[s]));
                    }
                }
            }
        }

        if (p.warps > 1 && joins) bar_sync(1 + slot, 32 * p.warps);
        __syncwarp();

        if (SUMMARY) {
            // The lanes of a warp hold different steps, its warps different tiles.
            const long long i_part = (((long long)first_item * p.num_routes + k) * p.num_segments + i_segment) * p.warps + warp;
#pragma unroll
            for (int q = 0; q < 4; q++) delta_sum[q] = sum_groups(delta_sum[q]);
            if (lane.g == 0) *reinterpret_cast<float4*>(p.segment_deltas + i_part * p.dim + d) = get(delta_sum);
            continue;
        }

        // Gradients of the parameters, from this warp's steps.
        const long long i_part = ((long long)blockIdx.x / p.blocks * p.units + slot) * p.warps + warp;
        float* part = p.d_params + ((i_part * p.num_routes + k) * p.dim + d0) * PARAMS;
#pragma unroll
        for (int i = 0; i < ROW_WORDS; i++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int r = column(lane.c, i) + e % 2;
                if (r < RANK) part[channel_of(e / 2, lane.g) * PARAMS + r] = d_weight[i][e];
            }
        }
#pragma unroll
        for (int q = 0; q < 4; q++) {
            float a = D_STATE == 1 ? sum_groups(d_A[q]) : 0.0f, b = sum_groups(d_bias[q]), v = sum_groups(d_D[q]);
            float* of_channel = part + (4 * lane.c + q) * PARAMS + RANK;
            if (lane.g == 0) {
                if (D_STATE == 1) of_channel[0] = a;
                of_channel[D_STATE] = b, of_channel[D_STATE + 1] = v;
            }
        }
        if (D_STATE > 1) {
            for (int i = lane_id; i < CHANNELS * D_STATE; i += 32) {
                part[i / D_STATE * PARAMS + RANK + i % D_STATE] = d_rates[i];
            }
            __syncwarp();
        }
    }
}
