// What the kernels of the 1-D scan share: how a warp holds a tile of sequences, and how tiles come to it.
//
// A warp scans CHANNELS = 4 neighbouring channels of a batch item, a tile of 64 steps at a time. Lane (g, c), g =
// lane / 4 and c = lane % 4, holds STEPS = 8 consecutive steps of channel c: 16 bytes of a 16-bit row, so that a warp
// reads and writes whole lines. It scans them in registers, three rounds of shuffles join the GROUPS = 8 lanes of a
// channel, and the state that goes to the next tile waits in shared memory. B and C of a tile are converted once for
// all warps of a block. While a tile is worked at, the next one is on its way to shared memory.
//
// Defined by the launcher: IO (dtype of u, y and their gradients), DELTA, B_IO and C_IO (of delta, B and C), D_STATE,
// SOFTPLUS, WARPS (of a block), MAX_WARPS (of a multiprocessor), VECTOR (rows start at multiples of 16 bytes and hold
// whole lanes), SUMMARY (only what a segment does to the state).

constexpr int STEPS = 8;
constexpr int GROUPS = 8;
constexpr int TILE = GROUPS * STEPS;
constexpr int CHANNELS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int STATES = CHANNELS * D_STATE;  // of a warp
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
constexpr unsigned FULL = 0xffffffffu;

// softplus to a relative error of 2e-7: log1p(e) / e is a minimax polynomial on [0, 1].
__device__ __forceinline__ float softplus(float x) {
    float e = ex2(-fabsf(x * LOG2E));
    float p = 0.0052326940931379795f;
    p = fmaf(p, e, -0.02950523979961872f);
    p = fmaf(p, e, 0.07822595536708832f);
    p = fmaf(p, e, -0.13663245737552643f);
    p = fmaf(p, e, 0.19106006622314453f);
    p = fmaf(p, e, -0.2484298199415207f);
    p = fmaf(p, e, 0.3331909775733948f);
    p = fmaf(p, e, -0.4999949336051941f);
    p = fmaf(p, e, 0.9999999403953552f);
    return fmaf(p, e, fmaxf(x, 0.0f));
}

// 8 values of a row on their way through shared memory. Slots of 32 neighbours interleave, 16 bytes each.
template <typename T>
constexpr int PIECES = sizeof(T) / 2;  // of a slot, 16 bytes each

constexpr int PROJECTION_PIECES = PIECES<B_IO> > PIECES<C_IO> ? PIECES<B_IO> : PIECES<C_IO>;

__device__ __forceinline__ unsigned bits(const float* p) { return __float_as_uint(ldg(p)); }
__device__ __forceinline__ unsigned bits(const half_t* p) { return ldg(&p->v); }
__device__ __forceinline__ unsigned bits(const bfloat_t* p) { return ldg(&p->v); }

// Starts to load the first `count` of 8 values, the others being zero.
template <typename T>
__device__ __forceinline__ void fetch(uint4* slot, const T* from, int count) {
    constexpr int PER_WORD = 4 / sizeof(T), PER_PIECE = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < PIECES<T>; i++) {
        if (VECTOR) {
            cp_async16_or_zero(slot + 32 * i, from + PER_PIECE * i, count > 0);
            continue;
        }
        unsigned words[4] = {0u, 0u, 0u, 0u};
#pragma unroll
        for (int j = 0; j < PER_PIECE; j++) {
            const int s = PER_PIECE * i + j;
            if (s < count) words[j / PER_WORD] |= bits(from + s) << (j % PER_WORD * 16);
        }
        slot[32 * i] = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

__device__ __forceinline__ void unpack(float (&v)[STEPS], const uint4* slot, float) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint4 w = slot[32 * i];
        v[4 * i] = __uint_as_float(w.x), v[4 * i + 1] = __uint_as_float(w.y);
        v[4 * i + 2] = __uint_as_float(w.z), v[4 * i + 3] = __uint_as_float(w.w);
    }
}

template <typename T>
__device__ __forceinline__ void unpack(float (&v)[STEPS], const uint4* slot, T) {
    const uint4 w = *slot;
    const float2 a = unpack2<T>(w.x), b = unpack2<T>(w.y), c = unpack2<T>(w.z), d = unpack2<T>(w.w);
    v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y, v[4] = c.x, v[5] = c.y, v[6] = d.x, v[7] = d.y;
}

// What `fetch` loaded, after the wait for it.
template <typename T>
__device__ __forceinline__ void receive(float (&v)[STEPS], const uint4* slot) {
    unpack(v, slot, T());
}

__device__ __forceinline__ void store_pieces(float* to, const float (&v)[STEPS]) {
    float4* pieces = reinterpret_cast<float4*>(to);
    store_global(pieces, make_float4(v[0], v[1], v[2], v[3]));
    store_global(pieces + 1, make_float4(v[4], v[5], v[6], v[7]));
}

template <typename T>
__device__ __forceinline__ void store_pieces(T* to, const float (&v)[STEPS]) {
    float words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = __uint_as_float(pack2<T>(v[2 * i], v[2 * i + 1]));
    store_global(reinterpret_cast<float4*>(to), make_float4(words[0], words[1], words[2], words[3]));
}

// Stores the first `count` of 8 values.
template <typename T>
__device__ __forceinline__ void store(T* to, const float (&v)[STEPS], int count) {
    if (VECTOR) {
        if (count > 0) store_pieces(to, v);
    } else {
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            if (s < count) to[s] = from_float<T>(v[s]);
        }
    }
}

__device__ __forceinline__ int clamp(int x, int most) { return max(0, min(x, most)); }

// Where shared memory, [N, CHANNELS] without conflicts, has state i of a warp, of [CHANNELS, N] in global memory.
__device__ __forceinline__ int place_of(int i) { return i % D_STATE * CHANNELS + i / D_STATE; }

// Which channels and steps a block, a warp and a lane work at.
struct Place {
    int lane, warp, g, c;
    int block, segment, group, batch;
    int channels;    // of the warp, at most CHANNELS
    int first, d;    // its first channel, and the lane's (a valid one)
    bool valid;      // the lane has a channel
    int begin, end;  // tiles of the segment

    template <typename P>
    __device__ __forceinline__ explicit Place(const P& p) {
        lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane >> 2, c = lane & 3;
        unsigned i = blockIdx.x;
        block = i % p.blocks, i /= p.blocks;
        segment = i % p.num_segments, i /= p.num_segments;
        group = i % p.groups, batch = i / p.groups;
        const int of_group = p.dim / p.groups, start = (block * WARPS + warp) * CHANNELS;
        channels = clamp(of_group - start, CHANNELS);
        valid = c < channels;
        first = group * of_group + start;
        d = valid ? first + c : group * of_group;
        begin = segment * p.segment_tiles, end = min(begin + p.segment_tiles, (p.length + TILE - 1) / TILE);
    }

    // How many of a lane's steps of a tile there are.
    __device__ __forceinline__ int count(int tile, int length) const {
        return valid ? clamp(length - tile * TILE - g * STEPS, STEPS) : 0;
    }
};

constexpr int ROW = 2 * GROUPS;  // of a state's B or C of a tile, in float4

template <typename T, typename U>
constexpr bool SAME = false;
template <typename T>
constexpr bool SAME<T, T> = true;

// B and C of a tile as float32 in shared memory, [2, 2 N, 2, GROUPS, 4] with the tiles in turn: the lanes of a channel
// find halves of their steps side by side. Tiles are fetched one after the other, DIRECTION 1 or -1.
//
// A thread brings 8 steps of B or of C, of every STRIDE-th state.
template <int DIRECTION>
struct Projections {
    static constexpr int STRIDE = THREADS / (2 * GROUPS), COUNT = (D_STATE + STRIDE - 1) / STRIDE;
    static constexpr int RAW_BYTES = 512 * ((D_STATE + 1) / 2) * PROJECTION_PIECES;
    static constexpr int BYTES = 16 * TILE * D_STATE;

    uint4* raw;
    float4* staged;
    const unsigned char* from;  // of its first state
    int n, is_C, i;             // its first state and steps

    template <typename P>
    __device__ __forceinline__ Projections(const P& p, const Place& at, int tile, unsigned char*& memory)
        : raw(reinterpret_cast<uint4*>(memory) + threadIdx.x / 32 * 32 * PROJECTION_PIECES + threadIdx.x % 32),
          staged(reinterpret_cast<float4*>(memory + RAW_BYTES)),
          n(threadIdx.x / (2 * GROUPS)),
          is_C(threadIdx.x / GROUPS & 1),
          i(threadIdx.x % GROUPS) {
        const long long t = tile * TILE + i * STEPS;
        from = is_C ? reinterpret_cast<const unsigned char*>(p.C + at.batch * p.C_b + at.group * p.C_g + n * p.C_n + t)
                    : reinterpret_cast<const unsigned char*>(p.B + at.batch * p.B_b + at.group * p.B_g + n * p.B_n + t);
        memory += RAW_BYTES + BYTES;
    }

    __device__ __forceinline__ uint4* slot(int j) const { return raw + j * THREADS * PROJECTION_PIECES; }

    template <typename P>
    __device__ __forceinline__ void start(const P& p, int tile) {
        const int count = clamp(p.length - tile * TILE - i * STEPS, STEPS);
#pragma unroll VECTOR ? COUNT : 1  // single values take registers
        for (int j = 0; j < COUNT; j++) {
            if (n + j * STRIDE >= D_STATE) continue;
            if (SAME<B_IO, C_IO> || !is_C) {
                const long long stride = is_C ? p.C_n : p.B_n;
                fetch(slot(j), reinterpret_cast<const B_IO*>(from) + j * STRIDE * stride, count);
            } else {
                fetch(slot(j), reinterpret_cast<const C_IO*>(from) + j * STRIDE * p.C_n, count);
            }
        }
        from += DIRECTION * TILE * (int)(SAME<B_IO, C_IO> || !is_C ? sizeof(B_IO) : sizeof(C_IO));
    }

    // Of the tile that the thread's copies brought.
    __device__ __forceinline__ void convert(int turn) const {
#pragma unroll
        for (int j = 0; j < COUNT; j++) {
            if (n + j * STRIDE >= D_STATE) continue;
            float v[STEPS];
            if (SAME<B_IO, C_IO> || !is_C) {
                receive<B_IO>(v, slot(j));
            } else {
                receive<C_IO>(v, slot(j));
            }
            float4* to = staged + ((2 * turn + is_C) * D_STATE + n + j * STRIDE) * ROW + i;
            to[0] = make_float4(v[0], v[1], v[2], v[3]), to[GROUPS] = make_float4(v[4], v[5], v[6], v[7]);
        }
    }

    // Where B of state 0 is; those of the other states follow, and then C.
    __device__ __forceinline__ const float4* row(int turn, int g) const {
        return staged + turn * 2 * D_STATE * ROW + g;
    }
};

__device__ __forceinline__ void read(float (&v)[STEPS], const float4* row) {
    const float4 lo = row[0], hi = row[GROUPS];
    v[0] = lo.x, v[1] = lo.y, v[2] = lo.z, v[3] = lo.w, v[4] = hi.x, v[5] = hi.y, v[6] = hi.z, v[7] = hi.w;
}

// Step sizes of a lane, zero where there is no step: it leaves the state alone.
__device__ __forceinline__ void make_deltas(float (&delta)[STEPS], float bias, int count) {
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        delta[s] += bias;
        if (SOFTPLUS) delta[s] = softplus(delta[s]);
    }
    if (count < STEPS) {
        rarely();
#pragma unroll
        for (int s = 0; s < STEPS; s++) delta[s] = s < count ? delta[s] : 0.0f;
    }
}

__device__ __forceinline__ float sum(const float (&v)[STEPS]) {
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

__device__ __forceinline__ float sum_groups(float v) {
#pragma unroll
    for (int step = CHANNELS; step < 32; step *= 2) v += __shfl_xor_sync(FULL, v, step);
    return v;
}

// Joins the affine maps h -> a h + b of the lanes of a channel, one after the other (REVERSE: from the last to the
// first), where h is `start` before the first. Returns h before the lane's own map; the first lane alone gets `end`, h
// after all maps.
template <bool REVERSE>
__device__ __forceinline__ float join(float a, float b, float start, float& end, int lane) {
    const int place = REVERSE ? GROUPS - 1 - (lane >> 2) : lane >> 2;
    if (place == 0) b = fmaf(a, start, b);
#pragma unroll
    for (int d = 1; d < GROUPS; d *= 2) {
        const float b0 = REVERSE ? __shfl_down_sync(FULL, b, 4 * d) : __shfl_up_sync(FULL, b, 4 * d);
        const float a0 = REVERSE ? __shfl_down_sync(FULL, a, 4 * d) : __shfl_up_sync(FULL, a, 4 * d);
        if (place >= d) {
            b = fmaf(a, b0, b);
            if (2 * d < GROUPS) a *= a0;
        }
    }
    end = __shfl_sync(FULL, b, (REVERSE ? lane + 4 : lane + 28) & 31);
    return place == 0 ? start : end;
}
