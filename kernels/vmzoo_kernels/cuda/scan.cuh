// What the forward and the backward scan share: how a warp holds a tile of a route, and how states pass along it.
//
// A unit is one batch item and CHANNELS = 16 channels, scanned by W warps that take the tiles of a route in turn. A
// tile is 8 x STEPS steps. Lane (g, c) of a warp, g = lane / 4 and c = lane % 4, holds STEPS consecutive steps and the
// channels 4 c .. 4 c + 3: exactly what the matrix unit hands it when the rows of a product are steps in a suitable
// order. So raw step sizes come from the matrix unit, a thread scans its steps in registers, the 8 groups of a warp are
// joined by shuffles, and the warps hand the state on through shared memory.
//
// While a warp works a tile it loads the projected rows of the next one into shared memory.
//
// Defined by the launcher: IO (half_t or bfloat_t, dtype of what flows), RANK, D_STATE, WORDS (32-bit words of a
// projected row that a lane loads); by the kernel: HALVES (it works at half of the channels at a time).

constexpr int STEPS = 7;
constexpr int GROUPS = 8;
constexpr int TILE = GROUPS * STEPS;
constexpr int CHANNELS = 16;
constexpr int MMA_ROWS = (STEPS + 1) / 2;
constexpr int CHUNK = WORDS < 4 ? WORDS : 4;  // words of one load
constexpr int ROW_COLUMNS = D_STATE == 1 ? RANK + 2 : RANK;
constexpr int ROW_WORDS = (ROW_COLUMNS + 8 * CHUNK - 1) / (8 * CHUNK) * CHUNK;  // that a lane keeps in registers
constexpr float LOG2E = 1.4426950408889634f;
constexpr unsigned FULL = 0xffffffffu;

// Column of a projected row [dt | B | C] that is in the low half of a lane's word.
__device__ __forceinline__ constexpr int column(int c, int word) {
    return word / CHUNK * (8 * CHUNK) + c * (2 * CHUNK) + word % CHUNK * 2;
}
// And back: the lane, and the word, that hold a column.
__device__ __forceinline__ constexpr int lane_of(int col) { return col % (8 * CHUNK) / (2 * CHUNK); }
__device__ __forceinline__ constexpr int word_of(int col) { return col / (8 * CHUNK) * CHUNK + col % (2 * CHUNK) / 2; }

// softplus to a relative error of 2e-6: log1p(e) / e is a minimax polynomial on [0, 1].
__device__ __forceinline__ float softplus(float x) {
    float e = ex2(-fabsf(x * LOG2E));
    float p = 0.014140999875962734f;
    p = fmaf(p, e, -0.06640172749757767f);
    p = fmaf(p, e, 0.14922378957271576f);
    p = fmaf(p, e, -0.23503856360912323f);
    p = fmaf(p, e, 0.3310944736003876f);
    p = fmaf(p, e, -0.4998696446418762f);
    p = fmaf(p, e, 0.9999987483024597f);
    return fmaf(p, e, fmaxf(x, 0.0f));
}

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

struct Lane {
    int g, c;
    __device__ __forceinline__ Lane() : g((threadIdx.x & 31) >> 2), c(threadIdx.x & 3) {}
};

// The channel of column n of matrix tile j: a lane has four neighbours, or (HALVES) two of each half of the unit.
__device__ __forceinline__ int channel_of(int j, int n) { return HALVES ? 8 * j + n : 4 * (n >> 1) + 2 * j + (n & 1); }

// dt_weight of the unit's channels as the second operand of a product over dt.
struct Weights {
    unsigned b[2][ROW_WORDS];
    float bias[2][4];  // where the product starts from

    // dt_weight [16, R] and dt_bias [16] (or null) of the unit's channels.
    __device__ __forceinline__ void load(const float* weight, const float* dt_bias, Lane lane) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                bias[j][e] = dt_bias == nullptr ? 0.0f : ldg(dt_bias + channel_of(j, 2 * lane.c + e));
                // The same, but the compiler does not know it, and keeps the four registers that a product starts from.
                bias[j][2 + e] = __shfl_xor_sync(FULL, __shfl_xor_sync(FULL, bias[j][e], 1), 1);
            }
            const float* row = weight + channel_of(j, lane.g) * RANK;
#pragma unroll
            for (int i = 0; i < ROW_WORDS; i++) {
                int r = column(lane.c, i);
                float lo = r < RANK ? row[r] : 0.0f, hi = r + 1 < RANK ? row[r + 1] : 0.0f;
                b[j][i] = pack2<IO>(lo, hi);
            }
        }
    }
};

// What a block works at of a route: a segment of its steps. Segments of every other route can be mirrored, so that a
// route and its reverse, one after the other, meet the same positions.
struct Range {
    int k, i_segment, begin, length, tiles;

    template <typename P>
    __device__ __forceinline__ Range(const P& p, int i_route, int segment) {
        k = p.first_route + i_route * p.route_step;
        const bool reverse = p.mirrored && (i_route & 1);
        const int start = segment * p.segment_steps, end = min(start + p.segment_steps, p.steps);
        i_segment = reverse ? p.num_segments - 1 - segment : segment;
        begin = reverse ? p.steps - end : start;
        length = end - start;
        tiles = (length + TILE - 1) / TILE;
    }
};

// A warp's place in its work: routes, batch items, and its turns at the tiles of a route.
struct Place {
    int i_route, item, turn;

    template <typename P>
    __device__ __forceinline__ Place next(const P& p, int items, int tiles, int warp) const {
        Place to = {i_route, item, turn + p.warps};
        if (to.turn < tiles) return to;
        to.turn = warp;
        if (++to.item == items) to.item = 0, to.i_route++;
        return to;
    }

    template <typename P>
    __device__ __forceinline__ bool exists(const P& p) const {
        return i_route < p.route_count;
    }
};

// Positions of a lane's steps, -1 past the end.
__device__ __forceinline__ void load_positions(int (&pos)[STEPS], const int* table, int t0, int length) {
    const int* p = table + t0;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        pos[s] = -1;
        if (t0 + s < length) pos[s] = ldg(p + s);
    }
}

// Rows [dt | B | C] of a tile in shared memory, in the words that each lane loads; zero where there is no position.
struct Rows {
    unsigned* memory;  // [STEPS, WORDS / CHUNK, 32, CHUNK] of the warp
    int lane;

    __device__ __forceinline__ unsigned* chunk(int s, int i, int of) const {
        return memory + ((s * (WORDS / CHUNK) + i) * 32 + of) * CHUNK;
    }

    // From `rows`, where a lane's first word of position 0 is; a row has room for so many columns more.
    __device__ __forceinline__ void fetch(const IO* rows, int stride, const int (&pos)[STEPS], int room) const {
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            const IO* row = at(rows, max(pos[s], 0), stride);
#pragma unroll
            for (int i = 0; i < WORDS / CHUNK; i++) {
                unsigned* to = chunk(s, i, lane);
                const IO* from = row + column(0, i * CHUNK);
                if (pos[s] >= 0 && (WORDS <= 4 || column(0, i * CHUNK) < room)) {
                    if (CHUNK == 1) cp_async4(to, from);
                    if (CHUNK == 2) cp_async8(to, from);
                    if (CHUNK == 4) cp_async16(to, from);
                } else {
#pragma unroll
                    for (int w = 0; w < CHUNK; w++) to[w] = 0u;
                }
            }
        }
        cp_async_commit();
    }

    __device__ __forceinline__ void read(unsigned (&row)[STEPS][ROW_WORDS]) const {
#pragma unroll
        for (int s = 0; s < STEPS; s++) read(row[s], s);
    }

    __device__ __forceinline__ void read(unsigned (&row)[ROW_WORDS], int s) const {
#pragma unroll
        for (int i = 0; i < ROW_WORDS / CHUNK; i++) {
            const unsigned* from = chunk(s, i, lane);
            if (CHUNK == 1) row[i] = *from;
            if (CHUNK == 2) {
                uint2 v = *reinterpret_cast<const uint2*>(from);
                row[2 * i] = v.x, row[(2 * i + 1) % ROW_WORDS] = v.y;
            }
            if (CHUNK == 4) {
                uint4 v = *reinterpret_cast<const uint4*>(from);
                row[4 * i] = v.x, row[(4 * i + 1) % ROW_WORDS] = v.y;
                row[(4 * i + 2) % ROW_WORDS] = v.z, row[(4 * i + 3) % ROW_WORDS] = v.w;
            }
        }
    }

    // One column, which any lane of the group may have fetched.
    __device__ __forceinline__ float value(int s, int col) const {
        const IO* words = reinterpret_cast<const IO*>(chunk(s, col / (8 * CHUNK), (lane & ~3) | lane_of(col)));
        return to_float(words[col % (2 * CHUNK)]);
    }
};

// raw[s][e] = bias + dt . weight for a lane's steps s and its two channels of a matrix tile.
__device__ __forceinline__ void project(float (&raw)[2 * MMA_ROWS][2], const unsigned (&rows)[STEPS][ROW_WORDS],
                                        const unsigned (&weights)[ROW_WORDS], const float (&bias)[4]) {
#pragma unroll
    for (int m = 0; m < MMA_ROWS; m++) {
        const bool second = 2 * m + 1 < STEPS;
        float d[4];
        if (ROW_WORDS == 1) {
            const unsigned a[2] = {rows[2 * m][0], second ? rows[(2 * m + 1) % STEPS][0] : 0u};
            mma_k8<IO>(d, a, weights[0], bias);
        }
#pragma unroll
        for (int i = 0; i < ROW_WORDS / 2; i++) {
            if (column(0, 2 * i) >= RANK) continue;  // no lane's words hold dt
            const unsigned a[4] = {rows[2 * m][2 * i], second ? rows[(2 * m + 1) % STEPS][2 * i] : 0u,
                                   rows[2 * m][(2 * i + 1) % ROW_WORDS],
                                   second ? rows[(2 * m + 1) % STEPS][(2 * i + 1) % ROW_WORDS] : 0u};
            const unsigned b[2] = {weights[2 * i], weights[(2 * i + 1) % ROW_WORDS]};
            if (i == 0) {
                mma_k16<IO>(d, a, b, bias);
            } else {
                mma_k16<IO>(d, a, b, d);
            }
        }
        raw[2 * m][0] = d[0], raw[2 * m][1] = d[1], raw[2 * m + 1][0] = d[2], raw[2 * m + 1][1] = d[3];
    }
}

// A column of the rows, for all lanes of a group, from the lane that loaded it.
template <int COLUMN>
__device__ __forceinline__ float broadcast(const unsigned (&row)[ROW_WORDS], int lane) {
    unsigned w = __shfl_sync(FULL, row[word_of(COLUMN) % ROW_WORDS], (lane & ~3) | lane_of(COLUMN));
    float2 v = unpack2<IO>(w);
    return COLUMN % 2 ? v.y : v.x;
}

// Affine maps h -> a h + b of every group's steps, for Q channels. After `scan`, a lane holds the map of all groups
// before its own (in REVERSE: after), and `total` that of the whole tile.
template <int Q>
struct Maps {
    float a[Q], b[Q];

    template <bool REVERSE>
    __device__ __forceinline__ Maps scan(Lane lane) {
        int place = REVERSE ? GROUPS - 1 - lane.g : lane.g;
#pragma unroll
        for (int d = 1; d < GROUPS; d *= 2) {
#pragma unroll
            for (int q = 0; q < Q; q++) {
                float a0 = REVERSE ? __shfl_down_sync(FULL, a[q], 4 * d) : __shfl_up_sync(FULL, a[q], 4 * d);
                float b0 = REVERSE ? __shfl_down_sync(FULL, b[q], 4 * d) : __shfl_up_sync(FULL, b[q], 4 * d);
                if (place >= d) {
                    b[q] = fmaf(a[q], b0, b[q]);
                    a[q] *= a0;
                }
            }
        }
        Maps total = *this;  // complete in the last group alone
#pragma unroll
        for (int q = 0; q < Q; q++) {
            float a0 = REVERSE ? __shfl_down_sync(FULL, a[q], 4) : __shfl_up_sync(FULL, a[q], 4);
            float b0 = REVERSE ? __shfl_down_sync(FULL, b[q], 4) : __shfl_up_sync(FULL, b[q], 4);
            a[q] = place > 0 ? a0 : 1.0f;
            b[q] = place > 0 ? b0 : 0.0f;
        }
        return total;
    }
};

__device__ __forceinline__ float sum_groups(float v) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) v += __shfl_xor_sync(FULL, v, step);
    return v;
}

__device__ __forceinline__ void set(float (&v)[2], float2 from) { v[0] = from.x, v[1] = from.y; }
__device__ __forceinline__ float2 get(const float (&v)[2]) { return make_float2(v[0], v[1]); }
__device__ __forceinline__ void set(float (&v)[4], float4 from) {
    v[0] = from.x, v[1] = from.y, v[2] = from.z, v[3] = from.w;
}
__device__ __forceinline__ float4 get(const float (&v)[4]) { return make_float4(v[0], v[1], v[2], v[3]); }

// How warps hand a state on: for each of COUNT states every warp has a mailbox, which the warp of the next tile
// empties. Whoever waits sleeps: polling would take the issue slots of those that work.
template <int COUNT, typename Vector>
struct Mail {
    Vector* boxes;                // [COUNT, W, 4]
    unsigned long long* arrived;  // [COUNT, W] barriers, one phase a message
    int warp, warps;

    static constexpr int SIZE = COUNT * (4 * sizeof(Vector) + 8);  // bytes of a warp

    __device__ __forceinline__ Mail(void* memory, int warp, int warps)
        : boxes(static_cast<Vector*>(memory)),
          arrived(reinterpret_cast<unsigned long long*>(boxes + 4 * COUNT * warps)),
          warp(warp),
          warps(warps) {}

    __device__ __forceinline__ void start(int lane) {
        for (int n = lane; n < COUNT; n += 32) mbarrier_init(arrived + n * warps + warp, 4);
    }

    // The sender's messages so far, of each state, are the receiver's `before`.
    __device__ __forceinline__ void receive(float (&h)[sizeof(Vector) / 4], int n, int c, unsigned before) const {
        const int from = warp == 0 ? warps - 1 : warp - 1;
        mbarrier_wait(arrived + n * warps + from, before & 1);
        set(h, boxes[4 * (n * warps + from) + c]);
        __syncwarp();  // once one lane hands on, the sender may get to its next message: all must have read this one
    }

    // By the four lanes of one group.
    __device__ __forceinline__ void send(const float (&h)[sizeof(Vector) / 4], int n, int c) const {
        boxes[4 * (n * warps + warp) + c] = get(h);
        mbarrier_arrive(arrived + n * warps + warp);
    }
};
