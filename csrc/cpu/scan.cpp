#include "scan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "halves.h"
#include "threads.h"
#include "topk.h"
#include "vectors.h"

namespace unike {
namespace {

constexpr int64_t kTile = 256;  // keys whose products are compared before the next come

// Queries in bfloat16, each by a power of two that brings its length to [1, 2): exact, but for what would be subnormal.
struct Halves {
    std::vector<uint16_t> q;
    std::vector<float> length;

    explicit Halves(const ScanCall& c) : q(size_t(c.queries * c.keys.d)), length(size_t(c.queries)) {
        const int64_t d = c.keys.d;
        for (int64_t i = 0; i < c.queries; ++i) {
            const BFloat16* given = reinterpret_cast<const BFloat16*>(c.bf16) + i * d;
            double squares = 0;
            for (int64_t j = 0; j < d; ++j) squares += double(at(given, j)) * at(given, j);
            const int exponent = squares > 0 && std::isfinite(squares) ? std::ilogb(std::sqrt(squares)) : 0;
            length[size_t(i)] = float(std::ldexp(std::sqrt(squares), -exponent));
            for (int64_t j = 0; j < d; ++j)
                put(reinterpret_cast<BFloat16*>(q.data()) + i * d, j, std::ldexp(at(given, j), -exponent));
        }
    }
};

struct Multiply {
    const ScanCall& c;
    void (*wide)(const Products&);
    const Halves* halves;  // null: fp32 queries

    // out [some, kTile]: products of the unit queries of these numbers with `count` keys.
    void operator()(const int64_t* of, int64_t some, int64_t first, int64_t count, float* out, const void** room) const {
        const int64_t d = c.keys.d;
        Products call{room, some, row_of(c.keys, first), c.keys.dtype, count, c.keys.stride, d, out, kTile, c.queries < 4};
        for (int64_t j = 0; j < some; ++j)
            room[j] = halves ? static_cast<const void*>(halves->q.data() + of[j] * d) : c.q + of[j] * d;
        if (halves == nullptr) return wide(call);
        avx512bf16::multiply(call);
        for (int64_t j = 0; j < some; ++j) {
            float* products = out + j * kTile;
            const float length = halves->length[size_t(of[j])];
            // The units count what is subnormal as zero: against 2^-70 that is nothing. Smaller sums, and what overflowed or
            // is not finite, are left to fp32.
            int odd = 0;
            for (int64_t i = 0; i < count; ++i) {
                const float size = std::fabs(products[i]);
                odd |= !(size >= 0x1p-70f) | !(size <= 0x1p100f);
            }
            for (int64_t i = 0; i < count; ++i) {
                const float size = std::fabs(products[i]);
                if (odd && (!(size >= 0x1p-70f) || !(size <= 0x1p100f))) {
                    const void* query = c.q + of[j] * d;
                    const char* row = row_of(c.keys, first + i);
                    wide({&query, 1, row, c.keys.dtype, 1, c.keys.stride, d, products + i, kTile, c.queries < 4});
                } else {
                    products[i] /= length;
                }
            }
        }
    }
};

// Keys [begin, end) for every query, into lists of their own.
void scan_rows(const ScanCall& c, const Multiply& multiply, int64_t begin, int64_t end, float* scores, int64_t* indices,
               int64_t* found) {
    std::vector<float> products(size_t(c.queries * kTile));
    std::vector<const void*> room(static_cast<size_t>(c.queries));
    std::vector<int64_t> of(static_cast<size_t>(c.queries));
    for (int64_t first = begin; first < end; first += kTile) {
        const int64_t count = std::min(kTile, end - first);
        int64_t some = 0;
        for (int64_t i = 0; i < c.queries; ++i)
            if (!c.ranges || (c.ranges[2 * i] < first + count && c.ranges[2 * i + 1] > first)) of[size_t(some++)] = i;
        if (some == 0) continue;
        multiply(of.data(), some, first, count, products.data(), room.data());
        for (int64_t j = 0; j < some; ++j) {
            const int64_t i = of[size_t(j)];
            keep_best({products.data() + j * kTile, c.keys.norm + first, c.ranges ? c.ranges + 2 * i : nullptr,
                       scores + i * c.k, indices + i * c.k, found + i, 1, count, first, c.k});
        }
    }
}

}  // namespace

bool can_scan(Level level) { return level != Level::portable && has_avx2(); }

void scan(const ScanCall& c, Level level) {
    std::fill(c.found, c.found + c.queries, int64_t(0));
    static const bool has_wide = has_avx512(), has_halves = has_bf16();
    const bool best = level == Level::best;
    const std::unique_ptr<Halves> halves(best && has_halves && c.bf16 ? new Halves(c) : nullptr);
    const Multiply multiply{c, best && has_wide ? avx512::multiply : avx2::multiply, halves.get()};
    const int64_t work = c.keys.n * c.keys.d * std::max<int64_t>(c.queries, 1);
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(c.threads, work >> 21));  // starting one costs 10-20 us
    const size_t lists = size_t(c.queries * c.k);
    std::vector<float> scores(lists * size_t(parts - 1));
    std::vector<int64_t> indices(lists * size_t(parts - 1)), found(size_t(c.queries * (parts - 1)), 0);
    share(c.keys.n, parts, [&](int64_t part, int64_t begin, int64_t end) {
        if (part == 0) return scan_rows(c, multiply, begin, end, c.scores, c.indices, c.found);
        const size_t at = size_t(part - 1);
        scan_rows(c, multiply, begin, end, scores.data() + at * lists, indices.data() + at * lists,
                  found.data() + at * size_t(c.queries));
    });
    for (int64_t part = 1; part < parts; ++part)  // in the order of the keys: among equal scores the lowest index wins
        for (int64_t i = 0; i < c.queries; ++i) {
            const size_t at = size_t(part - 1) * lists + size_t(i * c.k);
            add_best(scores.data() + at, indices.data() + at, found[size_t((part - 1) * c.queries + i)],
                     c.scores + i * c.k, c.indices + i * c.k, c.found + i, c.k);
        }
    for (int64_t i = 0; i < c.queries; ++i) {
        std::fill(c.scores + i * c.k + c.found[i], c.scores + (i + 1) * c.k, -std::numeric_limits<float>::infinity());
        std::fill(c.indices + i * c.k + c.found[i], c.indices + (i + 1) * c.k, int64_t(-1));
    }
}

}  // namespace unike
