// q . row for a few queries and rows, in registers of LANES fp32 numbers. Included once per instruction level; as in
// operators.inl, nothing of the C++ library.

typedef float Wide __attribute__((vector_size(4 * LANES)));
typedef uint32_t WideBits __attribute__((vector_size(4 * LANES)));
typedef uint16_t HalfBits __attribute__((vector_size(2 * LANES)));

static inline Wide load(const float* p) {
    Wide v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

static inline Wide load(const BFloat16* p) {
    HalfBits bits;
    std::memcpy(&bits, p, sizeof bits);
    return (Wide)(__builtin_convertvector(bits, WideBits) << 16);
}

static inline Wide load(const Float16* p) {
#if LANES == 16
    return (Wide)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
    return (Wide)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
}

// Keeps a loop's sums in registers.
#define UNROLLED _Pragma("GCC unroll 8")

// The sum of a register and of the products from `i` on, fewer than LANES.
template <typename T>
static inline float total(Wide sums, const float* query, const T* row, int64_t i, int64_t d) {
    float lanes[LANES];
    std::memcpy(lanes, &sums, sizeof lanes);
    for (int64_t rest = i; rest < d; ++rest) lanes[rest - i] += at(row, rest) * query[rest];
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

// R x QUERIES sums, each in one register: enough of them that none waits for the one before.
template <int R, int QUERIES, bool FIRST, typename T>
static inline void block(const Products& c, const void* const* queries, const T* rows, float* out) {
    Wide sums[R][QUERIES] = {};
    int64_t i = 0;
    for (; i + LANES <= c.d; i += LANES) {
        Wide key[R];
        UNROLLED for (int r = 0; r < R; ++r) {
            if (FIRST) __builtin_prefetch(rows + (r + R) * c.stride + i);  // of the rows that come next
            key[r] = load(rows + r * c.stride + i);
        }
        UNROLLED for (int j = 0; j < QUERIES; ++j) {
            const Wide x = load(static_cast<const float*>(queries[j]) + i);
            UNROLLED for (int r = 0; r < R; ++r) sums[r][j] += key[r] * x;
        }
    }
    UNROLLED for (int r = 0; r < R; ++r) {
        UNROLLED for (int j = 0; j < QUERIES; ++j) {
            out[j * c.width + r] = total(sums[r][j], static_cast<const float*>(queries[j]), rows + r * c.stride, i, c.d);
        }
    }
}

// One row and up to three queries: one stream from memory, asked for far ahead. Four sums a query, so that none waits.
template <int QUERIES, typename T>
static inline void one_row(const Products& c, const T* row, float* out) {
    constexpr int64_t kAhead = 6144 / sizeof(T);  // elements
    Wide sums[QUERIES][4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= c.d; i += 4 * LANES) {
        UNROLLED for (int64_t line = 0; line < 4 * LANES; line += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i + line + kAhead);
        UNROLLED for (int part = 0; part < 4; ++part) {
            const Wide key = load(row + i + part * LANES);
            UNROLLED for (int j = 0; j < QUERIES; ++j)
                sums[j][part] += key * load(static_cast<const float*>(c.queries[j]) + i + part * LANES);
        }
    }
    for (; i + LANES <= c.d; i += LANES) {
        const Wide key = load(row + i);
        UNROLLED for (int j = 0; j < QUERIES; ++j) sums[j][0] += key * load(static_cast<const float*>(c.queries[j]) + i);
    }
    UNROLLED for (int j = 0; j < QUERIES; ++j)
        out[j * c.width] = total((sums[j][0] + sums[j][1]) + (sums[j][2] + sums[j][3]), static_cast<const float*>(c.queries[j]), row, i, c.d);
}

// All queries meet a few rows before the next come.
template <int R, typename T>
static inline void some_rows(const Products& c, const T* rows, float* out) {
    int64_t j = c.count_queries < 4 ? 0 : 4;
    if (j == 4) block<R, 4, true>(c, c.queries, rows, out);
    for (; j + 4 <= c.count_queries; j += 4) block<R, 4, false>(c, c.queries + j, rows, out + j * c.width);
    for (; j < c.count_queries; ++j) block<R, 1, true>(c, c.queries + j, rows, out + j * c.width);
}

template <typename T>
static inline void all_rows(const Products& c) {
    const T* rows = static_cast<const T*>(c.rows);
    int64_t row = 0;
    if (c.one_by_one) {
        for (; row < c.count; ++row) {
            const T* one = rows + row * c.stride;
            switch (c.count_queries) {
                case 1: one_row<1>(c, one, c.out + row); break;
                case 2: one_row<2>(c, one, c.out + row); break;
                case 3: one_row<3>(c, one, c.out + row); break;
            }
        }
        return;
    }
    for (; row + ROWS <= c.count; row += ROWS) some_rows<ROWS>(c, rows + row * c.stride, c.out + row);
    for (; row < c.count; ++row) some_rows<1>(c, rows + row * c.stride, c.out + row);
}

void multiply(const Products& c) {
    switch (c.dtype) {
        case Dtype::float32: all_rows<float>(c); break;
        case Dtype::bfloat16: all_rows<BFloat16>(c); break;
        case Dtype::float16: all_rows<Float16>(c); break;
    }
}
