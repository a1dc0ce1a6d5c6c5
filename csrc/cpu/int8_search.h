// Exact search by cosine over an int8 copy of the keys. No torch, no Python: plain pointers.
//
// The int8 scores only decide which rows are scored exactly; no score that is returned comes from them. With u_i = key_i /
// key_norm_i, centre c, rotation R (orthogonal) and unit query q:
//
//   q . u_i = q . c + (R q) . v_i,  v_i = R (u_i - c) = scale_i z_i + e_i,  z_i int8,  |e_i| = residual_i
//
// so the int8 score s_i = q . c + (R q) . (scale_i z_i) is off by at most |q| residual_i (Cauchy-Schwarz). K rows or some more
// with large s_i are scored exactly; the K-th best of them, L, bounds the K-th best score from below; every row with s_i +
// |q| residual_i >= L is scored exactly too. Rows that are left out are worse than K others: the set is exact whatever the keys look like.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "../dtype.h"

namespace unike {

// Rows [n, d] of the caller, `stride` elements apart; norm [n]: what to divide a row by (0: the row counts as zeros).
struct Keys {
    const void* rows;
    Dtype dtype;
    int64_t n, d, stride;
    const float* norm;
};

inline const char* row_of(const Keys& keys, int64_t row) {
    return static_cast<const char*>(keys.rows) + row * keys.stride * bytes_of(keys.dtype);
}

// Instructions that a search may use: as good as the machine has, or less, for tests.
enum class Level { portable, avx2, best };
struct Vectors;  // vectors.h

class Int8Index {
  public:
    // Reads all keys once. They must stay where they are, unchanged, as long as the index lives: the best are read again.
    Int8Index(const Keys& keys, Level level, int threads);
    Int8Index(const Int8Index&) = delete;
    Int8Index& operator=(const Int8Index&) = delete;

    // The k best keys of each unit query, q [t, d], among keys ranges[2 i] <= row < ranges[2 i + 1] (null: all).
    // scores, indices [t, k]: largest first, among equal scores the lowest index; -inf and -1 where there is none. A score
    // that is not finite is none. reranked [t]: how many rows were scored exactly (the length of the range: all were).
    // `threads` share each query's rows; the result does not depend on their number.
    void search(const float* q, int64_t t, int64_t k, const int64_t* ranges, float* scores, int64_t* indices,
                int64_t* reranked, int threads) const;

    int64_t bytes() const;  // of the copy

    struct Found {
        float score;
        int64_t row;
    };

  private:
    struct Query;
    float reached(const Query& query, const float* approximate, int64_t k) const;
    bool candidates(const Query& query, const float* approximate, int64_t k, std::vector<Found>& found) const;
    void rotate(float* row) const;
    void normalised(int64_t row, float* u) const;
    void encode(int64_t row, float* x);
    float exact(const float* q, int64_t row) const;
    void scan(const std::vector<Query>& queries, int64_t begin, int64_t end, float* scores) const;
    void select(Query& query, const float* approximate, int64_t k, float* scores, int64_t* indices, int64_t* reranked,
                int threads) const;

    Keys keys_;
    const Vectors& vectors_;
    int64_t padded_;         // d rounded up to whole registers
    int64_t block_;          // length of a Hadamard transform: the largest power of two <= padded_
    double slack_;           // bound on what rounding in fp32 can add to the difference of s_i and the exact score
    std::vector<float> signs_, centre_;
    std::vector<int8_t> storage_;
    int8_t* codes_ = nullptr;                // [n, padded], 64-byte aligned
    std::vector<float> scale_, residual_;    // residual: infinity where the row is not finite, so that it is always looked at
    mutable std::atomic<int> fallbacks_{0};  // searches in a row that had to score nearly everything
    mutable std::atomic<int> skip_{0};       // so many searches do not try the int8 scan
};

}  // namespace unike
