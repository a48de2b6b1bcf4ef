// Forward scan. Also defined by the launcher: OUT (dtype of y).
#include "prelude.cuh"
#include "scan.cuh"

struct Params {
    Scan scan;
    OUT* y;         // [B, L, K, D], or [B, L, D]
    float* states;  // at the start of each tile [B, K, tiles, N, D], or null
    float* last;    // [B, K, D, N]
    long long y_b;
    int y_l, y_k;  // y_l is bytes
};

// Shared memory of a warp, in bytes: [slots of x and rows | B, C | step sizes | y | states, rates]
constexpr int SLOT_SIZE = TILE_SIZE<IO> + ROWS_SIZE;
constexpr int WARP_SIZE = SLOTS * SLOT_SIZE + INPUTS_SIZE + EXCHANGE_SIZE + TILE_SIZE<OUT> + 2 * STATES_SIZE;

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) scan_forward(const __grid_constant__ Params params) {
    DYNAMIC_SHARED(memory);
    const Scan& p = params.scan;
    const int lane = threadIdx.x & 31;
    const Task task(p);
    if (task.items <= 0) return;
    if (SUMMARY && task.segment == p.num_segments - 1) return;  // nothing starts from its end
    const int d0 = task.block * CHANNELS, channels = min(p.dim - d0, CHANNELS), d = d0 + lane;
    const bool there = lane < channels;
    const int k = task.k;

    const int begin = (threadIdx.x >> 5) * WARP_SIZE, begin_inputs = begin + SLOTS * SLOT_SIZE;
    const int begin_y = begin_inputs + INPUTS_SIZE + EXCHANGE_SIZE;
    unsigned char* slots = memory + begin;
    const Inputs inputs(reinterpret_cast<float*>(memory + begin_inputs), lane);
    const Exchange exchange(memory, begin_inputs + INPUTS_SIZE, lane);
    unsigned char* y_tile = memory + begin_y;
    States h = {0.0f, reinterpret_cast<float*>(y_tile + TILE_SIZE<OUT>)}, rates = {0.0f, h.memory + STATES_SIZE / 4};

    Weights weights;
    weights.load(p.weight + (k * p.dim + d0) * RANK, p.bias == nullptr ? nullptr : p.bias + k * p.dim + d0, channels,
                 lane);
    for (int n = 0; n < D_STATE; n++) {
        rates.set(n, lane, LOG2E * ldg(p.A + (k * p.dim + (there ? d : 0)) * D_STATE + n));
    }
    const float skip = there && p.D != nullptr ? ldg(p.D + k * p.dim + d) : 0.0f;
    const long long first_step = (long long)k * p.steps + task.begin + (lane >> 2);  // of the lane's rows of chunks
    const int *gather = pinned(p.gather + first_step), *merge = p.merge + first_step;

    // Tiles are fetched SLOTS - 1 ahead, their positions one more.
    Stream<CHANNELS * sizeof(IO) / 16, CHANNELS * sizeof(IO) / 16> x(
        p.x + (long long)task.first_item * p.x_b + (long long)k * p.x_k + d0, p.x_l, channels / 8, lane);
    Stream<ROW_CHUNKS, ROW_PITCH> rows(p.rows + (long long)task.first_item * p.rows_b + (long long)k * p.rows_k,
                                       p.rows_l, ROW_CHUNKS, lane);
    int ahead = 0, items_ahead = task.items, slot_ahead = 0, slot = (SLOTS - 1) * SLOT_SIZE;
    Positions next, out[SLOTS];  // out: of this tile and those that are in shared memory
    next.load(gather, task.length, lane);
    auto fetch_next = [&]() {
#pragma unroll
        for (int i = 0; i + 1 < SLOTS; i++) out[i] = out[i + 1];
        out[SLOTS - 1] = next;
        if (items_ahead > 0) {
            x.fetch(slots + slot_ahead, next, lane);
            rows.fetch(slots + slot_ahead + TILE_SIZE<IO>, next, lane);
            slot_ahead = slot_ahead == (SLOTS - 1) * SLOT_SIZE ? 0 : slot_ahead + SLOT_SIZE;
            ahead += STEPS;
            if (ahead >= task.length) {
                rarely();
                ahead = 0, items_ahead--;
                x.next_item<IO>(p.x_b), rows.next_item<IO>(p.rows_b);
            }
            next.load(gather + ahead, task.length - ahead, lane);
        }
        cp_async_commit();
    };
#pragma unroll
    for (int i = 0; i + 1 < SLOTS; i++) fetch_next();

#pragma unroll 1
    for (int item = 0; item < task.items; item++) {
        const long long batch = task.first_item + item, i_sequence = batch * p.num_routes + k;
        const long long i_segment = i_sequence * p.num_segments + task.segment;
        const long long i_tile = i_sequence * ((p.steps + STEPS - 1) / STEPS) + task.begin / STEPS;
        float* segment_states = p.segment_states + i_segment * D_STATE * p.dim + d;
        OUT* y_item = pinned(own_chunk(params.y + batch * params.y_b + (long long)k * params.y_k + d0, lane));
        float* states = params.states + i_tile * D_STATE * p.dim + d;
        float delta_sum = 0.0f;
#pragma unroll 1
        for (int n = 0; n < D_STATE; n++) {
            const bool known = !SUMMARY && p.segment_states != nullptr && there;
            h.set(n, lane, known ? ldg(segment_states + n * p.dim) : 0.0f);
        }
#pragma unroll 1
        for (int t0 = 0; t0 < task.length; t0 += STEPS) {
            fetch_next();
            if (!SAME_TABLE && !SUMMARY) out[0].load(merge + t0, task.length - t0, lane);
            cp_async_wait<SLOTS - 1>();
            __syncwarp();
            slot = slot == (SLOTS - 1) * SLOT_SIZE ? 0 : slot + SLOT_SIZE;

            exchange.project(weights, slots + slot + TILE_SIZE<IO>);
            inputs.convert(slots + slot + TILE_SIZE<IO>, lane);
            __syncwarp();
            float delta[STEPS], u[STEPS], y[STEPS];
            exchange.read(delta);
            read_tile<IO>(u, slots + slot, lane);
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                float e;
                delta[s] = softplus(delta[s], e);
                y[s] = skip * u[s];
                u[s] *= delta[s];
            }
            if (t0 + STEPS > task.length) {  // a step past the end leaves the state alone
                rarely();
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    if (t0 + s >= task.length) delta[s] = u[s] = 0.0f;
                }
            }
            if (SUMMARY) {
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    delta_sum += delta[s];
                    if (SEQUENCES && (task.begin + t0 + s) % p.sequence == 0) delta_sum = 1e30f;  // forgets all
                }
            }
#pragma unroll 2
            for (int n = 0; n < D_STATE; n++) {
                const float rate = rates.get(n, lane);
                float state = h.get(n, lane), B[4], C[4];
                if (!SUMMARY && params.states != nullptr && there) states[n * p.dim] = state;
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    if (s % 4 == 0) inputs.read(B, n, false, s / 4), inputs.read(C, n, true, s / 4);
                    float decay = ex2(delta[s] * rate);
                    if (SEQUENCES && (task.begin + t0 + s) % p.sequence == 0) decay = 0.0f;
                    state = fmaf(decay, state, u[s] * B[s % 4]);
                    if (!SUMMARY) y[s] = fmaf(C[s % 4], state, y[s]);
                }
                h.set(n, lane, state);
            }
            if (!SUMMARY) {
                states += D_STATE * p.dim;
#pragma unroll
                for (int s = 0; s < STEPS; s++)
                    reinterpret_cast<OUT*>(y_tile)[s * CHANNELS + lane] = from_float<OUT>(y[s]);
            }
            __syncwarp();
            if (!SUMMARY) store_tile(y_item, y_tile, params.y_l, out[0], channels * sizeof(OUT) / 16, lane);
        }
        if (!there) continue;
        if (SUMMARY) p.segment_deltas[i_segment * p.dim + d] = delta_sum;
        const bool ends = task.segment == p.num_segments - 1 && p.sequence == p.steps;
#pragma unroll 1
        for (int n = 0; n < D_STATE; n++) {
            if (SUMMARY) {
                segment_states[n * p.dim] = h.get(n, lane);
            } else if (ends) {
                params.last[(i_sequence * p.dim + d) * D_STATE + n] = h.get(n, lane);
            }
        }
    }
}
