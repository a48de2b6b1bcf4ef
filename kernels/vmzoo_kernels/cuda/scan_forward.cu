// Forward scan. Also defined by the launcher: OUT (dtype of y), MAX_WARPS (of a block), REDUCE (sum over routes), and
// the accumulator of that sum: SHARED_SUM (a map in shared memory) or else float32 in global memory; SAME_TABLE (what
// comes out goes where it came from), SKIP_ONCE (the D of all routes times the same x), SEQUENCES (a route is several
// sequences), SUMMARY (only what a segment does to the state).
#include "prelude.cuh"
#define HALVES 0
#include "scan.cuh"

struct Params {
    const IO* x;            // [B, L, D] or [B, L, K, D]
    const IO* rows;         // [B, L, K, R + 2 N], dt | B | C
    const float* A;         // [K, D, N]
    const float* D;         // [K, D], or null
    const float* weight;    // [K, D, R]
    const float* bias;      // [K, D], or null
    const int* gather;      // [K, steps]
    const int* merge;       // [K, steps]
    OUT* y;                 // [B, L, D], or [B, L, K, D] without REDUCE
    float* sums;            // [B, L, D], without SHARED_SUM
    float* states;          // at the start of each tile [B, K, tiles, N, D], or null
    float* last;            // [B, K, D, N], or null
    float* segment_states;  // [B, K, segments, N, D], or null
    float* segment_deltas;  // [B, K, segments, W, D]
    long long x_b, rows_b, y_b;
    int x_l, rows_l, y_l;  // bytes; all others are elements
    int x_k, rows_k, y_k;
    int rows_width, positions, steps, sequence, dim, num_routes, batch;
    int blocks, warps, units, items;  // channel blocks, warps of a unit, units of a block, items of a unit
    int segment_steps, num_segments;
    int first_route, route_step, route_count;  // routes of this launch
    int mirrored;                              // every other of these routes walks the segment backwards
    int starts_sum, ends_sum;                  // whether the sum begins, ends with this launch
};

using Mailboxes = Mail<D_STATE, float4>;

// Four neighbouring channels.
template <typename T>
__device__ __forceinline__ void store4(T* p, const float (&v)[4]) {
    store_global(reinterpret_cast<uint2*>(p), make_uint2(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3])));
}
template <>
__device__ __forceinline__ void store4<float>(float* p, const float (&v)[4]) {
    store_global(reinterpret_cast<float4*>(p), get(v));
}

extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS, 1) scan_forward(const __grid_constant__ Params p) {
    DYNAMIC_SHARED(memory);
    const Lane lane;
    const int id = threadIdx.x >> 5, lane_id = threadIdx.x & 31;
    const int slot = id / p.warps, warp = id % p.warps;
    const int block = blockIdx.x % p.blocks, segment = blockIdx.x / p.blocks % p.num_segments;
    const int group = blockIdx.x / p.blocks / p.num_segments;
    const int first_item = (group * p.units + slot) * p.items, items = min(p.items, p.batch - first_item);
    if (items <= 0) return;
    const int d0 = block * CHANNELS, d = d0 + 4 * lane.c;

    // Shared memory of the unit: [rows | mailboxes | sum over routes [L, 16]]
    const int staged_size = 8 * STEPS * WORDS, mailboxes = Mailboxes::SIZE * p.warps / 16 + 1;
    const int unit_size = staged_size * p.warps + mailboxes + (REDUCE && SHARED_SUM ? 4 * p.positions * p.items : 0);
    float4* shared = reinterpret_cast<float4*>(memory) + slot * unit_size;
    const Rows staged = {reinterpret_cast<unsigned*>(shared + warp * staged_size), lane_id};
    shared += staged_size * p.warps;
    Mailboxes mail(shared, warp, p.warps);
    mail.start(lane_id);
    unsigned received = 0;
    __syncwarp();
    if (p.warps > 1) bar_sync(1 + slot, 32 * p.warps);

    float skip[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // D, summed over the routes that are
    if (SKIP_ONCE && p.D != nullptr) {
        for (int k = 0; k < p.num_routes; k++) {
            float v[4];
            set(v, *reinterpret_cast<const float4*>(p.D + k * p.dim + d));
#pragma unroll
            for (int q = 0; q < 4; q++) skip[q] += v[q];
        }
    }

    // Rows of the next tile are fetched while this one is worked at, their positions still earlier.
    int next_pos[STEPS];
    auto fetch_positions = [&](Place place, const Range& range) {
        if (!place.exists(p)) return;
        const int tile = place.turn;
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
        Weights weights;
        weights.load(p.weight + ((long long)k * p.dim + d0) * RANK,
                     p.bias == nullptr ? nullptr : p.bias + k * p.dim + d0, lane);
        float decay_rate[4];
        const float* A = p.A + ((long long)k * p.dim + d) * D_STATE;
        if (D_STATE == 1) {
            set(decay_rate, *reinterpret_cast<const float4*>(A));
#pragma unroll
            for (int q = 0; q < 4; q++) decay_rate[q] *= LOG2E;
        }
        if (!SKIP_ONCE && p.D != nullptr) set(skip, *reinterpret_cast<const float4*>(p.D + k * p.dim + d));
        const bool starts = p.starts_sum && i_route == 0;
        const bool ends = !REDUCE || (p.ends_sum && i_route == p.route_count - 1);
        float delta_sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        // Before the first state is handed on, all warps of the unit must have done with the route before.
        bool joins = i_route > 0;

        for (int item = 0; item < items; item++) {
            const long long batch = first_item + item, i_sequence = batch * p.num_routes + k;
            float4* shared_sum = shared + mailboxes + item * 4 * p.positions + lane.c;  // + 4 position
            float4* global_sum = pinned(reinterpret_cast<float4*>(p.sums + batch * p.positions * p.dim + d));
            const IO* x = pinned(p.x + batch * p.x_b + (long long)k * p.x_k + d);
            OUT* y = pinned(p.y + batch * p.y_b + (REDUCE ? 0 : (long long)k * p.y_k) + d);
            float* states = p.states + (i_sequence * all_tiles + first_tile) * D_STATE * p.dim + d;

            for (int tile = warp; tile < tiles; tile += p.warps) {
                const int t0 = tile * TILE + lane.g * STEPS;  // of the segment
                const bool whole = (tile + 1) * TILE <= length;
                int pos[STEPS];
#pragma unroll
                for (int s = 0; s < STEPS; s++) pos[s] = next_pos[s];
                uint2 xs[STEPS];
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    const int from = !whole ? max(pos[s], 0) : pos[s];
                    xs[s] = ldg(reinterpret_cast<const uint2*>(at(x, from, p.x_l)));
                }
                const Place next = Place{i_route, item, tile}.next(p, items, tiles, warp);
                const Range next_range =
                    next.exists(p) && next.i_route != i_route ? Range(p, next.i_route, segment) : range;
                fetch_positions(next, next_range);
                unsigned row[STEPS][ROW_WORDS];
                cp_async_wait<0>();
                if (D_STATE > 1) __syncwarp();
                staged.read(row);
                if (!whole) {
                    rarely();
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
                        if (pos[s] >= 0) continue;
                        xs[s] = make_uint2(0u, 0u);
                    }
                }
                float delta[2 * MMA_ROWS][4];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float raw[2 * MMA_ROWS][2];
                    project(raw, row, weights.b[j], weights.bias[j]);
#pragma unroll
                    for (int s = 0; s < 2 * MMA_ROWS; s++) delta[s][2 * j] = raw[s][0], delta[s][2 * j + 1] = raw[s][1];
                }
                float u[STEPS][4];  // delta x
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    float2 lo = unpack2<IO>(xs[s].x), hi = unpack2<IO>(xs[s].y);
                    const float x4[4] = {lo.x, lo.y, hi.x, hi.y};
#pragma unroll
                    for (int q = 0; q < 4; q++) {
                        delta[s][q] = softplus(delta[s][q]);
                        u[s][q] = delta[s][q] * x4[q];
                    }
                }
                if (!whole) {  // a step past the end leaves the state alone
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
                float out[STEPS][4];
#pragma unroll 1
                for (int n = 0; n < D_STATE; n++) {
                    float decay[STEPS][4], C[STEPS], B_kept[STEPS];
                    Maps<4> map;
                    if (D_STATE > 1) {
#pragma unroll
                        for (int q = 0; q < 4; q++) decay_rate[q] = A[q * D_STATE + n] * LOG2E;
                    }
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
                        float B;
                        if (D_STATE == 1) {
                            B = broadcast<RANK>(row[s], lane_id);
                            C[s] = broadcast<RANK + 1>(row[s], lane_id);
                        } else {
                            B = staged.value(s, RANK + n);
                            C[s] = staged.value(s, RANK + D_STATE + n);
                        }
#pragma unroll
                        for (int q = 0; q < 4; q++) {
                            decay[s][q] = ex2(delta[s][q] * decay_rate[q]);
                            if (SEQUENCES && (begin + t0 + s) % p.sequence == 0) decay[s][q] = 0.0f;  // a new sequence
                            float input = u[s][q] * B;
                            if (D_STATE == 1) u[s][q] = input;
                            map.a[q] = s == 0 ? decay[s][q] : map.a[q] * decay[s][q];
                            map.b[q] = s == 0 ? input : fmaf(decay[s][q], map.b[q], input);
                        }
                        if (D_STATE > 1) B_kept[s] = B;
                    }
                    if (D_STATE == 1) fetch_rows(next, next_range);
                    const Maps<4> total = map.scan<false>(lane);
                    float h[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                    const long long i_n = (i_sequence * p.num_segments + i_segment) * D_STATE + n;
                    if (p.warps > 1 && joins) {
                        bar_sync(1 + slot, 32 * p.warps);
                        joins = false;
                    }
                    if (tile > 0) {
                        mail.receive(h, n, lane.c, received);
                    } else if (p.segment_states != nullptr && !SUMMARY) {
                        set(h, *reinterpret_cast<const float4*>(p.segment_states + i_n * p.dim + d));
                    }
                    if (p.states != nullptr && lane.g == 0 && !SUMMARY) {
                        *reinterpret_cast<float4*>(states + (long long)(tile * D_STATE + n) * p.dim) = get(h);
                    }
                    float after[4];
#pragma unroll
                    for (int q = 0; q < 4; q++) {
                        after[q] = fmaf(total.a[q], h[q], total.b[q]);
                        h[q] = fmaf(map.a[q], h[q], map.b[q]);
                    }
                    if (lane.g == GROUPS - 1) {
                        if (tile + 1 < tiles) {
                            mail.send(after, n, lane.c);
                        } else if (SUMMARY) {
                            *reinterpret_cast<float4*>(p.segment_states + i_n * p.dim + d) = get(after);
                        } else if (p.last != nullptr && i_segment == p.num_segments - 1) {
#pragma unroll
                            for (int q = 0; q < 4; q++) p.last[(i_sequence * p.dim + d + q) * D_STATE + n] = after[q];
                        }
                    }
                    if (SUMMARY) continue;
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
#pragma unroll
                        for (int q = 0; q < 4; q++) {
                            float input = D_STATE == 1 ? u[s][q] : u[s][q] * B_kept[s];
                            h[q] = fmaf(decay[s][q], h[q], input);
                            out[s][q] = n == 0 ? C[s] * h[q] : fmaf(C[s], h[q], out[s][q]);
                        }
                    }
                }
                if (tile > 0) received++;
                if (D_STATE > 1) {
                    __syncwarp();
                    fetch_rows(next, next_range);
                }
                if (SUMMARY) continue;
                if (!SAME_TABLE) {
                    load_positions(pos, merge, t0, length);
                }
                if (p.D != nullptr && (!SKIP_ONCE || ends)) {
                    if (SKIP_ONCE) {  // no register held them until here
#pragma unroll
                        for (int s = 0; s < STEPS; s++) {
                            xs[s] = ldg(reinterpret_cast<const uint2*>(at(x, max(pos[s], 0), p.x_l)));
                        }
                    }
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
                        float2 lo = unpack2<IO>(xs[s].x), hi = unpack2<IO>(xs[s].y);
                        out[s][0] = fmaf(skip[0], lo.x, out[s][0]), out[s][1] = fmaf(skip[1], lo.y, out[s][1]);
                        out[s][2] = fmaf(skip[2], hi.x, out[s][2]), out[s][3] = fmaf(skip[3], hi.y, out[s][3]);
                    }
                }
                if (REDUCE && !starts) {
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
                        const int to = !whole ? max(pos[s], 0) : pos[s];
                        float4 v = SHARED_SUM ? shared_sum[4 * to] : load_global(at(global_sum, to, 4 * p.dim));
                        out[s][0] += v.x, out[s][1] += v.y, out[s][2] += v.z, out[s][3] += v.w;
                    }
                }
                if (ends) {
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
                        if (pos[s] >= 0) store4<OUT>(at(y, pos[s], p.y_l), out[s]);
                    }
                } else {
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
                        if (SHARED_SUM) {
                            if (pos[s] >= 0) shared_sum[4 * pos[s]] = get(out[s]);
                        } else {
                            if (pos[s] >= 0) store_global(at(global_sum, pos[s], 4 * p.dim), get(out[s]));
                        }
                    }
                }
            }
        }
        if (p.warps > 1 && joins) bar_sync(1 + slot, 32 * p.warps);
        __syncwarp();
        if (SUMMARY) {
            // The lanes of a warp hold different steps, its warps different tiles.
            const long long i_part =
                (((long long)first_item * p.num_routes + k) * p.num_segments + i_segment) * p.warps + warp;
#pragma unroll
            for (int q = 0; q < 4; q++) delta_sum[q] = sum_groups(delta_sum[q]);
            if (lane.g == 0) *reinterpret_cast<float4*>(p.segment_deltas + i_part * p.dim + d) = get(delta_sum);
        }
    }
}
