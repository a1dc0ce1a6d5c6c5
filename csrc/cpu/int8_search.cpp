#include "int8_search.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "threads.h"
#include "vectors.h"

namespace unike {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kRows = 64;  // of codes that all queries meet before the next come: 256 KB at d = 4096, in the L2

constexpr float kUnscored = -kInfinity;

bool better(const Int8Index::Found& a, const Int8Index::Found& b) { return a.score > b.score || (a.score == b.score && a.row < b.row); }

// The transform of length n, a power of two, divided by sqrt(n): orthogonal.
void hadamard(float* x, int64_t n) {
    for (int64_t half = 1; half < n; half *= 2)
        for (int64_t i = 0; i < n; i += 2 * half)
            for (int64_t j = i; j < i + half; ++j) {
                const float a = x[j], b = x[j + half];
                x[j] = a + b;
                x[j + half] = a - b;
            }
    const float root = float(1 / std::sqrt(double(n)));
    for (int64_t i = 0; i < n; ++i) x[i] *= root;
}

}  // namespace

// A query as the scan reads it.
struct Int8Index::Query {
    const float* unit;
    int64_t start, end;           // the rows in question
    std::vector<int16_t> codes;   // R q = step * codes, up to `residual`
    float step, offset;           // offset: q . c
    double length, residual;
};

Int8Index::Int8Index(const Keys& keys, Level level, int threads) : keys_(keys), vectors_(vectors(level)) {
    const int64_t n = keys.n, d = keys.d;
    padded_ = (d + 63) / 64 * 64;
    block_ = 64;
    while (block_ * 2 <= padded_) block_ *= 2;
    // One fp32 dot product of 32 partial sums, the two rotations and the sums around them, each operation off by 2^-24 of a
    // length of at most |q| (|u_i| + |c|); doubled for the norms that are themselves rounded.
    slack_ = 2 * (double(d) / 32 + 64) / (1 << 24);
    signs_.resize(size_t(2 * padded_));
    uint64_t state = 0x9e3779b97f4a7c15ull;  // any fixed seed: the result does not depend on it
    for (float& sign : signs_) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        sign = (state >> 32) & 1 ? 1.0f : -1.0f;
    }
    storage_.resize(size_t(n * padded_ + 64));
    codes_ = reinterpret_cast<int8_t*>((reinterpret_cast<uintptr_t>(storage_.data()) + 63) / 64 * 64);
    scale_.resize(size_t(n));
    residual_.resize(size_t(n));

    // The centre is the mean of the rows that can be found: no zero row (room for more items), none that is not finite.
    std::vector<double> sum(size_t(d), 0.0);
    std::vector<float> row_buffer(static_cast<size_t>(padded_));
    int64_t counted = 0;
    for (int64_t row = 0; row < n; ++row) {
        float* x = row_buffer.data();
        normalised(row, x);
        if (keys.norm[row] == 0 || !std::all_of(x, x + d, [](float value) { return std::isfinite(value); })) continue;
        for (int64_t i = 0; i < d; ++i) sum[size_t(i)] += x[i];
        ++counted;
    }
    centre_.assign(size_t(padded_), 0.0f);
    for (int64_t i = 0; i < d && counted; ++i) {
        const float mean = float(sum[size_t(i)] / double(counted));
        centre_[size_t(i)] = std::isfinite(mean) ? mean : 0.0f;
    }
    share(n, threads, [&](int64_t, int64_t begin, int64_t end) {
        std::vector<float> buffer(static_cast<size_t>(padded_));
        for (int64_t row = begin; row < end; ++row) encode(row, buffer.data());
    });
}

// u_i = key_i / key_norm_i, zeros after the d-th element.
void Int8Index::normalised(int64_t row, float* u) const {
    vectors_.widen[int(keys_.dtype)](row_of(keys_, row), keys_.d, u);
    const float inverse = keys_.norm[row] == 0 ? 0.0f : 1 / keys_.norm[row];
    for (int64_t i = 0; i < keys_.d; ++i) u[i] *= inverse;
    std::fill(u + keys_.d, u + padded_, 0.0f);
}

int64_t Int8Index::bytes() const {
    return int64_t(storage_.size() + sizeof(float) * (scale_.size() + residual_.size() + centre_.size() + signs_.size()));
}

// Random signs, then a Hadamard transform of the first `block` elements; again for the last `block`. Both windows together
// cover the row, and each step is orthogonal: an outlier channel is spread over 2048 channels of 2560 or 3584 as well.
void Int8Index::rotate(float* row) const {
    for (int64_t i = 0; i < padded_; ++i) row[i] *= signs_[size_t(i)];
    hadamard(row, block_);
    if (block_ == padded_) return;
    for (int64_t i = 0; i < padded_; ++i) row[i] *= signs_[size_t(padded_ + i)];
    hadamard(row + padded_ - block_, block_);
}

void Int8Index::encode(int64_t row, float* x) {
    int8_t* codes = codes_ + row * padded_;
    normalised(row, x);
    double length = 0, of_centre = 0;
    for (int64_t i = 0; i < padded_; ++i) {
        length += double(x[i]) * x[i];
        x[i] -= centre_[size_t(i)];
        of_centre += double(centre_[size_t(i)]) * centre_[size_t(i)];
    }
    rotate(x);
    float largest = 0;
    for (int64_t i = 0; i < padded_; ++i) largest = std::max(largest, std::fabs(x[i]));
    const float scale = largest / 127, over = scale > 0 ? 1 / scale : 0;
    double squares = 0;
    const bool usable = std::isfinite(length) && std::isfinite(over);  // NaN compares false above: `length` tells
    for (int64_t i = 0; i < padded_; ++i) {
        codes[i] = usable ? int8_t(std::max(-127.0f, std::min(127.0f, std::nearbyint(x[i] * over)))) : int8_t(0);
        const double left = double(x[i]) - double(scale) * codes[i];
        squares += left * left;
    }
    const double bound = std::sqrt(squares) + slack_ * (std::sqrt(length) + std::sqrt(of_centre));
    scale_[size_t(row)] = usable ? scale : 0.0f;
    residual_[size_t(row)] = usable && std::isfinite(bound) ? std::nextafter(float(bound), kInfinity) : kInfinity;
}

float Int8Index::exact(const float* q, int64_t row) const {
    if (keys_.norm[row] == 0) {  // as dividing by infinity does: 0, and NaN for a row that is not finite
        const float dot = vectors_.dot[int(keys_.dtype)](q, row_of(keys_, row), keys_.d);
        return dot / kInfinity + 0.0f;
    }
    return vectors_.dot[int(keys_.dtype)](q, row_of(keys_, row), keys_.d) / keys_.norm[row] + 0.0f;
}

// s_i of rows [begin, end) for every query: scores [queries, n].
void Int8Index::scan(const std::vector<Query>& queries, int64_t begin, int64_t end, float* scores) const {
    int32_t dots[kRows];
    for (int64_t first = begin; first < end; first += kRows) {
        for (size_t t = 0; t < queries.size(); ++t) {
            const Query& query = queries[t];
            const int64_t from = std::max(first, query.start), count = std::min({first + kRows, end, query.end}) - from;
            if (count <= 0) continue;
            vectors_.dots_int8(query.codes.data(), codes_ + from * padded_, padded_, count, dots);
            float* out = scores + int64_t(t) * keys_.n + from;
            const float* scale = scale_.data() + from;
            for (int64_t i = 0; i < count; ++i) out[i] = query.offset + query.step * scale[i] * float(dots[i]);
            for (int64_t i = 0; i < count; ++i)  // nothing is known of it: no witness, but always a candidate
                if (residual_[size_t(from + i)] == kInfinity) out[i] = -kInfinity;
        }
    }
}

// A score that at least k rows of the range reach by s_i, and not many more: the k-th largest among the bests of classes of
// rows, every so many-th row one class, or of all where there are few. -inf where fewer than k rows can be told apart.
float Int8Index::reached(const Query& query, const float* approximate, int64_t k) const {
    const float *score = approximate + query.start, *end = approximate + query.end;
    const int64_t classes = std::max<int64_t>(256, (6 * k + 63) / 64 * 64);
    std::vector<float> best(score, end - score < 4 * classes ? end : score + classes);
    for (score += best.size(); score < end; score += classes) {
        const int64_t count = std::min<int64_t>(classes, end - score);
        for (int64_t i = 0; i < count; ++i) best[size_t(i)] = score[i] > best[size_t(i)] ? score[i] : best[size_t(i)];
    }
    if (int64_t(best.size()) < k) return -kInfinity;
    std::nth_element(best.begin(), best.begin() + (k - 1), best.end(), std::greater<float>());
    return best[size_t(k - 1)];
}

// The rows that may be among the k best, some of them with their exact score; false: too many to be worth it.
bool Int8Index::candidates(const Query& query, const float* approximate, int64_t k, std::vector<Found>& found) const {
    const int64_t length = query.end - query.start;
    // Scoring a third of the rows in an order of its own costs about what scoring all of them does.
    const size_t most = size_t(std::max<int64_t>(2 * k, length / 3));
    const float threshold = reached(query, approximate, k);
    if (!(threshold > -kInfinity)) return false;
    std::vector<float> scores;
    int64_t next = query.start;  // rows before it that reach the threshold are scored
    for (; next < query.end && int64_t(scores.size()) < 2 * k; ++next) {
        if (!(approximate[next] >= threshold)) continue;
        found.push_back({exact(query.unit, next), next});
        if (!std::isfinite(found.back().score)) return false;
        scores.push_back(found.back().score);
    }
    if (int64_t(scores.size()) < k) return false;
    std::nth_element(scores.begin(), scores.begin() + (k - 1), scores.end(), std::greater<float>());
    // Compared in fp32: where |s_i| and the errors are below 4, as those are that matter, rounding adds less than 4e-6.
    const float bound = scores[size_t(k - 1)] - 4e-6f;
    const float of_residual = float(query.length), of_scale = float(query.residual * 127 * std::sqrt(double(padded_)));
    const float *residual = residual_.data(), *scale = scale_.data();
    for (int64_t first = query.start; first < query.end; first += kRows) {
        const int64_t last = std::min(first + kRows, query.end);
        int any = 0;
        for (int64_t row = first; row < last; ++row)
            any |= !(approximate[row] + (of_residual * residual[row] + of_scale * scale[row]) < bound);
        for (int64_t row = first; any && row < last; ++row) {
            if (approximate[row] + (of_residual * residual[row] + of_scale * scale[row]) < bound) continue;
            if (row < next && approximate[row] >= threshold) continue;
            if (found.size() == most) return false;
            found.push_back({kUnscored, row});
        }
    }
    return true;
}

// `approximate` [n]: s_i of the query, or null: every row is scored.
void Int8Index::select(Query& query, const float* approximate, int64_t k, float* scores, int64_t* indices,
                       int64_t* reranked, int threads) const {
    const int64_t length = query.end - query.start;
    *reranked = 0;
    if (k == 0 || length == 0) {
        std::fill(scores, scores + k, -kInfinity);
        std::fill(indices, indices + k, int64_t(-1));
        return;
    }
    std::vector<Found> found;
    bool all = approximate == nullptr || length <= 2 * k;
    if (!all) {
        all = !candidates(query, approximate, k, found);
        const int failed = all ? std::min(fallbacks_.load() + 1, 6) : 0;
        fallbacks_.store(failed);
        skip_.store(all ? 1 << failed : 0);
    }
    if (all) {
        found.resize(size_t(length));
        for (int64_t i = 0; i < length; ++i) found[size_t(i)] = {kUnscored, query.start + i};
    }
    *reranked = int64_t(found.size());

    const int helpers = int64_t(found.size()) * keys_.d < (1 << 21) ? 1 : threads;  // starting one costs 10-20 us
    share(int64_t(found.size()), helpers, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            Found& one = found[size_t(i)];
            if (one.score == kUnscored) one.score = exact(query.unit, one.row);
        }
    });
    found.erase(std::remove_if(found.begin(), found.end(), [](const Found& one) { return !std::isfinite(one.score); }),
                found.end());
    const int64_t kept = std::min<int64_t>(k, int64_t(found.size()));
    std::partial_sort(found.begin(), found.begin() + kept, found.end(), better);
    for (int64_t i = 0; i < k; ++i) {
        scores[i] = i < kept ? found[size_t(i)].score : -kInfinity;
        indices[i] = i < kept ? found[size_t(i)].row : -1;
    }
}

void Int8Index::search(const float* q, int64_t t, int64_t k, const int64_t* ranges, float* scores, int64_t* indices,
                       int64_t* reranked, int threads) const {
    std::vector<Query> queries(static_cast<size_t>(t));
    std::vector<float> rotated(static_cast<size_t>(padded_));
    for (int64_t i = 0; i < t; ++i) {
        Query& query = queries[size_t(i)];
        query.unit = q + i * keys_.d;
        query.start = ranges ? std::min(std::max<int64_t>(ranges[2 * i], 0), keys_.n) : 0;
        query.end = ranges ? std::max(std::min(ranges[2 * i + 1], keys_.n), query.start) : keys_.n;
        double offset = 0, squares = 0, sum = 0, left = 0;
        float largest = 0;
        for (int64_t j = 0; j < padded_; ++j) {
            rotated[size_t(j)] = j < keys_.d ? query.unit[j] : 0.0f;
            squares += double(rotated[size_t(j)]) * rotated[size_t(j)];
            offset += double(rotated[size_t(j)]) * centre_[size_t(j)];
        }
        if (!std::isfinite(squares)) query.end = query.start;  // retrieves nothing
        rotate(rotated.data());
        for (float x : rotated) {
            sum += std::fabs(x);
            largest = std::max(largest, std::fabs(x));
        }
        // int16, and so that no sum of products with int8 leaves int32: each rounding adds a half at most
        const double room = double(1u << 31) - 1 - 64.0 * double(padded_);
        query.step = float(std::max(double(largest) / 32766, 127 * sum / room) * (1 + 1e-6));
        query.codes.resize(size_t(padded_));
        const double over = query.step > 0 && query.end > query.start ? 1 / double(query.step) : 0;
        for (int64_t j = 0; j < padded_; ++j) {
            query.codes[size_t(j)] = int16_t(std::lrint(rotated[size_t(j)] * over));
            const double rest = rotated[size_t(j)] - double(query.step) * query.codes[size_t(j)];
            left += rest * rest;
        }
        query.offset = float(offset);
        query.length = std::sqrt(squares) * (1 + 1e-6);
        query.residual = std::sqrt(left) * (1 + 1e-6);
    }

    int skip = skip_.load();
    const bool direct = skip > 0;  // the scan has lately been for nothing
    if (direct) skip_.compare_exchange_strong(skip, skip - 1);
    std::vector<float> approximate;
    if (!direct) {
        approximate.resize(size_t(t * keys_.n));
        const int helpers = t * keys_.n * padded_ < (1 << 22) ? 1 : threads;
        share(keys_.n, helpers, [&](int64_t, int64_t begin, int64_t end) { scan(queries, begin, end, approximate.data()); });
    }
    for (int64_t i = 0; i < t; ++i)
        select(queries[size_t(i)], direct ? nullptr : approximate.data() + i * keys_.n, k, scores + i * k, indices + i * k,
               reranked + i, threads);
}

}  // namespace unike
