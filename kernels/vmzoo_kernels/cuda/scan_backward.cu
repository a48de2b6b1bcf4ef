// Backward scan: all gradients, walking the tiles of a segment from the last to the first, each from the state that the
// forward scan kept at its start. Also defined by the launcher: DY (dtype of dy).
//
// With g_t = dL/dh_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}, what a step hands back is q_t = exp(delta_t A) g_t.
#include "prelude.cuh"
#include "scan.cuh"

struct Params {
    Scan scan;
    const DY* dy;         // [B, L, D] or [B, L, K, D]
    const float* states;  // at the start of each tile [B, K, tiles, N, D]
    IO* dx;               // [B, L, K, D], or [B, L, D]
    IO* d_rows;           // [channel blocks, B, L, K, PART]
    float* d_params;      // [parts, K, D, weight (R) | A (N) | bias | D]
    long long dy_b, dx_b;
    int dy_l, dy_k, dx_l, dx_k;  // .._l are bytes
};

constexpr int PARAMS = RANK + D_STATE + 2;              // gradients of a channel's parameters
constexpr int PART = (RANK + 1) / 2 * 2 + 2 * D_STATE;  // columns of a part of d_rows: dt, then B and C of each state
template <typename T>
constexpr unsigned one = 0x3c00u;
template <>
constexpr unsigned one<bfloat_t> = 0x3f80u;
constexpr unsigned ONE = one<IO>;

// Operands of products, in rows of halves with an odd pitch in chunks of 16 bytes: dL/d(what goes into the softplus)
// [32 channels, STEPS], and of one state [STEPS, 32 channels, (d_B, d_C)].
constexpr int RAW_PITCH = STEPS / 8 + 1, PAIR_PITCH = CHANNELS / 4 + 1;
constexpr int RAW_SIZE = CHANNELS * RAW_PITCH, PAIRS_SIZE = STEPS * PAIR_PITCH;  // chunks
constexpr int PRODUCT_SIZE = 16 * (RAW_SIZE + PAIRS_SIZE);
static_assert(PRODUCT_SIZE >= EXCHANGE_SIZE, "step sizes lie where the products will");
// dt_weight turned [R, 32 channels]
constexpr int TURNED_PITCH = CHANNELS / 8 + 1, TURNED_SIZE = 16 * 8 * RANK_CHUNKS * TURNED_PITCH;

// Shared memory of a warp, in bytes: [slots of x, dy and rows | B, C | step sizes, or products | dt_weight | states,
// their sums, A]
constexpr int SLOT_SIZE = TILE_SIZE<IO> + TILE_SIZE<DY> + ROWS_SIZE;
constexpr int WARP_SIZE = SLOTS * SLOT_SIZE + INPUTS_SIZE + PRODUCT_SIZE + TURNED_SIZE + 3 * STATES_SIZE;

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) scan_backward(const __grid_constant__ Params params) {
    DYNAMIC_SHARED(memory);
    const Scan& p = params.scan;
    const int lane = threadIdx.x & 31;
    const Task task(p);
    if (task.items <= 0) return;
    if (SUMMARY && task.segment == 0) return;  // nothing starts from its end
    const int d0 = task.block * CHANNELS, channels = min(p.dim - d0, CHANNELS), d = d0 + lane;
    const bool there = lane < channels;
    const int k = task.k;

    const int begin = (threadIdx.x >> 5) * WARP_SIZE, begin_inputs = begin + SLOTS * SLOT_SIZE;
    unsigned char *slots = memory + begin, *products = memory + begin_inputs + INPUTS_SIZE;
    const Inputs inputs(reinterpret_cast<float*>(memory + begin_inputs), lane);
    const Exchange exchange(memory, begin_inputs + INPUTS_SIZE, lane);
    uint4 *raws = reinterpret_cast<uint4*>(products), *pairs = raws + RAW_SIZE;
    uint4* turned = reinterpret_cast<uint4*>(products + PRODUCT_SIZE);
    States q = {0.0f, reinterpret_cast<float*>(products + PRODUCT_SIZE + TURNED_SIZE)};
    States d_A = {0.0f, q.memory + STATES_SIZE / 4}, rates = {0.0f, d_A.memory + STATES_SIZE / 4};

    const float* weight = p.weight + (k * p.dim + d0) * RANK;
    Weights weights;
    weights.load(weight, p.bias == nullptr ? nullptr : p.bias + k * p.dim + d0, channels, lane);
    for (int r = 0; r < 8 * RANK_CHUNKS; r++) {
        const float v = there && r < RANK ? ldg(weight + lane * RANK + r) : 0.0f;
        reinterpret_cast<IO*>(turned + r * TURNED_PITCH)[lane] = from_float<IO>(v);
    }
    for (int n = 0; n < D_STATE; n++) {
        d_A.set(n, lane, 0.0f);
        rates.set(n, lane, ldg(p.A + (k * p.dim + (there ? d : 0)) * D_STATE + n));
    }
    const float skip = there && p.D != nullptr ? ldg(p.D + k * p.dim + d) : 0.0f;
    const long long first_step = (long long)k * p.steps + task.begin + (lane >> 2);  // of the lane's rows of chunks
    const int *gather = pinned(p.gather + first_step), *merge = p.merge + first_step;

    // Tiles are fetched SLOTS - 1 ahead, their positions one more.
    Stream<CHANNELS * sizeof(IO) / 16, CHANNELS * sizeof(IO) / 16> x(
        p.x + (long long)task.first_item * p.x_b + (long long)k * p.x_k + d0, p.x_l, channels / 8, lane);
    Stream<CHANNELS * sizeof(DY) / 16, CHANNELS * sizeof(DY) / 16> dy(
        params.dy + (long long)task.first_item * params.dy_b + (long long)k * params.dy_k + d0, params.dy_l,
        channels * sizeof(DY) / 16, lane);
    Stream<ROW_CHUNKS, ROW_PITCH> rows(p.rows + (long long)task.first_item * p.rows_b + (long long)k * p.rows_k,
                                       p.rows_l, ROW_CHUNKS, lane);
    const int last_tile = (task.tiles - 1) * STEPS;  // its first step
    int ahead = last_tile, items_ahead = task.items, slot_ahead = 0, slot_now = (SLOTS - 1) * SLOT_SIZE;
    Positions next, next_out, read[SLOTS];  // read: of this tile and those that are in shared memory
    auto load_positions = [&]() {
        next.load(gather + ahead, task.length - ahead, lane);
        if (!SAME_TABLE) next_out.load(merge + ahead, task.length - ahead, lane);
    };
    auto fetch_next = [&]() {
#pragma unroll
        for (int i = 0; i + 1 < SLOTS; i++) read[i] = read[i + 1];
        read[SLOTS - 1] = next;
        if (items_ahead > 0) {
            unsigned char* slot = slots + slot_ahead;
            x.fetch(slot, next, lane);
            dy.fetch(slot + TILE_SIZE<IO>, SAME_TABLE ? next : next_out, lane);
            rows.fetch(slot + TILE_SIZE<IO> + TILE_SIZE<DY>, next, lane);
            slot_ahead = slot_ahead == (SLOTS - 1) * SLOT_SIZE ? 0 : slot_ahead + SLOT_SIZE;
            ahead -= STEPS;
            if (ahead < 0) {
                rarely();
                ahead = last_tile, items_ahead--;
                x.next_item<IO>(p.x_b), dy.next_item<DY>(params.dy_b), rows.next_item<IO>(p.rows_b);
            }
            load_positions();
        }
        cp_async_commit();
    };
    load_positions();
#pragma unroll
    for (int i = 0; i + 1 < SLOTS; i++) fetch_next();

    float d_bias = 0.0f, d_skip = 0.0f;
    float d_weight[2][RANK_CHUNKS][4];  // [channels, R]
#pragma unroll
    for (int i = 0; i < RANK_CHUNKS; i++) {
#pragma unroll
        for (int e = 0; e < 4; e++) d_weight[0][i][e] = d_weight[1][i][e] = 0.0f;
    }
#pragma unroll 1
    for (int i_item = 0; i_item < task.items; i_item++) {
        const long long item = task.first_item + i_item, i_sequence = item * p.num_routes + k;
        const long long i_segment = i_sequence * p.num_segments + task.segment;
        const long long i_tile =
            i_sequence * ((p.steps + STEPS - 1) / STEPS) + task.begin / STEPS + task.tiles - 1;  // the last
        float* segment_states = p.segment_states + i_segment * D_STATE * p.dim + d;
        const float* states = params.states + i_tile * D_STATE * p.dim + d;
        IO* dx = pinned(own_chunk(params.dx + item * params.dx_b + (long long)k * params.dx_k + d0, lane));
        IO* parts =
            pinned(params.d_rows + ((task.block * (long long)p.batch + item) * p.positions * p.num_routes + k) * PART);
        float delta_sum = 0.0f, next_start = !SUMMARY && there ? ldg(states) : 0.0f;
#pragma unroll 1
        for (int n = 0; n < D_STATE; n++) {
            const bool known = !SUMMARY && p.segment_states != nullptr && there;
            q.set(n, lane, known ? ldg(segment_states + n * p.dim) : 0.0f);
        }
#pragma unroll 1
        for (int t0 = last_tile; t0 >= 0; t0 -= STEPS) {
            const bool whole = t0 + STEPS <= task.length;
            float start = next_start;  // of the first state; fetched a tile ahead
            if (t0 > 0) next_start = !SUMMARY && there ? ldg(states - D_STATE * p.dim) : 0.0f;
            fetch_next();
            cp_async_wait<SLOTS - 1>();
            __syncwarp();
            slot_now = slot_now == (SLOTS - 1) * SLOT_SIZE ? 0 : slot_now + SLOT_SIZE;
            unsigned char* slot = slots + slot_now;
            const unsigned char *dy_slot = slot + TILE_SIZE<IO>, *rows_slot = dy_slot + TILE_SIZE<DY>;

            exchange.project(weights, rows_slot);
            inputs.convert(rows_slot, lane);
            __syncwarp();
            float delta[STEPS], slope[STEPS], xs[STEPS];
            exchange.read(delta);
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                const float raw = delta[s];
                float e;
                delta[s] = softplus(raw, e);
                slope[s] = sigmoid(raw, e);
            }
            if (!SUMMARY) read_tile<IO>(xs, slot, lane);
            if (!whole) {  // a step past the end leaves the state alone; dy is zero there
                rarely();
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    if (t0 + s >= task.length) delta[s] = slope[s] = 0.0f;
                }
            }
            if (SUMMARY) {
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    delta_sum += delta[s];
                    if (SEQUENCES && (task.begin + t0 + s) % p.sequence == 0) delta_sum = 1e30f;  // forgets all
                }
            }
            float d_u[STEPS], d_delta[STEPS];  // u = delta x; d_delta without the part through u
            unsigned d_raw[STEPS / 2];         // dL/d(what goes into the softplus)
            float d_raw_after = 0.0f;
            // From the last step to the first: dx, which takes the place of x, and d_raw.
            auto finish = [&](int s, float dy_s) {
                const float v = fmaf(d_u[s], xs[s], d_delta[s]) * slope[s];
                d_bias += v;
                if (s % 2 == 0) d_raw[s / 2] = pack2<IO>(v, d_raw_after);
                d_raw_after = v;
                reinterpret_cast<IO*>(slot)[s * CHANNELS + lane] = from_float<IO>(fmaf(d_u[s], delta[s], skip * dy_s));
            };
            float pair_sums[4];  // (d_B, d_C) of lane % 4's state of four, at two steps
            __syncwarp();        // step sizes are read: products may be written
#pragma unroll 1
            for (int n = 0; n < D_STATE; n++) {
                const float rate = rates.get(n, lane);
                float after = q.get(n, lane);
                float decay[STEPS];
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    decay[s] = ex2(delta[s] * (LOG2E * rate));
                    if (SEQUENCES && (task.begin + t0 + s) % p.sequence == 0) decay[s] = 0.0f;
                }
                const DY* dys = reinterpret_cast<const DY*>(dy_slot) + lane;
                if (SUMMARY) {
                    float C[4];
#pragma unroll
                    for (int s = STEPS - 1; s >= 0; s--) {
                        if (s % 4 == 3) inputs.read(C, n, true, s / 4);
                        after = decay[s] * fmaf(C[s % 4], to_float(dys[s * CHANNELS]), after);
                    }
                    q.set(n, lane, after);
                    continue;
                }
                float B[4], C[4], h[STEPS];
                const float before = start;
                if (n + 1 < D_STATE) start = there ? ldg(states + (n + 1) * p.dim) : 0.0f;
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    if (s % 4 == 0) inputs.read(B, n, false, s / 4);
                    h[s] = fmaf(decay[s], s == 0 ? before : h[s > 0 ? s - 1 : 0], delta[s] * xs[s] * B[s % 4]);
                }
                float d_rate = 0.0f;
#pragma unroll
                for (int s = STEPS - 1; s >= 0; s--) {
                    if (s % 4 == 3) inputs.read(B, n, false, s / 4), inputs.read(C, n, true, s / 4);
                    const float dy_s = to_float(dys[s * CHANNELS]);
                    const float g = fmaf(C[s % 4], dy_s, after);
                    after = decay[s] * g;
                    const float d_log = after * (s == 0 ? before : h[s > 0 ? s - 1 : 0]);  // dL/d(delta A)
                    d_u[s] = n == 0 ? g * B[s % 4] : fmaf(g, B[s % 4], d_u[s]);
                    d_delta[s] = n == 0 ? d_log * rate : fmaf(d_log, rate, d_delta[s]);
                    d_rate = fmaf(d_log, delta[s], d_rate);
                    reinterpret_cast<unsigned*>(pairs + s * PAIR_PITCH)[lane] =
                        pack2<IO>(g * delta[s] * xs[s], h[s] * dy_s);
                    if (n == 0) d_skip = fmaf(xs[s], dy_s, d_skip);
                    if (D_STATE == 1) finish(s, dy_s);  // at once: it needs no registers then
                }
                q.set(n, lane, after);
                d_A.set(n, lane, d_A.get(n, lane) + d_rate);

                // Sums over channels: row s of the product is step s, column 2 j + i is d_B or d_C of state 4 (n / 4) + j.
                __syncwarp();
                const int column = lane >> 2;
                const unsigned here = column == 2 * (n & 3) ? ONE : column == 2 * (n & 3) + 1 ? ONE << 16 : 0u;
                const unsigned ones[2] = {here, here};
                if (n % 4 == 0) pair_sums[0] = pair_sums[1] = pair_sums[2] = pair_sums[3] = 0.0f;
#pragma unroll
                for (int i = 0; i < CHANNELS / 4; i += 2) {
                    unsigned a[4];
                    ldmatrix_x4(a, pairs + (lane & 15) * PAIR_PITCH + i + (lane >> 4));
                    mma_k16<IO>(pair_sums, a, ones, pair_sums);
                }
                if (n % 4 == 3 || n == D_STATE - 1) {
                    const int state = (n & ~3) + (lane & 3);
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        if (read[0].at[j] < 0 || state >= D_STATE) continue;
                        IO* to = at(parts, read[0].at[j], p.num_routes * PART * 2) + PART - 2 * D_STATE + 2 * state;
                        store_global(reinterpret_cast<unsigned*>(to),
                                     pack2<IO>(pair_sums[2 * j], pair_sums[2 * j + 1]));
                    }
                }
                if (D_STATE > 1) __syncwarp();
            }
            if (SUMMARY) {
                __syncwarp();
                continue;
            }
            states -= D_STATE * p.dim;
            if (D_STATE > 1) {
                const DY* dys = reinterpret_cast<const DY*>(dy_slot) + lane;
#pragma unroll
                for (int s = STEPS - 1; s >= 0; s--) finish(s, to_float(dys[s * CHANNELS]));
            }
#pragma unroll
            for (int i = 0; i < STEPS / 8; i++) {
                raws[lane * RAW_PITCH + i] =
                    make_uint4(d_raw[4 * i], d_raw[4 * i + 1], d_raw[4 * i + 2], d_raw[4 * i + 3]);
            }
            __syncwarp();
            // d_dt = d_raw . weight
            unsigned a[CHANNELS / 16][4];
#pragma unroll
            for (int i = 0; i < CHANNELS / 16; i++) {
                const int channel = 16 * i + (lane & 7) + (lane & 16) / 2;
                ldmatrix_x4_trans(a[i], raws + channel * RAW_PITCH + (lane >> 3 & 1));
            }
#pragma unroll
            for (int i = 0; i < RANK_CHUNKS; i++) {
                unsigned b[4];
                ldmatrix_x4(b, turned + (8 * i + (lane & 7)) * TURNED_PITCH + (lane >> 3));
                float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                const unsigned low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
                mma_k16<IO>(v, a[0], low, v);
                mma_k16<IO>(v, a[1], high, v);
                const int r = 8 * i + 2 * (lane & 3);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    if (read[0].at[j] < 0 || r >= RANK) continue;
                    store_global(reinterpret_cast<unsigned*>(at(parts, read[0].at[j], p.num_routes * PART * 2) + r),
                                 pack2<IO>(v[2 * j], v[2 * j + 1]));
                }
            }
            // d_weight += d_raw^T . dt
#pragma unroll
            for (int m = 0; m < 2; m++) {
                ldmatrix_x4(a[m], raws + (16 * m + (lane & 15)) * RAW_PITCH + (lane >> 4));
            }
#pragma unroll
            for (int i = 0; i < RANK_CHUNKS; i++) {
                unsigned b[2];
                ldmatrix_x2_trans(b, rows_slot + 16 * ((lane & 15) * ROW_PITCH + i));
#pragma unroll
                for (int m = 0; m < 2; m++) mma_k16<IO>(d_weight[m][i], a[m], b, d_weight[m][i]);
            }
            store_tile(dx, slot, params.dx_l, read[0], channels / 8, lane);
            __syncwarp();
        }
        if (!SUMMARY || !there) continue;
        p.segment_deltas[i_segment * p.dim + d] = delta_sum;
#pragma unroll 1
        for (int n = 0; n < D_STATE; n++) segment_states[n * p.dim] = q.get(n, lane);
    }
    if (SUMMARY) return;

    // Gradients of the parameters, from this warp's steps.
    float* part = params.d_params + (((long long)task.part * p.num_routes + k) * p.dim + d0) * PARAMS;
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int i = 0; i < RANK_CHUNKS; i++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int r = 8 * i + 2 * (lane & 3) + e % 2, channel = 16 * m + 8 * (e / 2) + (lane >> 2);
                if (r < RANK && channel < channels) part[channel * PARAMS + r] = d_weight[m][i][e];
            }
        }
    }
    if (!there) return;
    part += lane * PARAMS + RANK;
    for (int n = 0; n < D_STATE; n++) part[n] = d_A.get(n, lane);
    part[D_STATE] = d_bias, part[D_STATE + 1] = d_skip;
}
