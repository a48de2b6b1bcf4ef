// What the forward and the backward scan share: how a warp holds a tile of a route.
//
// A warp walks a segment of one route of one batch item in tiles of 16 steps, a lane a channel: what follows one step
// after another stays in a lane's registers, and no two warps wait for each other. What is a matrix product (step sizes
// from low-rank dt, gradients of dt and its weights, sums over channels) goes through the matrix unit by way of shared
// memory, where the layouts of lanes and products meet. Rows of x, of [dt | B | C] and of dy are fetched tiles ahead.
//
// Shared memory belongs to a warp alone. Outputs of routes that are summed go to memory apart; sum_routes adds them.
//
// Defined by the launcher: IO (half_t or bfloat_t, dtype of what flows), RANK, D_STATE, WARPS and BLOCKS (warps of a
// block, blocks of a multiprocessor), SAME_TABLE (gather and merge are one table), SEQUENCES (a route has several, each
// from a state of zero), SUMMARY (only find what each segment does to the state).

constexpr int STEPS = 16;     // of a tile
constexpr int CHANNELS = 32;  // of a warp
constexpr int SLOTS = 3;      // tiles in shared memory: the one that is worked at and those on the way
constexpr int WIDTH = RANK + 2 * D_STATE;
constexpr int ROW_CHUNKS = (WIDTH + 7) / 8;  // 16 bytes each
constexpr int ROW_PITCH = ROW_CHUNKS | 1;    // chunks; odd, for ldmatrix without bank conflicts
constexpr int RANK_CHUNKS = (RANK + 7) / 8;
constexpr float LOG2E = 1.4426950408889634f;
constexpr unsigned FULL = 0xffffffffu;

// A scan, and what of it a launch does. Strides over positions are bytes, all others elements.
struct Scan {
    const IO* x;            // [B, L, D] or [B, L, K, D]
    const IO* rows;         // [B, L, K, R + 2 N], dt | B | C
    const float* A;         // [K, D, N]
    const float* D;         // [K, D], or null
    const float* weight;    // [K, D, R]
    const float* bias;      // [K, D], or null
    const int* gather;      // [K, steps], -1: nothing is read
    const int* merge;       // [K, steps], -1: nothing is written
    float* segment_states;  // [B, K, segments, N, D], or null
    float* segment_deltas;  // [B, K, segments, D]
    long long x_b, rows_b;
    int x_l, x_k, rows_l, rows_k;
    int positions, steps, sequence, dim, num_routes, batch;
    int blocks, items;                // channel blocks; batch items of a warp, one after the other
    int segment_steps, num_segments;  // a multiple of STEPS
};

// What a warp works at: 32 channels of a segment of a route, of some batch items.
struct Task {
    int block, k, segment, first_item, items, part;  // part: of those with the same channels and route
    int begin, length, tiles;

    __device__ __forceinline__ explicit Task(const Scan& p) {
        int i = blockIdx.x * WARPS + (threadIdx.x >> 5);
        block = i % p.blocks, i /= p.blocks;
        k = i % p.num_routes, part = i / p.num_routes;
        segment = part % p.num_segments;
        first_item = part / p.num_segments * p.items;
        items = min(p.items, p.batch - first_item);
        begin = segment * p.segment_steps;
        length = min(p.segment_steps, p.steps - begin);
        tiles = (length + STEPS - 1) / STEPS;
    }
};

// softplus to a relative error of 8e-6: log1p(e) / e is a minimax polynomial on [0, 1]. e is exp(-|x|).
__device__ __forceinline__ float softplus(float x, float& e) {
    e = ex2(-fabsf(x * LOG2E));
    float p = -0.02386915124952793f;
    p = fmaf(p, e, 0.10122228413820267f);
    p = fmaf(p, e, -0.21004869043827057f);
    p = fmaf(p, e, 0.3252066671848297f);
    p = fmaf(p, e, -0.4993613660335541f);
    p = fmaf(p, e, 0.9999915957450867f);
    return fmaf(p, e, fmaxf(x, 0.0f));
}

// Its derivative.
__device__ __forceinline__ float sigmoid(float x, float e) { return (x < 0.0f ? e : 1.0f) * rcp(1.0f + e); }

// What is `i` rows of `stride` bytes after `base`.
template <typename T>
__device__ __forceinline__ T* at(T* base, int i, int stride) {
    return reinterpret_cast<T*>(offset(reinterpret_cast<unsigned long long>(base), i, stride));
}

// Keep an address in registers: the compiler would rather compute it again for every access.
template <typename T>
__device__ __forceinline__ T* pinned(T* address) {
    return reinterpret_cast<T*>(opaque(reinterpret_cast<unsigned long long>(address)));
}

// The positions of a tile's steps, which fetches and stores need as rows of chunks: step 8 j + lane / 4 is in at[j] of
// each of four lanes. -1 beyond the end.
struct Positions {
    int at[2];

    // From a table with the lane's own first step in front, of a tile whose first step has `left` steps to come.
    __device__ __forceinline__ void load(const int* table, int left, int lane) {
#pragma unroll
        for (int j = 0; j < 2; j++) at[j] = 8 * j + (lane >> 2) < left ? ldg(table + 8 * j) : -1;
    }

    // Of a step of each lane's choice, of which SIDE (a power of two) chunks lie side by side: i = step SIDE + chunk.
    template <int SIDE>
    __device__ __forceinline__ int of(int j, int lane) const {
        if (SIDE == 4) return at[j];
        if (SIDE > 4) {
            const int first = 32 / SIDE * j;
            return __shfl_sync(FULL, at[first / 8], 4 * (first % 8 + lane / SIDE));
        }
        const int step = (32 * j + lane) / SIDE;
        const int low = __shfl_sync(FULL, at[0], 4 * step & 31), high = __shfl_sync(FULL, at[1], 4 * step & 31);
        return step < 8 ? low : high;
    }
};

// Fetches rows of CHUNKS chunks of 16 bytes, one a step, to shared memory with a pitch of PITCH chunks. Those of no
// position, and chunks from `valid` on, are zero.
template <int CHUNKS, int PITCH>
struct Stream {
    static constexpr int SIDE = CHUNKS > 8 ? 16 : CHUNKS > 4 ? 8 : CHUNKS > 2 ? 4 : CHUNKS;
    const uint4* from;  // the lane's chunk of position 0 of the batch item
    int stride;         // bytes
    bool valid;
    int own;  // bytes to the lane's first chunk

    __device__ __forceinline__ Stream(const void* first, int stride, int valid, int lane)
        : from(pinned(static_cast<const uint4*>(first) + lane % SIDE)),
          stride(stride),
          valid(lane % SIDE < valid),
          own(opaque(16 * (lane / SIDE * PITCH + lane % SIDE))) {}

    __device__ __forceinline__ void fetch(unsigned char* memory, const Positions& positions, int lane) const {
        uint4* to = reinterpret_cast<uint4*>(memory + own);
#pragma unroll
        for (int j = 0; j < (STEPS * SIDE + 31) / 32; j++) {
            const int position = positions.of<SIDE>(j, lane);
            if (STEPS * SIDE < 32 && lane >= STEPS * SIDE) continue;
            if (SIDE != CHUNKS && lane % SIDE >= CHUNKS) continue;
            cp_async16_or_zero(to + 32 / SIDE * j * PITCH, at(from, max(position, 0), stride), position >= 0 && valid);
        }
    }

    template <typename T>
    __device__ __forceinline__ void next_item(long long elements) {
        from = pinned(reinterpret_cast<const uint4*>(reinterpret_cast<const T*>(from) + elements));
    }
};

// A tile of 32 channels of T, a row a step, back to memory: to `to`, the lane's chunk of position 0.
template <typename T>
__device__ __forceinline__ void store_tile(T* to, const unsigned char* tile, int stride, const Positions& positions,
                                           int valid, int lane) {
    constexpr int CHUNKS = CHANNELS * sizeof(T) / 16;
#pragma unroll
    for (int j = 0; j < STEPS * CHUNKS / 32; j++) {
        const int position = positions.of<CHUNKS>(j, lane);
        if (position < 0 || lane % CHUNKS >= valid) continue;
        store_global(reinterpret_cast<uint4*>(at(to, position, stride)),
                     *reinterpret_cast<const uint4*>(tile + 512 * j + 16 * lane));
    }
}

// The lane's chunk of a row of T.
template <typename T>
__device__ __forceinline__ T* own_chunk(T* row, int lane) {
    return row + lane % (CHANNELS * sizeof(T) / 16) * (16 / sizeof(T));
}

// dt_weight and dt_bias of the warp's channels as the first operand of a product over dt, [channels, R].
struct Weights {
    unsigned a[2][RANK_CHUNKS][2];
    float bias[2][4];  // where the product starts from

    // dt_weight [D, R] and dt_bias [D] (or null) from the warp's first channel on, of which so many are there.
    __device__ __forceinline__ void load(const float* weight, const float* dt_bias, int channels, int lane) {
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int row = 0; row < 2; row++) {
                const int channel = 16 * m + 8 * row + (lane >> 2);
                const bool there = channel < channels;
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    bias[m][2 * row + e] = there && dt_bias != nullptr ? ldg(dt_bias + channel) : 0.0f;
                    // Four registers that a product can start from: the compiler would make them anew for each.
                    bias[m][2 * row + e] = opaque(bias[m][2 * row + e]);
                }
#pragma unroll
                for (int i = 0; i < RANK_CHUNKS; i++) {
                    const int r = 8 * i + 2 * (lane & 3);
                    const float* v = weight + channel * RANK + r;
                    a[m][i][row] =
                        pack2<IO>(there && r < RANK ? ldg(v) : 0.0f, there && r + 1 < RANK ? ldg(v + 1) : 0.0f);
                }
            }
        }
    }
};

// Values of a tile, on their way from the layout of products to that of the scan: a lane its channel's steps. Chunks of
// four steps lie in an order of their own in every channel, in which neither side meets a bank twice.
struct Exchange {
    unsigned char* memory;
    // Bytes to where the lane writes its first channel's steps 8 n .., and where its own channel begins; and of a tile's
    // rows, to the lane's own for ldmatrix.
    int to[2], own, row;

    // From `begin` bytes on, a multiple of 64: [CHANNELS, STEPS] floats.
    __device__ __forceinline__ Exchange(unsigned char* memory, int begin, int lane) : memory(memory) {
        const int channel = lane >> 2;
#pragma unroll
        for (int n = 0; n < 2; n++) {
            // Steps 8 n + 2 (lane % 4) and the next: half of chunk 2 n + lane % 4 / 2
            to[n] = opaque(begin + place(channel, 2 * n + (lane >> 1 & 1)) + 8 * (lane & 1));
        }
        own = opaque(begin + place(lane, 0));
        // Matrices in the order (steps 0-7, chunk i), (steps 0-7, i + 1), (steps 8-15, i), (steps 8-15, i + 1)
        row = opaque(16 * (((lane & 7) + (lane & 16) / 2) * ROW_PITCH + (RANK_CHUNKS > 1 ? lane >> 3 & 1 : 0)));
    }

    __device__ __forceinline__ static constexpr int place(int channel, int chunk) {
        return 4 * STEPS * channel + 16 * (chunk ^ (channel & 2 | channel >> 2 & 1));
    }

    // bias + dt . weight, from rows in shared memory.
    __device__ __forceinline__ void project(const Weights& weights, const unsigned char* rows) const {
        float d[2][2][4];  // channels, steps
        // Of an odd last chunk the next is read too, which is there: rows have an odd pitch, or B and C after dt.
#pragma unroll
        for (int i = 0; i < RANK_CHUNKS; i += 2) {
            unsigned b[4];
            ldmatrix_x4(b, rows + row + 16 * i);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                const unsigned (*a)[2] = weights.a[m] + i;
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const float (&so_far)[4] = d[m][n];
                    const float (&start)[4] = i == 0 ? weights.bias[m] : so_far;
                    if (i + 1 < RANK_CHUNKS) {
                        const unsigned a4[4] = {a[0][0], a[0][1], a[1][0], a[1][1]}, b2[2] = {b[2 * n], b[2 * n + 1]};
                        mma_k16<IO>(d[m][n], a4, b2, start);
                    } else {
                        mma_k8<IO>(d[m][n], a[0], b[2 * n], start);
                    }
                }
            }
        }
        // Channels 8 apart have one order.
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int m = 0; m < 2; m++) {
#pragma unroll
                for (int row = 0; row < 2; row++) {
                    *reinterpret_cast<float2*>(memory + to[n] + 4 * STEPS * (16 * m + 8 * row)) =
                        make_float2(d[m][n][2 * row], d[m][n][2 * row + 1]);
                }
            }
        }
    }

    __device__ __forceinline__ void read(float (&v)[STEPS]) const {
#pragma unroll
        for (int i = 0; i < STEPS / 4; i++) {
            const float4 four = *reinterpret_cast<const float4*>(memory + (own ^ 16 * i));
            v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
        }
    }
};

// B and C of a tile as floats, for all lanes to read at once.
struct Inputs {
    float* memory;  // [N, 2, STEPS]
    int own;        // bytes in a tile's rows to the lane's first value

    __device__ __forceinline__ Inputs(float* memory, int lane)
        : memory(memory), own(opaque(16 * ROW_PITCH * (lane % STEPS) + 2 * (RANK + lane / STEPS))) {}

    __device__ __forceinline__ void convert(const unsigned char* rows, int lane) const {
        const IO* values = reinterpret_cast<const IO*>(rows + own);
#pragma unroll
        for (int j = 0; j < 2 * D_STATE * STEPS / 32; j++) {
            const int which = 2 * j + lane / STEPS;  // column of B and C
            const int n = which % D_STATE, of_C = which / D_STATE;
            memory[D_STATE == 1 ? lane : (2 * n + of_C) * STEPS + lane % STEPS] = to_float(values[2 * j]);
        }
    }

    // Of steps 4 i .. 4 i + 3.
    __device__ __forceinline__ void read(float (&v)[4], int n, bool of_C, int i) const {
        const float4 four = reinterpret_cast<const float4*>(memory + (2 * n + of_C) * STEPS)[i];
        v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
    }
};

// A lane's channel of a tile in shared memory.
template <typename T>
__device__ __forceinline__ void read_tile(float (&v)[STEPS], const unsigned char* tile, int lane) {
    const T* own = reinterpret_cast<const T*>(tile) + lane;
#pragma unroll
    for (int s = 0; s < STEPS; s++) v[s] = to_float(own[s * CHANNELS]);
}

// One value of each state, in a register if there is one, else in shared memory.
struct States {
    float own;
    float* memory;  // [N, 32]

    __device__ __forceinline__ float get(int n, int lane) const { return D_STATE == 1 ? own : memory[32 * n + lane]; }
    __device__ __forceinline__ void set(int n, int lane, float v) {
        if (D_STATE == 1) {
            own = v;
        } else {
            memory[32 * n + lane] = v;
        }
    }
};
// Parts of a warp's shared memory, in bytes.
constexpr int ROWS_SIZE = 16 * STEPS * ROW_PITCH;
constexpr int INPUTS_SIZE = 4 * 2 * D_STATE * STEPS;
constexpr int EXCHANGE_SIZE = 4 * CHANNELS * STEPS;
constexpr int STATES_SIZE = D_STATE == 1 ? 0 : 4 * 32 * D_STATE;
template <typename T>
constexpr int TILE_SIZE = STEPS * CHANNELS * sizeof(T);
