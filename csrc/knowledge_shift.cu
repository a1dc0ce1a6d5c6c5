// A head's columns are shared by the blocks of a cluster. Each block copies its slice of the item keys and values into
// shared memory, values behind keys, so that both latencies are one; partial scores go to every block of the cluster through
// distributed shared memory and are added in the order of the blocks. From there on a block needs its own columns only:
// softmax, knowledge, mix. Where alpha is computed, three partial sums travel the same way.
#include "knowledge_shift.cuh"

#include <algorithm>
#include <cmath>
#include <device.cuh>

namespace unike {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kStages = 4;        // pieces of keys or values under way at once
constexpr int kRing = 80 * 1024;  // bytes for them: 40 keys and values of 512 columns in 16 bits
constexpr int kColumns = 4;       // columns of the knowledge that a thread adds up
constexpr int kMostColumns = kThreads * kColumns;
constexpr int kMostCells = 2048;  // rows x columns of a block
constexpr int kMostItems = 128;
constexpr float kLowest = -3.4028234663852886e38f;  // the score of a missing item, as in the reference

// Where things lie in a block's shared memory (bytes), and how its threads share the work.
struct Plan {
    int split;
    int key_width, value_width;  // columns of a block, multiples of 8
    int key_lanes, value_lanes;  // threads that copy one row, and multiply it: a power of two, at most a warp
    int across;                  // threads side by side in the columns of the knowledge: a power of two
    int piece, slot;             // items of a piece, bytes of its place
    int groups;                  // clusters that share the query heads of one key head
    bool keys_wide, values_wide; // rows can be copied 16 bytes at a time
    int ids, count, q, h, inbox, weights, sums, totals, ring, bytes;
};

// ------------------------------------------------------------------------------------------------------- elements

__device__ inline float read(const void* data, int64_t at, Dtype dtype) {
    if (dtype == Dtype::float32) return static_cast<const float*>(data)[at];
    if (dtype == Dtype::bfloat16) return widen(static_cast<const bf16*>(data)[at]);
    return widen(static_cast<const fp16*>(data)[at]);
}

__device__ inline void write(void* data, int64_t at, Dtype dtype, float x) {
    if (dtype == Dtype::float32)
        static_cast<float*>(data)[at] = x;
    else if (dtype == Dtype::bfloat16)
        static_cast<bf16*>(data)[at] = narrow<bf16>(x);
    else
        static_cast<fp16*>(data)[at] = narrow<fp16>(x);
}

// Bit for bit, whatever it is.
__device__ inline void keep(void* to, int64_t at, const void* from, int64_t from_at, Dtype dtype) {
    if (dtype == Dtype::float32)
        static_cast<uint32_t*>(to)[at] = static_cast<const uint32_t*>(from)[from_at];
    else
        static_cast<uint16_t*>(to)[at] = static_cast<const uint16_t*>(from)[from_at];
}

// `n` elements at an address that is a multiple of their size together.
template <int N, typename Item>
__device__ inline void unpack(const Item* from, float (&x)[N]) {
    struct alignas(N * sizeof(Item)) Pack {
        Item item[N];
    };
    const Pack pack = *reinterpret_cast<const Pack*>(from);
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = widen(pack.item[i]);
}

__device__ inline float over(float x, float norm) { return norm == 0.0f ? 0.0f : x / norm; }

__device__ inline float sum_of(float x, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

// ---------------------------------------------------------------------------------------------------------- steps

// Waits for all threads of the cluster: what they wrote into this block's shared memory is there.
__device__ inline void meet(int split) {
    if (split > 1)
        cluster_sync();
    else
        __syncthreads();
}

// The same address in the shared memory of the cluster's block `rank`.
__device__ inline float* place_in(float* here, int rank, int split) { return split > 1 ? cluster_ptr(here, rank) : here; }

// The ids of a row that are there, in their order; returns how many. One warp. The row that it probably is gets read while it is
// still unknown which one it is.
__device__ inline int collect(const int64_t* indices, int64_t guess, int64_t row, int items, int64_t* ids) {
    const int lane = threadIdx.x % 32;
    int64_t id[kMostItems / 32];
    const auto load = [&](int64_t from) {
#pragma unroll
        for (int i = 0; i < kMostItems / 32; i++) {
            const int k = 32 * i + lane;
            id[i] = from >= 0 && k < items ? indices[from * items + k] : -1;
        }
    };
    load(guess);
    if (row != guess) load(row);
    int found = 0;
#pragma unroll
    for (int i = 0; i < kMostItems / 32; i++) {
        const unsigned there = __ballot_sync(0xffffffffu, id[i] >= 0);
        if (id[i] >= 0) ids[found + __popc(there & ((1u << lane) - 1))] = id[i];
        found += __popc(there);
    }
    return found;
}

// The columns of some items' rows into shared memory, `width` apart, zeros up to the next 16 bytes.
template <typename Item>
__device__ void copy_rows(
    Item* to, const Item* from, int64_t stride, const int64_t* ids, int items, int columns, int width, int lanes, bool by_16) {
    constexpr int kChunk = 16 / sizeof(Item);
    const int lane = threadIdx.x % lanes;
    for (int i = threadIdx.x / lanes; i < items; i += kThreads / lanes) {
        const Item* row = from + ids[i] * stride;
        Item* place = to + i * width;
        for (int c = lane * kChunk; c < columns; c += lanes * kChunk) {
            if (by_16) {
                cp_async16(place + c, row + c);
            } else {
                for (int e = 0; e < kChunk; e++) place[c + e] = c + e < columns ? row[c + e] : narrow<Item>(0.0f);
            }
        }
    }
}

// N columns of q from shared memory, 16-byte aligned.
template <int N>
__device__ inline void load_row(const float* q, float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        const float4 four = widen_four(q + i);
        x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
}

template <int N>
__device__ inline float add_products(float sum, const float (&x)[N], const float (&y)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) sum += x[i] * y[i];
    return sum;
}

// Partial scores of a piece, to every block of the cluster: inbox[rank][row][item]. Threads share the columns as in copy_rows;
// a thread's first columns of q stay in registers, since from shared memory all items would ask for them again.
template <int Rows, typename Item>
__device__ void score(
    const Item* keys, const float* q, int first, int items, int columns, int width, int lanes, float* inbox, int most_items,
    int rank, int split) {
    constexpr int kChunk = 16 / sizeof(Item), kHeld = Rows * kChunk < 16 ? 16 / (Rows * kChunk) : 1;
    const int lane = threadIdx.x % lanes, mine = threadIdx.x / lanes;
    float held[kHeld][Rows][kChunk] = {};
#pragma unroll
    for (int j = 0; j < kHeld; j++) {
        const int c = (lane + j * lanes) * kChunk;
#pragma unroll
        for (int r = 0; r < Rows; r++)
            if (c < columns) load_row(q + r * width + c, held[j][r]);
    }
    for (int base = 0; base < items; base += kThreads / lanes) {  // the same number of turns for all threads of a warp
        const int i = base + mine;
        float sum[Rows] = {}, k[kChunk];
#pragma unroll
        for (int j = 0; j < kHeld; j++) {
            const int c = (lane + j * lanes) * kChunk;
            if (i >= items || c >= columns) continue;
            unpack(keys + i * width + c, k);
#pragma unroll
            for (int r = 0; r < Rows; r++) sum[r] = add_products(sum[r], held[j][r], k);
        }
        for (int c = (lane + kHeld * lanes) * kChunk; i < items && c < columns; c += lanes * kChunk) {
            unpack(keys + i * width + c, k);
#pragma unroll
            for (int r = 0; r < Rows; r++) {
                float x[kChunk];
                load_row(q + r * width + c, x);
                sum[r] = add_products(sum[r], x, k);
            }
        }
#pragma unroll
        for (int r = 0; r < Rows; r++) sum[r] = sum_of(sum[r], lanes);
        if (i >= items) continue;
        for (int to = lane; to < split; to += lanes) {
            float* box = place_in(inbox, to, split) + rank * Rows * most_items + first + i;
#pragma unroll
            for (int r = 0; r < Rows; r++) box[r * most_items] = sum[r];
        }
    }
}

// Softmax weights of one row; a warp. scores: [split] rows `stride` apart, of which the sum is taken in that order.
__device__ inline void soften(
    const float* scores, int stride, int split, float* weights, int found, int missing, float scaling, float softcap) {
    const int lane = threadIdx.x % 32;
    float most = missing > 0 ? kLowest : -INFINITY;
    for (int i = lane; i < found; i += 32) {
        float s = 0.0f;
        for (int rank = 0; rank < split; rank++) s += scores[rank * stride + i];
        s *= scaling;
        if (softcap != 0.0f) s = softcap * tanhf(s / softcap);
        weights[i] = s;
        most = fmaxf(most, s);
    }
    for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    float sum = 0.0f;
    for (int i = lane; i < found; i += 32) {
        weights[i] = expf(weights[i] - most);
        sum += weights[i];
    }
    sum = sum_of(sum, 32);
    if (missing > 0) sum += missing * expf(kLowest - most);
    for (int i = lane; i < found; i += 32) weights[i] /= sum;
}

// know += weights x values of a piece, the columns and the share of the items that are this thread's.
template <int Rows, typename Item>
__device__ void gather(
    const Item* values, const float* weights, int first, int items, int columns, int width, int across, int most_items,
    float (&know)[Rows][kColumns]) {
    const int c = threadIdx.x % across * kColumns, parts = kThreads / across, part = threadIdx.x / across;
    if (c >= columns) return;
    // Item n is of part n % parts, however large the pieces are: the order of the sums is the same on every device.
    for (int i = (part + parts - first % parts) % parts; i < items; i += parts) {
        float v[kColumns];
        unpack(values + i * width + c, v);
#pragma unroll
        for (int r = 0; r < Rows; r++) {
            const float p = weights[r * most_items + first + i];
#pragma unroll
            for (int e = 0; e < kColumns; e++) know[r][e] += p * v[e];
        }
    }
}

// used of every case where alpha is given: a warp per case.
__device__ inline void note_cases(const KnowledgeShift& s, int token, float untouched) {
    const int lane = threadIdx.x % 32;
    for (int c = token * kWarps + threadIdx.x / 32; c < s.cases; c += max(s.tokens, 1) * kWarps) {
        int there = 0;
        for (int k = lane; k < s.items; k += 32) there |= s.indices[int64_t{c} * s.items + k] >= 0;
        there = __ballot_sync(0xffffffffu, there) != 0;
        if (lane == 0) s.used[c] = there ? read(s.alpha, c, s.alpha_dtype) : untouched;
    }
}

// --------------------------------------------------------------------------------------------------------- kernel

// Grid (split, key heads x groups of Rows of their query heads, tokens), a cluster along x; where alpha is computed per case,
// cases behind the tokens, for `used` alone, and the second row of a token's cluster is its case token. Bytes: q, h_input and
// out once, and of each item a head's key and value once per cluster. Sums in float32, in a fixed order; rounds once.
template <typename Item, int Rows>
__global__ void __launch_bounds__(kThreads, Rows == 1 ? 4 : Rows == 2 ? 3 : 2)
knowledge_shift_cluster(const KnowledgeShift s, const Plan plan) {
    unsigned char* shared = shared_memory();
    int64_t* ids = reinterpret_cast<int64_t*>(shared + plan.ids);
    int* count = reinterpret_cast<int*>(shared + plan.count);
    float* q = reinterpret_cast<float*>(shared + plan.q);              // [Rows, key_width]
    float* h = reinterpret_cast<float*>(shared + plan.h);              // [Rows, value_width]
    float* inbox = reinterpret_cast<float*>(shared + plan.inbox);      // [split, Rows, items]
    float* weights = reinterpret_cast<float*>(shared + plan.weights);  // [Rows, items]
    float* sums = reinterpret_cast<float*>(shared + plan.sums);        // [3 Rows, kWarps]
    float* totals = reinterpret_cast<float*>(shared + plan.totals);    // [split, 3 Rows]
    unsigned char* ring = shared + plan.ring;                          // kStages pieces, then [parts, Rows, value_width]

    const int split = plan.split, rank = static_cast<int>(blockIdx.x), token = static_cast<int>(blockIdx.z);
    const int key_head = static_cast<int>(blockIdx.y) / plan.groups;
    const int first_head = (static_cast<int>(blockIdx.y) - key_head * plan.groups) * Rows;
    const bool given = s.alpha != nullptr, per_case = !given && s.case_tokens != nullptr;
    const float untouched = s.input ? 1.0f : 0.0f;
    const bool leads = rank == 0 && key_head == 0 && first_head == 0;

    // Whose items, and at which rows of q and h_input: row 0, and with per_case that of the case.
    const bool for_case = token >= s.tokens;
    int64_t owner = for_case ? (per_case ? token - s.tokens : -1) : token, guess = owner;
    if (!for_case && s.token_to_case != nullptr) {
        owner = s.token_to_case[token];
        guess = min(token, s.cases - 1);  // while decoding, a case has one token: saves waiting for the memory once
    }
    if (threadIdx.x < 32) {
        const int found = collect(s.indices, guess, owner, s.items, ids);
        if (threadIdx.x == 0) *count = found;
    }
    float a = untouched;
    if (given) {
        if (guess >= 0) a = read(s.alpha, s.alpha_per_case ? guess : token, s.alpha_dtype);
        if (s.alpha_per_case && owner != guess && owner >= 0) a = read(s.alpha, owner, s.alpha_dtype);
    }
    const int64_t case_at = per_case && owner >= 0 ? s.case_tokens[owner] : -1;
    const int64_t at = for_case ? case_at : token;
    const int rows = per_case ? 2 : min(Rows, s.group - first_head);
    __syncthreads();
    const int found = *count;
    if (found == 0) a = untouched;
    const bool live = found > 0 && (given ? a != untouched : !per_case || case_at >= 0);

    const int key_first = rank * plan.key_width, value_first = rank * plan.value_width;
    const int key_columns = max(0, min(plan.key_width, s.key_columns - key_first));
    const int value_columns = max(0, min(plan.value_width, s.value_columns - value_first));
    // The first column of this block in row r of q and h_input.
    const auto head_of = [&](int r) { return int64_t{key_head} * s.group + (per_case ? 0 : first_head + r); };
    const auto row_of = [&](int r) { return per_case && r == 1 ? case_at : at; };
    const auto h_at = [&](int r) { return row_of(r) * s.h_input.row + head_of(r) * s.value_columns + value_first; };
    const auto out_at = [&](int r) {
        return (int64_t{token} * s.key_heads * s.group + head_of(r)) * s.value_columns + value_first;
    };
    const int rows_out = for_case ? 0 : per_case ? 1 : rows;

    if (!live) {
        for (int r = 0; r < rows_out; r++)
            for (int c = threadIdx.x; c < value_columns; c += kThreads)
                keep(s.out, out_at(r) + c, s.h_input.data, h_at(r) + c, s.h_input.dtype);
        if (given && s.alpha_per_case) {
            if (leads) note_cases(s, token, untouched);
        } else if (leads && threadIdx.x == 0 && (per_case ? for_case : token < s.tokens)) {
            s.used[per_case ? owner : token] = a;
        }
        return;
    }

    // Pieces of keys, then of values, under way in a ring of kStages.
    const Item* keys = static_cast<const Item*>(s.keys.data) + key_head * s.keys.head + key_first;
    const Item* values = static_cast<const Item*>(s.values.data) + key_head * s.values.head + value_first;
    const int pieces = (found + plan.piece - 1) / plan.piece;
    const auto slot = [&](int p) { return reinterpret_cast<Item*>(ring + p % kStages * plan.slot); };
    const auto first_of = [&](int p) { return p % pieces * plan.piece; };
    const auto items_of = [&](int p) { return min(plan.piece, found - first_of(p)); };
    const auto start = [&](int p) {
        if (p < pieces)
            copy_rows(slot(p), keys, s.keys.row, ids + first_of(p), items_of(p), key_columns, plan.key_width, plan.key_lanes,
                      plan.keys_wide);
        else if (p < 2 * pieces)
            copy_rows(slot(p), values, s.values.row, ids + first_of(p), items_of(p), value_columns, plan.value_width,
                      plan.value_lanes, plan.values_wide);
        cp_async_commit();  // an empty group too, so that the number of groups tells the piece
    };
    for (int p = 0; p < kStages; p++) start(p);

    const bool norms = !given || s.rescale;
    for (int r = 0; r < Rows; r++) {
        for (int c = threadIdx.x; c < plan.key_width; c += kThreads) {
            const int64_t from = row_of(r) * s.q.row + head_of(r) * s.q.head + key_first + c;
            q[r * plan.key_width + c] = r < rows && c < key_columns ? read(s.q.data, from, s.q.dtype) : 0.0f;
        }
        for (int c = threadIdx.x; r < rows && c < value_columns; c += kThreads)
            h[r * plan.value_width + c] = read(s.h_input.data, h_at(r) + c, s.h_input.dtype);
    }
    if (given && leads) {
        if (s.alpha_per_case)
            note_cases(s, token, untouched);
        else if (threadIdx.x == 0)
            s.used[token] = a;
    }
    meet(split);  // q is there, and every block runs: from here on its shared memory can be written
    for (int p = 0; p < pieces; p++) {
        cp_async_wait<kStages - 1>();  // no barrier: a thread multiplies what it has copied itself
        score<Rows>(slot(p), q, first_of(p), items_of(p), key_columns, plan.key_width, plan.key_lanes, inbox, s.items, rank,
                    split);
        if (p + kStages >= pieces && p + kStages < 2 * pieces) __syncthreads();  // values go to other threads than keys
        start(p + kStages);
    }
    meet(split);
    for (int r = threadIdx.x / 32; r < Rows; r += kWarps)
        soften(inbox + r * s.items, Rows * s.items, split, weights + r * s.items, found, s.items - found, s.scaling, s.softcap);

    float part[Rows][kColumns] = {};
    for (int p = pieces; p < 2 * pieces; p++) {
        cp_async_wait<kStages - 1>();
        __syncthreads();
        gather(slot(p), weights, first_of(p), items_of(p), value_columns, plan.value_width, plan.across, s.items, part);
        if (p + kStages < 2 * pieces) __syncthreads();  // all have read what is copied over now
        start(p + kStages);
    }
    __syncthreads();

    // The parts of the knowledge, added in their order: know [Rows, value_width].
    float* know = reinterpret_cast<float*>(ring);
    const int parts = kThreads / plan.across, mine = threadIdx.x % plan.across * kColumns;
    if (mine < value_columns)
#pragma unroll
        for (int r = 0; r < Rows; r++)
            *reinterpret_cast<float4*>(know + (threadIdx.x / plan.across * Rows + r) * plan.value_width + mine) =
                make_float4(part[r][0], part[r][1], part[r][2], part[r][3]);
    __syncthreads();
    for (int r = 0; r < rows; r++) {
        float ee = 0.0f, hh = 0.0f, eh = 0.0f;
        for (int c = threadIdx.x; c < value_columns; c += kThreads) {
            const int cell = r * plan.value_width + c;
            float sum = know[cell];
            for (int i = 1; i < parts; i++) sum += know[i * Rows * plan.value_width + cell];
            know[cell] = sum;  // no other thread reads this cell
            ee += sum * sum;
            hh += h[cell] * h[cell];
            eh += sum * h[cell];
        }
        if (!norms) continue;
        ee = sum_of(ee, 32), hh = sum_of(hh, 32), eh = sum_of(eh, 32);
        if (threadIdx.x % 32 == 0) {
            float* box = sums + 3 * r * kWarps + threadIdx.x / 32;
            box[0] = ee, box[kWarps] = hh, box[2 * kWarps] = eh;
        }
    }
    float grow = 1.0f;
    if (norms) {
        __syncthreads();
        for (int i = threadIdx.x; i < 3 * rows * split; i += kThreads) {
            const int sum = i % (3 * rows), to = i / (3 * rows);
            float total = 0.0f;
            for (int warp = 0; warp < kWarps; warp++) total += sums[sum * kWarps + warp];
            place_in(totals, to, split)[rank * 3 * Rows + sum] = total;
        }
        meet(split);
        const int other = per_case ? 3 : 0;  // where the sums of the row that alpha is taken from stand
        float own[3] = {}, decides[3] = {};  // |know|^2, |h|^2, know . h
        for (int from = 0; from < split; from++)
            for (int i = 0; i < 3; i++) {
                own[i] += totals[from * 3 * Rows + i];
                decides[i] += totals[from * 3 * Rows + other + i];
            }
        if (s.rescale) grow = over(sqrtf(own[1]), sqrtf(own[0]));
        if (!given) {
            a = over(over(decides[2], sqrtf(decides[0])), sqrtf(decides[1]));
            if (s.clamp) a = a < 0.0f ? 0.0f : a > 1.0f ? 1.0f : a;
            if (leads && threadIdx.x == 0 && per_case == for_case) s.used[per_case ? owner : token] = a;
        }
    }
    const float weight = s.input ? 1.0f - a : a;  // of the knowledge
    for (int r = 0; r < rows_out; r++)
        for (int c = threadIdx.x; c < value_columns; c += kThreads) {
            const int cell = r * plan.value_width + c;
            if (a == untouched)
                keep(s.out, out_at(r) + c, s.h_input.data, h_at(r) + c, s.h_input.dtype);
            else
                write(s.out, out_at(r) + c, s.h_input.dtype, (s.input ? a : 1.0f - a) * h[cell] + weight * (know[cell] * grow));
        }
}

// ----------------------------------------------------------------------------------------------------------- host

int power_of_two(int least, int most) {
    int lanes = 1;
    while (lanes < least && lanes < most) lanes *= 2;
    return lanes;
}

bool by_16(const Heads& heads, int columns) {
    const int64_t size = bytes_of(heads.dtype);
    return reinterpret_cast<uintptr_t>(heads.data) % 16 == 0 && heads.row * size % 16 == 0 && heads.head * size % 16 == 0 &&
           columns * size % 16 == 0;
}

// shared_bytes: what a block may have.
Plan plan_of(const KnowledgeShift& s, int split, int rows, int shared_bytes) {
    const int size = static_cast<int>(bytes_of(s.keys.dtype)), chunk = 16 / size;
    const auto width = [&](int columns) { return std::max(8, (columns + 8 * split - 1) / (8 * split) * 8); };
    Plan plan{};
    plan.split = split;
    plan.groups = (s.group + rows - 1) / rows;
    plan.key_width = width(s.key_columns), plan.value_width = width(s.value_columns);
    plan.key_lanes = power_of_two(plan.key_width / chunk, 32), plan.value_lanes = power_of_two(plan.value_width / chunk, 32);
    plan.across = power_of_two(plan.value_width / kColumns, kThreads);
    plan.keys_wide = by_16(s.keys, s.key_columns), plan.values_wide = by_16(s.values, s.value_columns);
    const int items = std::max(s.items, 1);
    const auto place = [&](int& at, int bytes) {
        at = plan.bytes;
        plan.bytes += (bytes + 15) / 16 * 16;
    };
    place(plan.ids, items * 8);
    place(plan.count, 4);
    place(plan.q, rows * plan.key_width * 4);
    place(plan.h, rows * plan.value_width * 4);
    place(plan.inbox, split * rows * items * 4);
    place(plan.weights, rows * items * 4);
    place(plan.sums, 3 * rows * kWarps * 4);
    place(plan.totals, split * 3 * rows * 4);
    const int row = std::max(plan.key_width, plan.value_width) * size, room = std::min(kRing, shared_bytes - plan.bytes);
    plan.piece = std::max(1, std::min((2 * items + kStages - 1) / kStages, room / kStages / row));
    plan.slot = plan.piece * row;
    place(plan.ring, std::max(kStages * plan.slot, kThreads / plan.across * rows * plan.value_width * 4));
    return plan;
}

template <typename Item, int Rows>
cudaError_t start(const KnowledgeShift& s, const Plan& plan, cudaStream_t stream) {
    const int extra = s.alpha == nullptr && s.case_tokens != nullptr ? s.cases : 0;
    Launch how;
    how.grid = dim3(plan.split, s.key_heads * plan.groups, std::max(s.tokens + extra, 1));
    how.block = kThreads, how.cluster = plan.split;
    how.shared_bytes = plan.bytes, how.stream = stream;
    return launch(knowledge_shift_cluster<Item, Rows>, how, s, plan);
}

template <typename Item>
cudaError_t start(const KnowledgeShift& s, const Plan& plan, int rows, cudaStream_t stream) {
    switch (rows) {
        case 1: return start<Item, 1>(s, plan, stream);
        case 2: return start<Item, 2>(s, plan, stream);
        case 4: return start<Item, 4>(s, plan, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t knowledge_shift(const KnowledgeShift& s, int split, int rows, cudaStream_t stream) {
    if (split != 1 && split != 2 && split != 4 && split != 8) return cudaErrorInvalidValue;
    Device device;
    const cudaError_t error = current_device(device);
    if (error != cudaSuccess) return error;
    const Plan plan = plan_of(s, split, rows, device.shared_bytes);
    const int widest = std::max(plan.key_width, plan.value_width);
    if (widest > kMostColumns || rows * widest > kMostCells || s.keys.dtype != s.values.dtype || s.items > kMostItems)
        return cudaErrorInvalidValue;
    if (s.alpha == nullptr && s.case_tokens != nullptr && rows != 2) return cudaErrorInvalidValue;
    if ((s.alpha == nullptr || s.rescale) && s.key_heads * s.group != 1) return cudaErrorInvalidValue;
    switch (s.keys.dtype) {
        case Dtype::float32: return start<float>(s, plan, rows, stream);
        case Dtype::bfloat16: return start<bf16>(s, plan, rows, stream);
        case Dtype::float16: return start<fp16>(s, plan, rows, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace unike
