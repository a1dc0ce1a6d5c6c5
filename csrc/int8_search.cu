#include "int8_search.cuh"

#include "selection.cuh"
#include "streaming.cuh"

namespace unike {
namespace {

constexpr int kRerankThreads = 256, kRerankWarps = kRerankThreads / 32;
constexpr int kRerankBlocks = kMostLists / kRerankWarps;  // every warp has lists of its own
constexpr int kAhead = 4;                                 // rows of each lane whose bounds are looked at together
constexpr int kLargest = 16319;                           // of a query's codes: 128 high + low, both int8

struct OfQuery {
    float step, offset;      // R q = step * codes, up to `residual`; offset: q . c
    float length, residual;  // no less than the norms
    int start, end;          // rows in question
    uint32_t bound;          // L, ordered
};

struct Problem {
    Int8Keys of;
    const float* q;
    const int64_t* ranges;
    int t, k;
    float* unit;     // [t, d]
    int8_t* codes;   // [2 t, padded]: high digits of query i in row 2 i, low ones in row 2 i + 1
    OfQuery* about;  // [t]
    float* scores;   // [t, n]: s_i
    int* reranked;   // [t]
    int* direct;     // whether this search leaves the codes alone and scores every row
    Lists scanned, scored;
    bool aligned;    // rows of keys: 16-byte aligned
};

// The same for all threads of the block, in a fixed order; `room`: kWarps floats of shared memory.
template <typename Merge>
__device__ __forceinline__ float over_block(float x, float* room, Merge merge) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) x = merge(x, __shfl_xor_sync(kWarp, x, i));
    __syncthreads();
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
    __syncthreads();
    x = room[0];
    for (int i = 1; i < kWarps; ++i) x = merge(x, room[i]);
    return x;
}

// Divided by sqrt(n): orthogonal. n a power of two, at least 64.
__device__ __forceinline__ void hadamard(float* x, int n) {
    for (int half = 1; half < n; half *= 2) {
        __syncthreads();
        for (int i = static_cast<int>(threadIdx.x); i < n / 2; i += kThreads) {
            const int at = i / half * 2 * half + i % half;
            const float a = x[at], b = x[at + half];
            x[at] = a + b, x[at + half] = a - b;
        }
    }
    __syncthreads();
    const float root = __fdiv_rn(1.0f, __fsqrt_rn(static_cast<float>(n)));
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) x[i] *= root;
    __syncthreads();
}

// Whether the next search does without the codes: for 2, 4, ... 64 searches after the first, second, ... in a row that had to score
// more than a third of the rows behind its bound all the same. Searches at the same time may spoil a count, never a result.
__device__ __forceinline__ int decide(Int8Habit& habit) {
    if (habit.rows > 0) {
        const bool wasted = 3 * habit.scored > habit.rows;
        habit.wasted = wasted ? min(habit.wasted + 1, 6) : 0;
        habit.left = wasted ? 1 << habit.wasted : 0;
        habit.rows = habit.scored = 0;
    }
    if (habit.left <= 0) return 0;
    --habit.left;
    return 1;
}

// Whether a search of so many rows tells anything about the codes.
__device__ __forceinline__ bool tells(const OfQuery& about, int k) { return about.end - about.start > 4 * k; }

// Block i: the unit vector and the codes of query i.
__global__ void __launch_bounds__(kThreads) int8_search_prepare(const Problem problem) {
    const Int8Keys& of = problem.of;
    const int d = of.d, padded = of.padded, query = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
    float* x = reinterpret_cast<float*>(shared_memory());  // [padded]
    float* room = x + padded;
    const auto add = [](float a, float b) { return a + b; };
    const auto larger = [](float a, float b) { return fmaxf(a, b); };
    float squares = 0;
    for (int i = thread; i < d; i += kThreads) {
        const float value = problem.q[static_cast<int64_t>(query) * d + i];
        squares = fmaf(value, value, squares);
    }
    const float norm = __fsqrt_rn(over_block(squares, room, add));
    float offset = 0, unit_squares = 0;
    for (int i = thread; i < padded; i += kThreads) {
        const int64_t at = static_cast<int64_t>(query) * d + i;
        const float value = i < d ? __fdiv_rn(problem.q[at], norm == 0 ? INFINITY : norm) : 0.0f;
        if (i < d) problem.unit[at] = value;
        offset = fmaf(value, of.centre[i], offset);
        unit_squares = fmaf(value, value, unit_squares);
        x[i] = value * of.signs[i];
    }
    offset = over_block(offset, room, add);
    unit_squares = over_block(unit_squares, room, add);
    hadamard(x, of.window);
    if (of.window < padded) {
        for (int i = thread; i < padded; i += kThreads) x[i] *= of.signs[padded + i];
        hadamard(x + padded - of.window, of.window);
    }
    float largest = 0;
    for (int i = thread; i < padded; i += kThreads) largest = fmaxf(largest, fabsf(x[i]));
    largest = over_block(largest, room, larger);
    const float step = largest / kLargest, over = step > 0 ? 1 / step : 0.0f;
    float left = 0;
    for (int i = thread; i < padded; i += kThreads) {
        const float rounded = rintf(fminf(fmaxf(x[i] * over, -kLargest), kLargest));  // NaN becomes a number; the query sees no row
        const int code = static_cast<int>(rounded), high = (code + 64) >> 7;
        const float rest = fmaf(-step, static_cast<float>(code), x[i]);
        left = fmaf(rest, rest, left);
        int8_t* const digits = problem.codes + static_cast<int64_t>(2 * query) * padded + i;
        digits[0] = static_cast<int8_t>(high), digits[padded] = static_cast<int8_t>(code - 128 * high);
    }
    left = over_block(left, room, add);
    for (const Bounds& bounds : {problem.scanned.bounds, problem.scored.bounds}) {
        for (int i = thread; i < bounds.width; i += kThreads) bounds.slots[query * bounds.width + i] = 0;
        if (thread == 0) bounds.reached[query] = 0;
    }
    if (thread > 0) return;
    if (query == 0) *problem.direct = decide(*of.habit);
    const int64_t n = of.n;
    const bool finite = unit_squares < INFINITY;
    const int64_t start = problem.ranges ? problem.ranges[2 * query] : 0, end = problem.ranges ? problem.ranges[2 * query + 1] : n;
    OfQuery& mine = problem.about[query];
    mine.step = step, mine.offset = offset;
    // Sums of up to 2^20 squares in parts of 4096 are off by less than a thousandth.
    mine.length = __fsqrt_rn(unit_squares) * 1.001f, mine.residual = __fsqrt_rn(left) * 1.001f;
    mine.start = static_cast<int>(start < 0 ? 0 : start < n ? start : n);
    mine.end = static_cast<int>(!finite || end < 0 ? 0 : end < n ? end : n);
    mine.bound = ordered(-INFINITY);
    problem.reranked[query] = 0;
}

// Codes of keys are the 16 rows of a tile, the two digits of a query two of its 8 columns. A slab: 16 rows of 1024 codes.
template <int Tiles>
struct Scan {
    static constexpr int rows = 16, columns = 1024, stages = 4, width = columns / kWarps, pitch = columns + 16;
    static constexpr int stage_bytes = rows * pitch, across = 8 * Tiles + 1;
    static constexpr int partial = stages * stage_bytes, lists = partial + kWarps * rows * across * 4;
    static constexpr int queries = lists + 4 * Tiles * static_cast<int>(sizeof(List));
    __host__ __device__ static int slabs(int padded) { return (padded + columns - 1) / columns; }
    __host__ __device__ static int q_pitch(int padded) { return slabs(padded) * columns + 16; }
    static int64_t bytes(int padded) { return queries + int64_t{8} * Tiles * q_pitch(padded); }
};

// Block p: units p, p + lists, ... of 16 rows: s of every row and query, and a list of the best s. Moves n padded bytes.
template <int Tiles>
__global__ void __launch_bounds__(kThreads, 1) int8_search_scan(const Problem problem) {
    using At = Scan<Tiles>;
    const Int8Keys& of = problem.of;
    const int n = static_cast<int>(of.n), padded = of.padded, lists = problem.scanned.lists, t = problem.t;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32, g = lane / 4, p = lane % 4;
    unsigned char* shared = shared_memory();
    int* const partial = reinterpret_cast<int*>(shared + At::partial);  // [kWarps, rows, across]
    List* const kept = reinterpret_cast<List*>(shared + At::lists);
    int8_t* const q = reinterpret_cast<int8_t*>(shared + At::queries);
    const int units = (n + At::rows - 1) / At::rows, slabs = At::slabs(padded), q_pitch = At::q_pitch(padded);
    if (thread < 4 * Tiles) kept[thread] = List{0, 0, 0};
    const Bounds& bounds = problem.scanned.bounds;
    Packed known = 0;  // lane j: of the warp's j-th query
    int done = 0;

    int next_unit = static_cast<int>(blockIdx.x), next_slab = 0, next_stage = 0;
    const auto start_next = [&] {
        if (next_unit < units) {
            fetch<At::rows, At::columns>(reinterpret_cast<int8_t*>(shared + next_stage * At::stage_bytes), At::pitch, of.codes, padded,
                                         next_unit * At::rows, n, next_slab * At::columns, padded, true);
            if (++next_slab == slabs) next_slab = 0, next_unit += lists;
        }
        next_stage = (next_stage + 1) % At::stages;
        cp_async_commit();
    };
    // The codes of the keys do not depend on the kernel before this one, those of the queries do.
    for (int i = 0; i < At::stages - 1; ++i) start_next();
    wait_for_previous_kernel();
    if (*problem.direct) {
        cp_async_wait<0>();
        return;
    }
    constexpr int pieces = At::columns / 16;
    for (int i = thread; i < 8 * Tiles * slabs * pieces; i += kThreads) {
        const int row = i / (slabs * pieces), at = i % (slabs * pieces) * 16;
        const bool there = row < 2 * t && at < padded;
        *reinterpret_cast<uint4*>(q + row * q_pitch + at) =
            there ? *reinterpret_cast<const uint4*>(problem.codes + static_cast<int64_t>(row) * padded + at) : uint4{0, 0, 0, 0};
    }

    int32_t sums[Tiles][4] = {};
    int slab = 0, stage = 0;
    for (int unit = static_cast<int>(blockIdx.x); unit < units;) {
        if (slab == 0 && warp + kWarps * lane < t) known = load_relaxed(bounds.reached + warp + kWarps * lane);
        cp_async_wait<At::stages - 2>();
        __syncthreads();
        start_next();
        const int8_t* codes = reinterpret_cast<const int8_t*>(shared + stage * At::stage_bytes) + warp * At::width;
        const int8_t* mine = q + slab * At::columns + warp * At::width;
#pragma unroll
        for (int at = 0; at < At::width; at += 64) {  // two products of 32 columns
            uint32_t left[2][4];
#pragma unroll
            for (int half = 0; half < 2; ++half)
                ldmatrix(left[half], codes + lane % 16 * At::pitch + at + 32 * half + lane / 16 * 16);
#pragma unroll
            for (int j = 0; j < Tiles; ++j) {
                uint32_t right[4];
                ldmatrix(right, mine + (8 * j + lane % 8) * q_pitch + at + lane / 8 * 16);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32_t two[2] = {right[2 * half], right[2 * half + 1]};
                    mma_m16n8k32(sums[j], left[half], two);
                }
            }
        }
        stage = (stage + 1) % At::stages;
        if (++slab < slabs) continue;

        int* const out = partial + warp * At::rows * At::across;
#pragma unroll
        for (int j = 0; j < Tiles; ++j)
#pragma unroll
            for (int x = 0; x < 4; ++x) {
                out[(g + x / 2 * 8) * At::across + 8 * j + 2 * p + x % 2] = sums[j][x];
                sums[j][x] = 0;
            }
        __syncthreads();
        ++done;
        const bool now = (done & (done - 1)) == 0;
        for (int i = warp; i < t; i += kWarps) {
            const OfQuery about = problem.about[i];
            const int row = unit * At::rows + lane;
            Packed candidate = 0;
            if (lane < At::rows && row >= about.start && row < about.end) {
                int64_t dot = 0;  // 128 high + low
#pragma unroll
                for (int part = 0; part < kWarps; ++part) {
                    const int* two = partial + (part * At::rows + lane) * At::across + 2 * i;
                    dot += int64_t{128} * two[0] + two[1];
                }
                const double of_codes = static_cast<double>(about.step) * of.scale[row] * static_cast<double>(dot);
                const float score = static_cast<float>(about.offset + of_codes);
                problem.scores[i * of.n + row] = score;
                if (of.residual[row] < INFINITY) candidate = pack(score, row);
            }
            List list = kept[i];
            heed(list, __shfl_sync(kWarp, known, i / kWarps));
            offer(list, problem.scanned.entries(i, static_cast<int>(blockIdx.x)), candidate, bounds, i, problem.k, lane);
            if (now && i % lists == static_cast<int>(blockIdx.x) % min(lists, t)) raise(bounds, i, problem.k, lane);
            __syncwarp();
            if (lane == 0) kept[i] = list;
            __syncwarp();
        }
        slab = 0, unit += lists;
    }
    __syncthreads();
    if (thread < t) problem.scanned.keep(thread, static_cast<int>(blockIdx.x), kept[thread]);
}

// q . key_row / key_norm of Rows rows and Queries queries (units), by one warp: each in an order that depends on d alone.
template <typename Key, int Rows, int Queries>
__device__ __forceinline__ void exactly(const Problem& problem, const float* const (&units)[Queries], const int (&rows)[Rows],
                                        float (&scores)[Rows][Queries], int lane) {
    constexpr int most = 16 / static_cast<int>(sizeof(Key));
    const Int8Keys& of = problem.of;
    float sums[Rows][Queries] = {};
#pragma unroll(Rows == 1 ? 4 : 1)
    for (int column = most * lane; column < of.d; column += most * 32) {
        alignas(16) Key x[Rows][most];
#pragma unroll
        for (int r = 0; r < Rows; ++r) {
            const Key* key = static_cast<const Key*>(of.keys) + rows[r] * of.key_stride + column;
            if (problem.aligned && column + most <= of.d) {
                *reinterpret_cast<uint4*>(x[r]) = *reinterpret_cast<const uint4*>(key);
            } else {
#pragma unroll
                for (int i = 0; i < most; ++i) x[r][i] = column + i < of.d ? key[i] : narrow<Key>(0.0f);
            }
        }
#pragma unroll
        for (int j = 0; j < Queries; ++j)
#pragma unroll
            for (int i = 0; i < most; ++i) {
                const float unit = column + i < of.d ? units[j][column + i] : 0.0f;
#pragma unroll
                for (int r = 0; r < Rows; ++r) sums[r][j] = fmaf(unit, widen(x[r][i]), sums[r][j]);
            }
    }
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
        const float norm = of.key_norm[rows[r]], over = norm == 0 ? INFINITY : norm;
#pragma unroll
        for (int j = 0; j < Queries; ++j) {
            float sum = sums[r][j];
#pragma unroll
            for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(kWarp, sum, i);
            scores[r][j] = __fdiv_rn(sum, over);
        }
    }
}

// Block i: the k best by s of query i, scored exactly: L is the least of their scores.
template <typename Key>
__global__ void __launch_bounds__(32 * kSelectionWarps, 1) int8_search_bound(const Problem problem) {
    auto& all = *reinterpret_cast<Selection<kSelectionWarps>*>(shared_memory());
    uint32_t& least = *reinterpret_cast<uint32_t*>(&all + 1);
    const int query = static_cast<int>(blockIdx.x), lane = static_cast<int>(threadIdx.x) % 32, k = problem.k;
    wait_for_previous_kernel();
    if (*problem.direct) return;  // nothing is known of any row: minus infinity bounds the k-th best
    if (threadIdx.x == 0) least = ordered(INFINITY);
    select_best(all, problem.scanned, query, k);
    for (int i = static_cast<int>(threadIdx.x) / 32; i < k; i += kSelectionWarps) {
        float score[1][1] = {{-INFINITY}};  // fewer than k: nothing bounds the k-th best
        if (all.winners[i] != 0) {
            const float* const unit[1] = {problem.unit + static_cast<int64_t>(query) * problem.of.d};
            const int row[1] = {static_cast<int>(index_of(all.winners[i]))};
            exactly<Key>(problem, unit, row, score, lane);
        }
        if (lane == 0) atomicMin(&least, ordered(fabsf(score[0][0]) < INFINITY ? score[0][0] : -INFINITY));
    }
    __syncthreads();
    OfQuery& about = problem.about[query];
    if (threadIdx.x != 0) return;
    about.bound = least;
    if (tells(about, k)) atomicAdd(&problem.of.habit->rows, static_cast<unsigned long long>(about.end - about.start));
}

// A warp: rows in groups of 32 kAhead; scores those that can be among the k best of a query, and lists the best. Moves 8 n + 4 n t
// bytes (none of them if all rows are scored) and each row that it scores once for all queries. For one query, 8 rows at a time: as
// many loads under way as one query has; for more, 4 rows by 4 queries.
template <typename Key, int Queries>
__global__ void __launch_bounds__(kRerankThreads, 1) int8_search_rerank(const Problem problem) {
    const Int8Keys& of = problem.of;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, t = problem.t;
    const int list = static_cast<int>(blockIdx.x) * kRerankWarps + warp, lists = problem.scored.lists;
    constexpr int together = Queries == 1 ? 8 : 4;
    List* const kept = reinterpret_cast<List*>(shared_memory()) + warp * t;
    const float root = __fsqrt_rn(static_cast<float>(of.padded)) * 127.001f;
    for (int i = lane; i < t; i += 32) kept[i] = List{0, 0, 0};
    __syncwarp();
    wait_for_previous_kernel();
    const bool direct = *problem.direct;
    for (int64_t first = int64_t{32 * kAhead} * list; first < of.n; first += int64_t{32 * kAhead} * lists) {
        float residual[kAhead], scale[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
            const int64_t row = first + 32 * j + lane;
            const bool there = !direct && row < of.n;
            residual[j] = there ? of.residual[row] : 0, scale[j] = there ? of.scale[row] : 0;
        }
        uint32_t mine[kAhead] = {}, any[kAhead] = {};  // rows for query `lane`, for any query
        for (int i = 0; i < t; ++i) {
            const OfQuery about = problem.about[i];
            if (about.end <= first || about.start >= first + 32 * kAhead) continue;
            const float bound = unordered(about.bound);
            int count = 0;
#pragma unroll
            for (int j = 0; j < kAhead; ++j) {
                const int64_t row = first + 32 * j + lane;
                bool wanted = row >= about.start && row < about.end;
                // In double: the sums must not be rounded below what they are. A residual of infinity always reaches the bound.
                if (wanted && !direct)
                    wanted = !(problem.scores[i * of.n + row] + static_cast<double>(about.length) * residual[j] +
                                   static_cast<double>(about.residual) * scale[j] * root < bound);
                const uint32_t votes = __ballot_sync(kWarp, wanted);
                if (lane == i) mine[j] = votes;
                any[j] |= votes;
                count += __popc(votes);
            }
            if (lane > 0 || count == 0) continue;
            atomicAdd(&problem.reranked[i], count);
            if (!direct && tells(about, problem.k)) atomicAdd(&of.habit->scored, static_cast<unsigned long long>(count));
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
            for (uint32_t left = any[j]; left != 0;) {
                int rows[together];  // the last one again where there are fewer
                uint32_t these = 0;
#pragma unroll
                for (int r = 0; r < together; ++r) {
                    const uint32_t next = left & (~left + 1);
                    rows[r] = next != 0 ? static_cast<int>(first) + 32 * j + __ffs(static_cast<int>(next)) - 1 : rows[r > 0 ? r - 1 : 0];
                    these |= next, left ^= next;
                }
                for (int tile = 0; tile < t; tile += Queries) {
                    const float* units[Queries];
                    uint32_t wanted[Queries], some = 0;
#pragma unroll
                    for (int x = 0; x < Queries; ++x) {
                        const int i = min(tile + x, t - 1);
                        units[x] = problem.unit + static_cast<int64_t>(i) * of.d;
                        wanted[x] = __shfl_sync(kWarp, mine[j], i) & (tile + x < t ? these : 0u);
                        some |= wanted[x];
                    }
                    if (some == 0) continue;
                    float scores[together][Queries];
                    exactly<Key>(problem, units, rows, scores, lane);
#pragma unroll
                    for (int x = 0; x < Queries; ++x) {
                        if (wanted[x] == 0) continue;
                        const int i = tile + x;
                        Packed candidate = 0;
#pragma unroll
                        for (int r = 0; r < together; ++r)
                            if (lane == (rows[r] - static_cast<int>(first)) % 32 && wanted[x] >> lane & 1)
                                candidate = pack(scores[r][x], rows[r]);
                        List list_of = kept[i];
                        offer(list_of, problem.scored.entries(i, list), candidate, problem.scored.bounds, i, problem.k, lane);
                        __syncwarp();
                        if (lane == 0) kept[i] = list_of;
                        __syncwarp();
                    }
                }
            }
        }
    }
    for (int i = lane; i < t; i += 32) problem.scored.keep(i, list, kept[i]);
}

// ------------------------------------------------------------------------------------------------- the host's part

struct Plan {
    void (*scan)(Problem);
    int scan_bytes, scan_lists, rerank_blocks;
    int64_t unit, codes, about, direct, scores, scanned, scored, lists, bytes;  // offsets in the workspace, and its size
};

cudaError_t make_plan(const Int8Keys& keys, int t, int k, Plan& plan) {
    Device device;
    const cudaError_t error = current_device(device);
    if (error != cudaSuccess) return error;
    const auto take = [&](auto scan, int64_t bytes) { plan.scan = scan, plan.scan_bytes = static_cast<int>(bytes); };
    if (t <= 4) take(&int8_search_scan<1>, Scan<1>::bytes(keys.padded));
    if (t > 4 && t <= 8) take(&int8_search_scan<2>, Scan<2>::bytes(keys.padded));
    if (t > 8) take(&int8_search_scan<4>, Scan<4>::bytes(keys.padded));
    if (plan.scan_bytes > device.shared_bytes) return cudaErrorInvalidValue;
    const int64_t units = (keys.n + 15) / 16, groups = (keys.n + 32 * kAhead - 1) / (32 * kAhead);
    const int64_t blocks = (groups + kRerankWarps - 1) / kRerankWarps;
    plan.scan_lists = static_cast<int>(units < device.multiprocessors ? units : device.multiprocessors);
    plan.rerank_blocks = static_cast<int>(blocks < kRerankBlocks ? blocks : kRerankBlocks);
    int64_t end = 0;
    const auto place = [&](int64_t& at, int64_t bytes) { at = end, end += (bytes + 127) / 128 * 128; };
    place(plan.unit, int64_t{4} * t * keys.d);
    place(plan.codes, int64_t{2} * t * keys.padded);
    place(plan.about, static_cast<int64_t>(sizeof(OfQuery)) * t);
    place(plan.direct, 4);
    place(plan.scores, int64_t{4} * t * keys.n);
    place(plan.scanned, Bounds::bytes(t, k));
    place(plan.scored, Bounds::bytes(t, k));
    const int lists = plan.rerank_blocks * kRerankWarps;  // the scan's are read before these are written
    place(plan.lists, Lists::bytes(t, lists > plan.scan_lists ? lists : plan.scan_lists));
    plan.bytes = end;
    return cudaSuccess;
}

template <typename Key>
cudaError_t search(const Plan& plan, const Problem& problem, float* scores, int64_t* indices, cudaStream_t stream) {
    const int t = problem.t;
    Launch how;
    how.stream = stream, how.block = kThreads, how.grid = t, how.shared_bytes = (problem.of.padded + kWarps) * 4;
    cudaError_t error = launch(int8_search_prepare, how, problem);
    how.early = true;
    if (error != cudaSuccess) return error;
    if (problem.of.n > 0) {
        how.grid = plan.scan_lists, how.shared_bytes = plan.scan_bytes;
        error = launch(plan.scan, how, problem);
        if (error != cudaSuccess) return error;
        how.grid = t, how.block = 32 * kSelectionWarps, how.shared_bytes = sizeof(Selection<kSelectionWarps>) + 8;
        error = launch(int8_search_bound<Key>, how, problem);
        if (error != cudaSuccess) return error;
        how.grid = plan.rerank_blocks, how.block = kRerankThreads;
        how.shared_bytes = kRerankWarps * t * static_cast<int>(sizeof(List));
        error = launch(t == 1 ? &int8_search_rerank<Key, 1> : &int8_search_rerank<Key, 4>, how, problem);
        if (error != cudaSuccess) return error;
    }
    return select(problem.scored, t, problem.k, scores, indices, true, stream);
}

}  // namespace

cudaError_t int8_search_workspace(const Int8Keys& keys, int t, int k, int64_t& bytes) {
    Plan plan;
    const cudaError_t error = make_plan(keys, t, k, plan);
    if (error == cudaSuccess) bytes = plan.bytes;
    return error;
}

cudaError_t int8_search(const Int8Keys& keys, const float* q, const int64_t* ranges, int t, int k, void* workspace, float* scores,
                        int64_t* indices, int* reranked, cudaStream_t stream) {
    if (t == 0 || k == 0) return cudaSuccess;
    Plan plan;
    const cudaError_t error = make_plan(keys, t, k, plan);
    if (error != cudaSuccess) return error;
    unsigned char* const base = static_cast<unsigned char*>(workspace);
    Problem problem;
    problem.of = keys, problem.q = q, problem.ranges = ranges, problem.t = t, problem.k = k;
    problem.unit = reinterpret_cast<float*>(base + plan.unit);
    problem.codes = reinterpret_cast<int8_t*>(base + plan.codes);
    problem.about = reinterpret_cast<OfQuery*>(base + plan.about);
    problem.scores = reinterpret_cast<float*>(base + plan.scores);
    problem.reranked = reranked;
    problem.direct = reinterpret_cast<int*>(base + plan.direct);
    problem.scanned = Lists::at(base + plan.lists, t, plan.scan_lists, Bounds::at(base + plan.scanned, t, k));
    problem.scored =
        Lists::at(base + plan.lists, t, plan.rerank_blocks * kRerankWarps, Bounds::at(base + plan.scored, t, k));
    problem.aligned = reinterpret_cast<uintptr_t>(keys.keys) % 16 == 0 && keys.key_stride * bytes_of(keys.key_dtype) % 16 == 0;
    if (keys.key_dtype == Dtype::float32) return search<float>(plan, problem, scores, indices, stream);
    if (keys.key_dtype == Dtype::bfloat16) return search<bf16>(plan, problem, scores, indices, stream);
    return search<fp16>(plan, problem, scores, indices, stream);
}

}  // namespace unike
