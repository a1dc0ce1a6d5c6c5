#include "cosine_topk.cuh"

#include <device.cuh>

#include "selection.cuh"
#include "streaming.cuh"

// The scan: a persistent grid; a block takes units of 16 to 64 rows in turn and streams each through shared memory in slabs of a
// few hundred columns, several slabs ahead: each thread copies 16 bytes at a time, or, from sm_90 on and where rows are whole slabs,
// the copy engine brings a slab of a row at a time. Its eight warps share the columns of a slab, add up their partial products
// at the end of a unit, and each warp then offers the scores of its own queries to their lists, which keep the best. What k rows are
// known to reach anywhere is told to all blocks, so that few scores are kept. The block that comes last takes the best of the
// lists, a warp for each query; for many queries another kernel does, a block for each.
namespace unike {
namespace {

constexpr int kShort = 8;      // candidates
constexpr int kCounter = 128;  // bytes of the zeros in front of the bounds

struct Problem {
    Search of;
    Lists to;                 // one for each query and block
    uint32_t* arrived;        // blocks that have done all their units; null: another kernel chooses
    float* scores;            // [t, k]
    int64_t* indices;         // [t, k]
    bool aligned, q_aligned;  // rows of keys, of queries: 16-byte aligned
};

// ------------------------------------------------------------------------------------------------- products

// Products on tensor cores: keys are the 16 rows of a tile, queries its 8 columns, so that few queries waste little.
// RowWarps x RowTiles tiles of rows, the other 8 / RowWarps warps share the columns of a slab.
template <typename T, int RowWarps, int RowTiles, int QueryTiles, int Columns, bool Resident>
struct TensorCores {
    using Key = T;
    using Query = T;
    static constexpr int rows = 16 * RowWarps * RowTiles, queries = 8 * QueryTiles, columns = Columns, stages = 4;
    static constexpr int parts = kWarps / RowWarps;  // partial sums of every score
    static constexpr bool resident = Resident;       // the queries stay in shared memory, or come along with every slab
    static constexpr int width = Columns / parts;    // of a warp
    static_assert(width % 32 == 0, "");

    float sums[RowTiles][QueryTiles][4], squares[RowTiles][2];

    __device__ __forceinline__ void reset() {
#pragma unroll
        for (int i = 0; i < RowTiles; ++i) {
            squares[i][0] = squares[i][1] = 0;
#pragma unroll
            for (int j = 0; j < QueryTiles; ++j)
#pragma unroll
                for (int x = 0; x < 4; ++x) sums[i][j][x] = 0;
        }
    }

    // keys [rows, pitch], q [queries, q_pitch]: one slab. Tensor cores cut sums off instead of rounding them: they only add up
    // the products of this slab, which are then added in float32.
    __device__ __forceinline__ void add(const T* keys, int pitch, const T* q, int q_pitch, bool norms) {
        const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
        const int first_row = warp % RowWarps * RowTiles * 16, first = warp / RowWarps * width;
        float part[RowTiles][QueryTiles][4] = {};
#pragma unroll
        for (int at = 0; at < width; at += 32) {
            uint32_t right[QueryTiles][4];
#pragma unroll
            for (int j = 0; j < QueryTiles; ++j)
                ldmatrix(right[j], q + (8 * j + lane % 8) * q_pitch + first + at + lane / 8 * 8);
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int i = 0; i < RowTiles; ++i) {
                    uint32_t left[4];
                    ldmatrix(left, keys + (first_row + 16 * i + lane % 16) * pitch + first + at + 16 * half + lane / 16 * 8);
#pragma unroll
                    for (int j = 0; j < QueryTiles; ++j) {
                        const uint32_t two[2] = {right[j][2 * half], right[j][2 * half + 1]};
                        mma_m16n8k16<T>(part[i][j], left, two);
                    }
                    if (norms) {
#pragma unroll
                        for (int x = 0; x < 4; ++x) {
                            const float2 pair = widen_pair<T>(left[x]);
                            squares[i][x % 2] = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, squares[i][x % 2]));
                        }
                    }
                }
        }
#pragma unroll
        for (int i = 0; i < RowTiles; ++i)
#pragma unroll
            for (int j = 0; j < QueryTiles; ++j)
#pragma unroll
                for (int x = 0; x < 4; ++x) sums[i][j][x] += part[i][j][x];
    }

    // out [parts, rows, queries + 1]: this warp's part of every score, and of the rows' squares behind them.
    __device__ __forceinline__ void store(float* out, bool norms) {
        const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
        const int g = lane / 4, p = lane % 4;
        out += (warp / RowWarps * rows + warp % RowWarps * RowTiles * 16) * (queries + 1);
#pragma unroll
        for (int i = 0; i < RowTiles; ++i) {
#pragma unroll
            for (int j = 0; j < QueryTiles; ++j)
#pragma unroll
                for (int x = 0; x < 4; ++x)
                    out[(16 * i + g + x / 2 * 8) * (queries + 1) + 8 * j + 2 * p + x % 2] = sums[i][j][x];
            if (norms) {
#pragma unroll
                for (int x = 0; x < 2; ++x) {
                    float square = squares[i][x];
                    square += __shfl_xor_sync(kWarp, square, 1);
                    square += __shfl_xor_sync(kWarp, square, 2);
                    if (p == 0) out[(16 * i + g + 8 * x) * (queries + 1) + queries] = square;
                }
            }
        }
    }
};

// Products in float32, for keys or queries that are: two lanes for each row, four queries each.
template <typename T>
struct CudaCores {
    using Key = T;
    using Query = float;
    static constexpr int rows = 16, queries = 8, columns = 256, stages = 3, parts = kWarps, width = columns / parts;
    static constexpr bool resident = false;

    float sums[4], square;

    __device__ __forceinline__ void reset() {
        square = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[j] = 0;
    }

    __device__ __forceinline__ void add(const T* keys, int pitch, const float* q, int q_pitch, bool) {
        const int lane = static_cast<int>(threadIdx.x) % 32, first = static_cast<int>(threadIdx.x) / 32 * width;
        keys += lane % 16 * pitch + first;
        q += lane / 16 * 4 * q_pitch + first;
        float part[4] = {}, part_square = 0;
#pragma unroll
        for (int at = 0; at < width; at += 4) {
            const float4 key = widen_four(keys + at);
            part_square = fmaf(key.x, key.x, fmaf(key.y, key.y, fmaf(key.z, key.z, fmaf(key.w, key.w, part_square))));
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float4 query = widen_four(q + j * q_pitch + at);
                part[j] = fmaf(key.x, query.x, fmaf(key.y, query.y, fmaf(key.z, query.z, fmaf(key.w, query.w, part[j]))));
            }
        }
        square += part_square;
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[j] += part[j];
    }

    __device__ __forceinline__ void store(float* out, bool) {
        const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
        out += (warp * rows + lane % 16) * (queries + 1);
#pragma unroll
        for (int j = 0; j < 4; ++j) out[lane / 16 * 4 + j] = sums[j];
        if (lane < 16) out[queries] = square;
    }
};

// ------------------------------------------------------------------------------------------------- the scan

struct OfQuery {
    List list;
    int start, end;  // the rows that it sees
    float norm;      // of the query, infinity for zero: a zero vector has cosine 0
};

// The last block's, where the scan's was: each warp chooses for one query at a time. Then a flag.
constexpr int kChoice = kWarps * static_cast<int>(sizeof(Selection<1>)) + 16;

// Where everything lies in a block's shared memory, in bytes.
template <class Math>
struct Layout {
    static constexpr int pad = 16;  // bytes behind each row: eight rows then lie in different banks
    static constexpr int pitch = Math::columns + pad / static_cast<int>(sizeof(typename Math::Key));
    static constexpr int staged_q_pitch = Math::columns + pad / static_cast<int>(sizeof(typename Math::Query));
    static constexpr int key_bytes = Math::rows * pitch * static_cast<int>(sizeof(typename Math::Key));
    static constexpr int stage_bytes =
        key_bytes + (Math::resident ? 0 : Math::queries * staged_q_pitch * static_cast<int>(sizeof(typename Math::Query)));
    static constexpr int of_queries = Math::stages * stage_bytes;
    static constexpr int barriers = (of_queries + Math::queries * static_cast<int>(sizeof(OfQuery)) + 7) / 8 * 8;
    static constexpr int partial = barriers + Math::stages * static_cast<int>(sizeof(CopyBarrier));
    static constexpr int queries = (partial + Math::parts * Math::rows * (Math::queries + 1) * 4 + 15) / 16 * 16;

    // Whole slabs of columns, and elements between the rows of resident queries.
    __host__ __device__ static int slabs(int d) { return (d + Math::columns - 1) / Math::columns; }
    __host__ __device__ static int q_pitch(int d) {
        return Math::resident ? slabs(d) * Math::columns + pad / static_cast<int>(sizeof(typename Math::Query)) : staged_q_pitch;
    }
    __host__ __device__ static int64_t bytes(int d) {
        const int64_t rows = Math::resident ? Math::queries : 0;
        const int64_t scan = queries + rows * q_pitch(d) * static_cast<int64_t>(sizeof(typename Math::Query));
        return scan > kChoice ? scan : kChoice;
    }
};

// The norm of a row of d elements, by one warp.
template <typename T>
__device__ __forceinline__ float norm_of(const T* row, int d, bool aligned, int lane) {
    constexpr int most = 16 / static_cast<int>(sizeof(T));
    float sum = 0;
    for (int column = most * lane; column < d; column += most * 32) {
        alignas(16) T x[most];
        if (aligned && column + most <= d) {
            *reinterpret_cast<uint4*>(x) = *reinterpret_cast<const uint4*>(row + column);
        } else {
#pragma unroll
            for (int i = 0; i < most; ++i) x[i] = column + i < d ? row[column + i] : narrow<T>(0.0f);
        }
#pragma unroll
        for (int i = 0; i < most; ++i) sum = fmaf(widen(x[i]), widen(x[i]), sum);
    }
#pragma unroll
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(kWarp, sum, i);
    return __fsqrt_rn(sum);
}

// Block (p, y): units p, p + lists, ... for queries [y * Math::queries, ...). Moves n d (keys, once per tile of queries), 8 bytes for
// each query and unit, and 8 width for each query the first, second, fourth, ... time. Bulk: d is a multiple of Math::columns, and
// rows of keys are 16-byte aligned.
template <class Math, bool Bulk>
__global__ void __launch_bounds__(kThreads, 1) cosine_topk_stream(const Problem problem) {
    using Key = typename Math::Key;
    using Query = typename Math::Query;
    using At = Layout<Math>;
    static_assert(!Bulk || Math::resident, "queries that come along with every slab are not counted by its barrier");
    const Search& of = problem.of;
    const int n = static_cast<int>(of.n), d = of.d, k = of.k, lists = problem.to.lists;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int first_query = static_cast<int>(blockIdx.y) * Math::queries, count = min(Math::queries, of.t - first_query);
    const Key* keys = static_cast<const Key*>(of.keys);
    const Query* q = static_cast<const Query*>(of.q);
    const bool norms = of.key_norm == nullptr;

    unsigned char* shared = shared_memory();
    OfQuery* const of_query = reinterpret_cast<OfQuery*>(shared + At::of_queries);
    float* const partial = reinterpret_cast<float*>(shared + At::partial);
    CopyBarrier* const barriers = reinterpret_cast<CopyBarrier*>(shared + At::barriers);
    Query* const resident = reinterpret_cast<Query*>(shared + At::queries);
    const int slabs = At::slabs(d), q_pitch = At::q_pitch(d);

    allow_next_kernel();  // it waits for this one's end, but is there by then
    // Units keep their places whatever the ranges are.
    for (int i = thread; i < Math::queries; i += kThreads) {
        OfQuery& mine = of_query[i];
        mine.list = List{0, 0, 0};
        const int64_t* range = of.ranges == nullptr || i >= count ? nullptr : of.ranges + 2 * (first_query + i);
        const int64_t start = range ? range[0] : 0, end = range ? range[1] : of.n;
        mine.start = static_cast<int>(start < 0 ? 0 : start < of.n ? start : of.n);
        mine.end = static_cast<int>(i >= count || end < 0 ? 0 : end < of.n ? end : of.n);
    }
    if (Bulk && thread < Math::stages) start_barrier(barriers + thread);
    __syncthreads();
    const int units = (n + Math::rows - 1) / Math::rows;
    const auto wanted = [&](int unit) {  // the first of this block's units, from `unit` on, that a query sees a row of
        if (of.ranges == nullptr) return unit;
        for (; unit < units; unit += lists) {
            const int from = unit * Math::rows, to = min(n, from + Math::rows);
            bool seen = false;
            for (int i = lane; i < Math::queries; i += 32)
                seen |= max(from, of_query[i].start) < min(to, of_query[i].end);
            if (__any_sync(kWarp, seen)) break;
        }
        return unit;
    };

    int next_unit = wanted(static_cast<int>(blockIdx.x)), next_slab = 0, next_stage = 0;
    const auto start_next = [&] {
        if (next_unit < units) {
            unsigned char* stage = shared + next_stage * At::stage_bytes;
            const int column = next_slab * Math::columns;
            if (Bulk) {
                if (warp == kWarps - 1)  // rows past the last stay as they are: nobody sees their scores
                    bring<Math::columns>(reinterpret_cast<Key*>(stage), At::pitch,
                                         keys + next_unit * Math::rows * of.key_stride + column, of.key_stride,
                                         min(Math::rows, n - next_unit * Math::rows), barriers + next_stage);
            } else {
                fetch<Math::rows, Math::columns>(reinterpret_cast<Key*>(stage), At::pitch, keys, of.key_stride,
                                                 next_unit * Math::rows, n, column, d, problem.aligned);
            }
            if (!Math::resident)
                fetch<Math::queries, Math::columns>(reinterpret_cast<Query*>(stage + At::key_bytes), q_pitch, q, of.q_stride,
                                                    first_query, of.t, column, d, problem.q_aligned);
            if (++next_slab == slabs) next_slab = 0, next_unit = wanted(next_unit + lists);
        }
        next_stage = next_stage + 1 == Math::stages ? 0 : next_stage + 1;
        cp_async_commit();
    };
    int unit = next_unit, slab = 0, stage = 0, done = 0;
    uint32_t parity = 0;  // of the stages' uses, this time round
    if (Math::resident && unit < units)  // with the first group of copies
        for (int i = 0; i < slabs; ++i)
            fetch<Math::queries, Math::columns>(resident + i * Math::columns, q_pitch, q, of.q_stride, first_query, of.t,
                                                i * Math::columns, d, problem.q_aligned);
    for (int i = 0; i < Math::stages - 1; ++i) start_next();
    for (int i = warp; i < count && unit < units; i += kWarps) {
        const float norm = norm_of(q + (first_query + i) * of.q_stride, d, problem.q_aligned, lane);
        if (lane == 0) of_query[i].norm = norm == 0 ? INFINITY : norm;
    }

    const Bounds& bounds = problem.to.bounds;
    const auto entries_of = [&](int i) { return problem.to.entries(first_query + i, static_cast<int>(blockIdx.x)); };
    static_assert(Math::queries <= 32 * kWarps, "");
    // Which blocks look for what k rows reach after their 2^i-th unit: not all of many, and not always the same ones.
    const int watched = min(lists, of.t), groups = max(1, min(8, lists / watched / 8));
    const int group = static_cast<int>(blockIdx.x) / watched % groups;
    Packed known = 0;  // lane j: of the warp's j-th query
    float key_norms[(Math::rows + 31) / 32];
    Math math;
    math.reset();
    while (unit < units) {
        if (slab == 0) {  // what is asked for here is there when the unit is done
            if (warp + kWarps * lane < count) known = load_relaxed(bounds.reached + first_query + warp + kWarps * lane);
#pragma unroll
            for (int i = 0; i < (Math::rows + 31) / 32; ++i) {
                const int of_unit = 32 * i + lane, row = unit * Math::rows + of_unit;
                key_norms[i] = !norms && warp < count && of_unit < Math::rows && row < n ? of.key_norm[row] : 1.0f;
            }
        }
        cp_async_wait<Math::stages - 2>();
        if (Bulk) wait_for_bytes(barriers + stage, parity);
        __syncthreads();  // the slab is there for all, and nobody reads the one before it any more
        start_next();
        const unsigned char* staged = shared + stage * At::stage_bytes;
        math.add(reinterpret_cast<const Key*>(staged), At::pitch,
                 Math::resident ? resident + slab * Math::columns : reinterpret_cast<const Query*>(staged + At::key_bytes), q_pitch,
                 norms);
        if (++stage == Math::stages) stage = 0, parity ^= 1;
        if (++slab < slabs) continue;

        math.store(partial, norms);
        math.reset();
        __syncthreads();
        ++done;
        const bool now = (done & (done - 1)) == 0 && (31 - __clz(done)) % groups == group;
        for (int i = warp; i < count; i += kWarps) {
            OfQuery mine = of_query[i];
            const Packed bound = __shfl_sync(kWarp, known, i / kWarps);
            // The first unit's scores had nothing to be held against; one warp reads short lists sooner than long ones.
            if (problem.arrived != nullptr && mine.list.count > kShort && bound > mine.list.threshold)
                prune(mine.list, entries_of(i), k, bound, lane);
            heed(mine.list, bound);
#pragma unroll
            for (int first = 0; first < Math::rows; first += 32) {
                const int of_unit = first + lane, row = unit * Math::rows + of_unit;
                Packed candidate = 0;
                if (of_unit < Math::rows && row >= mine.start && row < mine.end) {
                    const float* sums = partial + of_unit * (Math::queries + 1);
                    float dot = 0, square = 0;
#pragma unroll
                    for (int part = 0; part < Math::parts; ++part) {
                        dot += sums[part * Math::rows * (Math::queries + 1) + i];
                        if (norms) square += sums[part * Math::rows * (Math::queries + 1) + Math::queries];
                    }
                    const float norm = norms ? __fsqrt_rn(square) : key_norms[first / 32];
                    // Dividing twice, as the reference does, cannot overflow where its result does not.
                    candidate = pack(__fdiv_rn(__fdiv_rn(dot, mine.norm), norm == 0 ? INFINITY : norm), row);
                }
                offer(mine.list, entries_of(i), candidate, bounds, first_query + i, k, lane);
            }
            // Each block looks after one query if there are not more of them than blocks.
            if (now && (first_query + i) % lists == static_cast<int>(blockIdx.x) % watched)
                raise(bounds, first_query + i, k, lane);
            __syncwarp();  // all lanes have read it
            if (lane == 0) of_query[i].list = mine.list;
            __syncwarp();
        }
        slab = 0, unit = wanted(unit + lists);
    }
    __syncthreads();
    for (int i = thread; i < count; i += kThreads)
        problem.to.keep(first_query + i, static_cast<int>(blockIdx.x), of_query[i].list);
    if (problem.arrived == nullptr) return;

    __syncthreads();
    uint32_t& last = *reinterpret_cast<uint32_t*>(shared + kWarps * sizeof(Selection<1>));
    if (thread == 0) last = count_arrival(problem.arrived) == gridDim.x * gridDim.y - 1;
    __syncthreads();
    if (!last) return;
    Selection<1>& choice = reinterpret_cast<Selection<1>*>(shared)[warp];
    for (int i = warp; i < of.t; i += kWarps) finish(choice, problem.to, i, k, problem.scores, problem.indices);
    if (thread == 0) *problem.arrived = 0;  // nobody counts any more
}

// ------------------------------------------------------------------------------------------------- the choice

// Block t: the k best of query t.
__global__ void __launch_bounds__(32 * kSelectionWarps, 1)
    cosine_topk_select(const Lists lists, int k, float* scores, int64_t* indices) {
    wait_for_previous_kernel();
    finish(*reinterpret_cast<Selection<kSelectionWarps>*>(shared_memory()), lists, blockIdx.x, k, scores, indices);
}

// ------------------------------------------------------------------------------------------------- the host's part

struct Plan {
    void (*scan)(Problem);
    void (*bulk_scan)(Problem);  // null: there is none
    int queries, rows, columns, shared_bytes, lists;
};

template <class Math>
bool fits(const Search& search, const Device& device, Plan& plan) {
    plan.scan = &cosine_topk_stream<Math, false>, plan.bulk_scan = nullptr;
    if constexpr (Math::resident) plan.bulk_scan = &cosine_topk_stream<Math, true>;
    plan.queries = Math::queries, plan.rows = Math::rows, plan.columns = Math::columns;
    plan.shared_bytes = static_cast<int>(Layout<Math>::bytes(search.d)), plan.lists = 0;
    return Layout<Math>::bytes(search.d) <= device.shared_bytes;
}

// The kernel with the fewest rows and queries to a block that has room for all queries, or else for as many as any has.
template <typename T>
bool choose_half(const Search& search, const Device& device, Plan& plan) {
    if (search.t <= 8 && fits<TensorCores<T, 1, 1, 1, 512, true>>(search, device, plan)) return true;
    if (search.t <= 16 && fits<TensorCores<T, 1, 1, 2, 512, true>>(search, device, plan)) return true;
    if (search.t > 32 && fits<TensorCores<T, 2, 2, 8, 128, false>>(search, device, plan)) return true;
    return fits<TensorCores<T, 2, 1, 4, 128, false>>(search, device, plan);
}

cudaError_t make_plan(const Search& search, Plan& plan, Device& device) {
    const cudaError_t error = current_device(device);
    if (error != cudaSuccess) return error;
    const bool half = search.q_dtype == search.key_dtype && search.q_dtype != Dtype::float32;
    bool found = false;
    if (half && search.key_dtype == Dtype::bfloat16) found = choose_half<bf16>(search, device, plan);
    if (half && search.key_dtype == Dtype::float16) found = choose_half<fp16>(search, device, plan);
    if (!half && search.q_dtype == Dtype::float32) {
        if (search.key_dtype == Dtype::float32) found = fits<CudaCores<float>>(search, device, plan);
        if (search.key_dtype == Dtype::bfloat16) found = fits<CudaCores<bf16>>(search, device, plan);
        if (search.key_dtype == Dtype::float16) found = fits<CudaCores<fp16>>(search, device, plan);
    }
    if (!found) return cudaErrorInvalidValue;
    // One block for every SM: each fills its SM's share of the bandwidth by itself.
    const int64_t units = (search.n + plan.rows - 1) / plan.rows, tiles = (search.t + plan.queries - 1) / plan.queries;
    const int64_t most = min(kMostLists, max(1, device.multiprocessors / static_cast<int>(tiles)));
    plan.lists = static_cast<int>(units < most ? units : most);
    return cudaSuccess;
}

}  // namespace

cudaError_t select(const Lists& lists, int t, int k, float* scores, int64_t* indices, bool early, cudaStream_t stream) {
    Launch how;
    how.grid = t, how.block = 32 * kSelectionWarps, how.shared_bytes = sizeof(Selection<kSelectionWarps>);
    how.stream = stream, how.early = early;
    return launch(cosine_topk_select, how, lists, k, scores, indices);
}

cudaError_t cosine_topk_workspace(const Search& search, int64_t& bytes) {
    Plan plan;
    Device device;
    const cudaError_t error = make_plan(search, plan, device);
    if (error == cudaSuccess) bytes = Lists::bytes(search.t, plan.lists);
    return error;
}

int64_t cosine_topk_zeros(int t, int k) { return kCounter + Bounds::bytes(t, k); }

cudaError_t cosine_topk(const Search& search, void* workspace, void* zeros, bool alone, bool bulk, float* scores,
                        int64_t* indices, cudaStream_t stream) {
    if (search.t == 0 || search.k == 0) return cudaSuccess;
    Plan plan;
    Device device;
    cudaError_t error = make_plan(search, plan, device);
    if (error != cudaSuccess) return error;
    const auto in_sixteens = [](const void* rows, int64_t stride, Dtype dtype) {
        return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && stride * bytes_of(dtype) % 16 == 0;
    };
    alone = alone && plan.lists > 0;
    Problem problem;
    problem.of = search;
    problem.to = Lists::at(workspace, search.t, plan.lists, Bounds::at(static_cast<char*>(zeros) + kCounter, search.t, search.k));
    problem.arrived = alone ? static_cast<uint32_t*>(zeros) : nullptr;
    problem.scores = scores, problem.indices = indices;
    problem.aligned = in_sixteens(search.keys, search.key_stride, search.key_dtype);
    problem.q_aligned = in_sixteens(search.q, search.q_stride, search.q_dtype);
    bulk = bulk && plan.bulk_scan != nullptr && problem.aligned && search.d % plan.columns == 0 && device.major >= 9;
    if (bulk) error = built_for_hopper(plan.bulk_scan, bulk);
    if (error != cudaSuccess) return error;
    Launch scan;
    scan.grid = dim3(plan.lists, (search.t + plan.queries - 1) / plan.queries), scan.block = kThreads;
    scan.shared_bytes = plan.shared_bytes, scan.stream = stream;
    if (plan.lists > 0) error = launch(bulk ? plan.bulk_scan : plan.scan, scan, problem);
    if (error != cudaSuccess || alone) return error;
    return select(problem.to, search.t, search.k, scores, indices, plan.lists > 0, stream);
}

}  // namespace unike
