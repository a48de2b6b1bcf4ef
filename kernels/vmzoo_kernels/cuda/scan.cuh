// What the forward and the backward scan share: how a warp holds a tile of a route, and how states pass along it.
//
// A unit is one batch item and CHANNELS = 16 channels, scanned by W warps that take the tiles of a route in turn. A tile
// is 8 x STEPS steps. Lane (g, c) of a warp, g = lane / 4 and c = lane % 4, holds STEPS consecutive steps and the
// channels 4 c .. 4 c + 3: exactly what the matrix unit hands it when the rows of a product are steps in a suitable
// order. So raw step sizes come from the matrix unit, a thread scans its steps in registers, the 8 groups of a warp are
// joined by shuffles, and the warps hand the state on through shared memory.
//
// Defined by the launcher: IO (half_t or bfloat_t, dtype of what flows), RANK, D_STATE, WORDS (32-bit words of a
// projected row that a lane loads).

constexpr int STEPS = 7;
constexpr int GROUPS = 8;
constexpr int TILE = GROUPS * STEPS;
constexpr int CHANNELS = 16;
constexpr int MMA_ROWS = (STEPS + 1) / 2;
constexpr int MMA_STEPS = WORDS == 1 ? 1 : WORDS / 2;
constexpr int CHUNK = WORDS < 4 ? WORDS : 4;  // words of one load
constexpr float LOG2E = 1.4426950408889634f;
constexpr unsigned FULL = 0xffffffffu;
constexpr unsigned EMPTY = 0xffffffffu;  // no arithmetic yields this NaN

// Column of a projected row [dt | B | C] that is in the low half of a lane's word.
__device__ __forceinline__ constexpr int column(int c, int word) {
    return word / CHUNK * (8 * CHUNK) + c * (2 * CHUNK) + word % CHUNK * 2;
}
// And back: the lane, and the word, that hold a column.
__device__ __forceinline__ constexpr int lane_of(int col) { return col % (8 * CHUNK) / (2 * CHUNK); }
__device__ __forceinline__ constexpr int word_of(int col) {
    return col / (8 * CHUNK) * CHUNK + col % (2 * CHUNK) / 2;
}

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

// The first channel of column n of matrix tile j.
__device__ __forceinline__ int channel_of(int j, int n) { return 4 * (n >> 1) + 2 * j + (n & 1); }

// dt_weight of the unit's channels as the second operand of a product over dt.
struct Weights {
    unsigned b[2][WORDS];
    float bias[2][4];  // where the product starts from

    // dt_weight [16, R] of the unit's channels, dt_bias [4] of the lane's, or null.
    __device__ __forceinline__ void load(const float* weight, const float* dt_bias, Lane lane) {
        float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (dt_bias != nullptr) v = ldg(reinterpret_cast<const float4*>(dt_bias));
#pragma unroll
        for (int j = 0; j < 2; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                bias[j][e] = j == 0 ? (e ? v.y : v.x) : (e ? v.w : v.z);
                // The same, but the compiler does not know it, and keeps the four registers that a product starts from.
                bias[j][2 + e] = __shfl_xor_sync(FULL, __shfl_xor_sync(FULL, bias[j][e], 1), 1);
            }
            const float* row = weight + channel_of(j, lane.g) * RANK;
#pragma unroll
            for (int i = 0; i < WORDS; i++) {
                int r = column(lane.c, i);
                float lo = r < RANK ? row[r] : 0.0f, hi = r + 1 < RANK ? row[r + 1] : 0.0f;
                b[j][i] = pack2<IO>(lo, hi);
            }
        }
    }
};

// A lane's words of a row of [dt | B | C], from where its first one is; zero where there is no room for more.
// AGAIN: not what an earlier load of the same row left in registers.
template <bool AGAIN = false>
__device__ __forceinline__ void load_row(unsigned (&w)[WORDS], const IO* row, int room) {
#pragma unroll
    for (int i = 0; i < WORDS; i += CHUNK) {
        const int col = column(0, i);
        bool inside = WORDS <= 4 || col < room;
        const IO* p = row + col;
        if (CHUNK == 1) {
            w[i] = inside ? ldg(reinterpret_cast<const unsigned*>(p)) : 0u;
        } else if (CHUNK == 2) {
            uint2 v = inside ? ldg(reinterpret_cast<const uint2*>(p)) : make_uint2(0u, 0u);
            w[i] = v.x, w[i + 1] = v.y;
        } else {
            uint4 v = make_uint4(0u, 0u, 0u, 0u);
            if (inside) v = AGAIN ? load_global(reinterpret_cast<const uint4*>(p)) : ldg(reinterpret_cast<const uint4*>(p));
            w[i] = v.x, w[i + 1] = v.y, w[i + 2] = v.z, w[i + 3] = v.w;
        }
    }
}

// Positions of a lane's steps: -1 for padding and past the end.
__device__ __forceinline__ void load_positions(int (&pos)[STEPS], const int* table, int t0, int length, bool whole) {
    const int* p = table + t0;
    if (whole) {
#pragma unroll
        for (int s = 0; s < STEPS; s++) pos[s] = ldg(p + s);
    } else {
#pragma unroll
        for (int s = 0; s < STEPS; s++) pos[s] = t0 + s < length ? ldg(p + s) : -1;
    }
}

// raw[s][2 j + e] = bias + dt . weight for a lane's steps s.
__device__ __forceinline__ void project(float (&raw)[2 * MMA_ROWS][4], const unsigned (&rows)[STEPS][WORDS],
                                        const Weights& weights) {
#pragma unroll
    for (int m = 0; m < MMA_ROWS; m++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float d[4];
#pragma unroll
            for (int i = 0; i < MMA_STEPS; i++) {
                constexpr bool k8 = WORDS == 1;
                const bool second = 2 * m + 1 < STEPS;
                if (k8) {
                    const unsigned a[2] = {rows[2 * m][0], second ? rows[(2 * m + 1) % STEPS][0] : 0u};
                    mma_k8<IO>(d, a, weights.b[j][0], weights.bias[j]);
                } else if (column(0, 2 * i) < RANK) {  // some lane's words hold dt
                    const unsigned a[4] = {rows[2 * m][2 * i], second ? rows[(2 * m + 1) % STEPS][2 * i] : 0u,
                                           rows[2 * m][(2 * i + 1) % WORDS],
                                           second ? rows[(2 * m + 1) % STEPS][(2 * i + 1) % WORDS] : 0u};
                    const unsigned b[2] = {weights.b[j][2 * i], weights.b[j][(2 * i + 1) % WORDS]};
                    if (i == 0) {
                        mma_k16<IO>(d, a, b, weights.bias[j]);
                    } else {
                        mma_k16<IO>(d, a, b, d);
                    }
                }
            }
            raw[2 * m][2 * j] = d[0], raw[2 * m][2 * j + 1] = d[1];
            raw[2 * m + 1][2 * j] = d[2], raw[2 * m + 1][2 * j + 1] = d[3];
        }
    }
}

// A column of the rows, for all lanes of a group, from the lane that loaded it.
template <int COLUMN>
__device__ __forceinline__ float broadcast(const unsigned (&row)[WORDS], int lane) {
    unsigned w = __shfl_sync(FULL, row[word_of(COLUMN)], (lane & ~3) | lane_of(COLUMN));
    float2 v = unpack2<IO>(w);
    return COLUMN % 2 ? v.y : v.x;
}

// Affine maps h -> a h + b of every group's steps, for four channels. After `scan`, a lane holds the map of all groups
// before its own (in REVERSE: after), and `total` that of the whole tile.
struct Maps {
    float a[4], b[4];

    template <bool REVERSE>
    __device__ __forceinline__ Maps scan(Lane lane) {
        int place = REVERSE ? GROUPS - 1 - lane.g : lane.g;
#pragma unroll
        for (int d = 1; d < GROUPS; d *= 2) {
#pragma unroll
            for (int q = 0; q < 4; q++) {
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
        for (int q = 0; q < 4; q++) {
            float a0 = REVERSE ? __shfl_down_sync(FULL, a[q], 4) : __shfl_up_sync(FULL, a[q], 4);
            float b0 = REVERSE ? __shfl_down_sync(FULL, b[q], 4) : __shfl_up_sync(FULL, b[q], 4);
            a[q] = place > 0 ? a0 : 1.0f;
            b[q] = place > 0 ? b0 : 0.0f;
        }
        return total;
    }
};

__device__ __forceinline__ void set(float (&v)[4], float4 from) { v[0] = from.x, v[1] = from.y, v[2] = from.z, v[3] = from.w; }
__device__ __forceinline__ float4 get(const float (&v)[4]) { return make_float4(v[0], v[1], v[2], v[3]); }

// How warps hand a state on: for each of N states every warp has a mailbox, which the warp of the next tile empties. A
// box holds EMPTY, or data.
struct Mail {
    float4* boxes;  // [N, W, 4]
    int warp, warps;

    __device__ __forceinline__ void clear(int n, Lane lane) {
        if (lane.g == 0) store_volatile(box(n, warp, lane.c), make_float4(__uint_as_float(EMPTY), 0.0f, 0.0f, 0.0f));
    }

    __device__ __forceinline__ void receive(float (&h)[4], int n, Lane lane) {
        float4* from = box(n, warp == 0 ? warps - 1 : warp - 1, lane.c);
        float4 v;
        do {
            v = load_volatile(from);
        } while (__any_sync(FULL, __float_as_uint(v.x) == EMPTY));
        if (lane.g == 0) store_volatile(from, make_float4(__uint_as_float(EMPTY), 0.0f, 0.0f, 0.0f));
        __syncwarp();
        set(h, v);
    }

    __device__ __forceinline__ void send(const float (&h)[4], int n, int c) { store_volatile(box(n, warp, c), get(h)); }

    __device__ __forceinline__ float4* box(int n, int of, int c) { return boxes + 4 * (n * warps + of) + c; }
};
