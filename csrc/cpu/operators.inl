// The text of the two operators, included once per instruction level inside its namespace. No function of the standard
// library but those of C: an inline one compiled for AVX2 could be the copy that the linker keeps for everybody.

#if defined(__GNUC__) || defined(__clang__)
typedef float Lanes __attribute__((vector_size(32)));
typedef uint16_t Shorts __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(32)));

static inline Lanes lanes(const float* p) {
    Lanes v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

static inline Lanes lanes(const BFloat16* p) {
    Shorts s;
    std::memcpy(&s, p, sizeof s);
    return (Lanes)(__builtin_convertvector(s, Words) << 16);
}

static inline void store(float* p, Lanes v) { std::memcpy(p, &v, sizeof v); }
static inline Lanes spread(float x) { return Lanes{x, x, x, x, x, x, x, x}; }
#else
struct Lanes {
    float v[8];
    float operator[](int i) const { return v[i]; }
};
static inline Lanes operator+(Lanes a, Lanes b) {
    for (int i = 0; i < 8; ++i) a.v[i] += b.v[i];
    return a;
}
static inline Lanes operator*(Lanes a, Lanes b) {
    for (int i = 0; i < 8; ++i) a.v[i] *= b.v[i];
    return a;
}
template <typename T>
static inline Lanes lanes(const T* p) {
    Lanes a;
    for (int i = 0; i < 8; ++i) a.v[i] = at(p, i);
    return a;
}
static inline void store(float* p, Lanes a) { std::memcpy(p, a.v, sizeof a.v); }
static inline Lanes spread(float x) { return Lanes{{x, x, x, x, x, x, x, x}}; }
#endif

#if UNIKE_F16C
static inline Lanes lanes(const Float16* p) {
    return (Lanes)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
#elif defined(__GNUC__) || defined(__clang__)
static inline Lanes lanes(const Float16* p) {
    return Lanes{at(p, 0), at(p, 1), at(p, 2), at(p, 3), at(p, 4), at(p, 5), at(p, 6), at(p, 7)};
}
#endif

// ---------------------------------------------------------------------------------------------------------- rows

template <typename T>
static inline float dot_of(const float* a, const T* b, int64_t n) {
    Lanes s[4] = {spread(0), spread(0), spread(0), spread(0)};
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int part = 0; part < 4; ++part) s[part] = s[part] + lanes(a + i + 8 * part) * lanes(b + i + 8 * part);
    for (; i + 8 <= n; i += 8) s[0] = s[0] + lanes(a + i) * lanes(b + i);
    const Lanes all = (s[0] + s[1]) + (s[2] + s[3]);
    float sum = ((all[0] + all[4]) + (all[2] + all[6])) + ((all[1] + all[5]) + (all[3] + all[7]));
    for (; i < n; ++i) sum += a[i] * at(b, i);
    return sum;
}

template <typename T>
static inline void add_of(float* out, float weight, const T* b, int64_t n) {
    const Lanes w = spread(weight);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) store(out + i, lanes(out + i) + w * lanes(b + i));
    for (; i < n; ++i) out[i] += weight * at(b, i);
}

template <typename T>
static inline void widen_of(float* out, const T* b, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) store(out + i, lanes(b + i));
    for (; i < n; ++i) out[i] = at(b, i);
}

// use(pointer to element `from` of the array, in its own type)
#define UNIKE_TYPED(array, from, use)                                              \
    switch ((array).dtype) {                                                       \
        case Dtype::float32: use(static_cast<const float*>((array).data) + (from)); break;       \
        case Dtype::bfloat16: use(static_cast<const BFloat16*>((array).data) + (from)); break;   \
        case Dtype::float16: use(static_cast<const Float16*>((array).data) + (from)); break;     \
    }

// a . array[from : from + n]
static inline float dot(const float* a, const Array& array, int64_t from, int64_t n) {
    float result = 0;
#define USE(row) result = dot_of(a, row, n)
    UNIKE_TYPED(array, from, USE)
#undef USE
    return result;
}

// out += weight * array[from : from + n]
static inline void add(float* out, float weight, const Array& array, int64_t from, int64_t n) {
#define USE(row) add_of(out, weight, row, n)
    UNIKE_TYPED(array, from, USE)
#undef USE
}

static inline void widen(float* out, const Array& array, int64_t from, int64_t n) {
#define USE(row) widen_of(out, row, n)
    UNIKE_TYPED(array, from, USE)
#undef USE
}

static inline float element(const Array& array, int64_t i) {
    float result = 0;
#define USE(row) result = at(row, 0)
    UNIKE_TYPED(array, i, USE)
#undef USE
    return result;
}

// The fp32 numbers array[from : from + n]: where they lie, or in `room`.
static inline const float* wide(const Array& array, int64_t from, int64_t n, float* room) {
    if (array.dtype == Dtype::float32) return static_cast<const float*>(array.data) + from;
    widen(room, array, from, n);
    return room;
}

// row[from : from + n] of dtype, rounded.
static inline void round_into(void* data, Dtype dtype, int64_t from, const float* values, int64_t n) {
    switch (dtype) {
        case Dtype::float32: std::memcpy(static_cast<float*>(data) + from, values, size_t(n) * sizeof(float)); break;
        case Dtype::bfloat16:
            for (int64_t i = 0; i < n; ++i) put(static_cast<BFloat16*>(data) + from, i, values[i]);
            break;
        case Dtype::float16:
            for (int64_t i = 0; i < n; ++i) put(static_cast<Float16*>(data) + from, i, values[i]);
            break;
    }
}

// ------------------------------------------------------------------------------------------------- extra_neurons

static inline float activated(float x, Act act) {
    switch (act) {
        case Act::relu: return x < 0 ? 0 : x;  // NaN stays
        case Act::gelu: return 0.5f * x * (1 + erff(x * 0.70710678118654752f));
        case Act::gelu_tanh: return 0.5f * x * (1 + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
        case Act::silu: return x / (1 + expf(-x));
        case Act::identity: break;
    }
    return x;
}

static inline float hidden(const NeuronCall& c, const float* x, int64_t j) {
    float o = dot(x, c.keys, j * c.d, c.d);
    o = activated(c.key_bias.data ? o + element(c.key_bias, j) : o, c.act);
    if (!c.up.data) return o;
    const float gate = dot(x, c.up, j * c.d, c.d);
    return o * (c.up_bias.data ? gate + element(c.up_bias, j) : gate);
}

// out += weight * (values[j] + beta * zeta of the group)
static inline void add_value(const NeuronCall& c, float* out, float weight, int64_t j, int64_t group, float* room) {
    if (!c.zeta.data || c.beta == 0) {
        add(out, weight, c.values, j * c.d_out, c.d_out);
        return;
    }
    widen(room, c.values, j * c.d_out, c.d_out);
    add(room, c.beta, c.zeta, c.zeta_of_group ? group * c.d_out : 0, c.d_out);
    add_of(out, weight, static_cast<const float*>(room), c.d_out);
}

static inline float route_weight(const NeuronCall& c, int64_t row, int64_t group) {
    return c.route.data ? element(c.route, row * c.groups + group) : 1.0f;
}

static inline bool add_group(const NeuronCall& c, const float* x, int64_t row, int64_t group, float* sum, float* room) {
    const int64_t begin = c.group_ptr ? c.group_ptr[group] : 0, end = c.group_ptr ? c.group_ptr[group + 1] : c.n;
    const float weight = begin < end ? route_weight(c, row, group) : 0;
    if (weight == 0) return false;
    for (int64_t j = begin; j < end; ++j) add_value(c, sum, weight * hidden(c, x, j), j, group, room);
    return true;
}

static inline bool add_groups(const NeuronCall& c, const float* x, int64_t row, float* sum, float* room) {
    bool acts = false;
    if (!c.selected) {
        for (int64_t group = 0; group < c.groups; ++group) acts |= add_group(c, x, row, group, sum, room);
        return acts;
    }
    const int64_t* chosen = c.selected + row * c.slots;
    for (int64_t slot = 0; slot < c.slots; ++slot) {
        bool again = chosen[slot] < 0;
        for (int64_t before = 0; before < slot && !again; ++before) again = chosen[before] == chosen[slot];
        if (!again) acts |= add_group(c, x, row, chosen[slot], sum, room);
    }
    return acts;
}

static inline void finish(const NeuronCall& c, int64_t token, bool acts, float* sum) {
    if (c.add && !acts) return;
    if (c.add) add(sum, 1, Array{c.y, c.y_dtype}, token * c.d_out, c.d_out);
    round_into(c.y, c.y_dtype, token * c.d_out, sum, c.d_out);
}

// Every group acts on every token: the neurons go by once, for all tokens.
static inline void run_all(const NeuronCall& c, float* work) {
    float *sums = work, *xs = sums + c.tokens * c.d_out, *room = xs + c.tokens * c.d;
    for (int64_t i = 0; i < c.tokens * c.d_out; ++i) sums[i] = 0;
    const float* x = wide(c.x, 0, c.tokens * c.d, xs);
    const int64_t end = c.group_ptr ? c.group_ptr[c.groups] : c.n;
    for (int64_t j = 0, group = 0; j < end; ++j) {
        while (c.group_ptr && c.group_ptr[group + 1] <= j) ++group;
        for (int64_t t = 0; t < c.tokens; ++t)
            add_value(c, sums + t * c.d_out, hidden(c, x + t * c.d, j), j, group, room);
    }
    for (int64_t t = 0; t < c.tokens; ++t) finish(c, t, end > 0, sums + t * c.d_out);
}

void run(const NeuronCall& c, float* work) {
    if (!c.route.data && !c.selected) return run_all(c, work);
    float *sum = work, *xs = sum + c.d_out, *room = xs + c.d;
    for (int64_t t = 0; t < c.tokens; ++t) {
        const int64_t row = c.token_to_case ? c.token_to_case[t] : t;
        for (int64_t i = 0; i < c.d_out; ++i) sum[i] = 0;
        const bool acts = row >= 0 && add_groups(c, wide(c.x, t * c.d, c.d, xs), row, sum, room);
        finish(c, t, acts, sum);
    }
}

// ----------------------------------------------------------------------------------------------- knowledge_shift

// Asks for [from, from + n) of the array, which lies anywhere in a large table.
static inline void ask_for(const Array& array, int64_t from, int64_t n) {
#if defined(__GNUC__) || defined(__clang__)
    const int64_t size = bytes_of(array.dtype);
    const char* p = static_cast<const char*>(array.data) + from * size;
    for (int64_t at = 0; at < n * size; at += 64) __builtin_prefetch(p + at);
#else
    (void)array, (void)from, (void)n;
#endif
}

// scores [heads, slots]: softcap(scaling q . k_i), -inf where no item is.
template <typename T>
static inline void scores_of(const ShiftCall& c, const float* q, const T* keys, const int64_t* ids, float* scores) {
    const int64_t share = c.heads / c.kv_heads;
    // The items lie anywhere: read one after the other, each costs the time of a miss. Long ones the machine sees coming.
    const int64_t key_size = c.kv_heads * c.hd, value_size = c.kv_heads * c.hv, bytes = key_size * int64_t(sizeof(T));
    int64_t ahead = bytes <= 4096 ? 0 : c.slots;
    for (int64_t slot = 0; slot < c.slots; ++slot) {
        const bool there = ids[slot] >= 0;
        if (there && bytes <= 4096) ask_for(c.values, ids[slot] * value_size, value_size);
        for (; ahead < c.slots && (ahead - slot) * bytes < 16384; ++ahead)
            if (ids[ahead] >= 0) ask_for(c.keys, ids[ahead] * key_size, key_size);
        const T* key = keys + (there ? ids[slot] * key_size : 0);
        for (int64_t head = 0; head < c.heads; ++head) {
            const float s = there ? c.scaling * dot_of(q + head * c.hd, key + head / share * c.hd, c.hd) : -INFINITY;
            scores[head * c.slots + slot] = c.softcap == 0 || !there ? s : c.softcap * tanhf(s / c.softcap);
        }
    }
}

// out [8 * PARTS] = sum of weights[slot] values[ids[slot]], in registers.
template <int PARTS, typename T>
static inline void mix_block(const int64_t* ids, int64_t slots, const float* weights, const T* values, int64_t stride, float* out) {
    Lanes sums[PARTS];
    for (int part = 0; part < PARTS; ++part) sums[part] = spread(0);
    for (int64_t slot = 0; slot < slots; ++slot) {
        if (ids[slot] < 0) continue;
        const Lanes w = spread(weights[slot]);
        const T* row = values + ids[slot] * stride;
        for (int part = 0; part < PARTS; ++part) sums[part] = sums[part] + w * lanes(row + 8 * part);
    }
    for (int part = 0; part < PARTS; ++part) store(out + 8 * part, sums[part]);
}

template <typename T>
static inline void mix_of(const ShiftCall& c, const T* values, const int64_t* ids, const float* weights, float* sums) {
    const int64_t share = c.heads / c.kv_heads, stride = c.kv_heads * c.hv;
    for (int64_t head = 0; head < c.heads; ++head) {
        const float* w = weights + head * c.slots;
        const T* from = values + head / share * c.hv;
        float* out = sums + head * c.hv;
        int64_t i = 0;
        for (; i + 32 <= c.hv; i += 32) mix_block<4>(ids, c.slots, w, from + i, stride, out + i);
        for (; i + 8 <= c.hv; i += 8) mix_block<1>(ids, c.slots, w, from + i, stride, out + i);
        for (; i < c.hv; ++i) {
            float sum = 0;
            for (int64_t slot = 0; slot < c.slots; ++slot)
                if (ids[slot] >= 0) sum += w[slot] * at(from + ids[slot] * stride, i);
            out[i] = sum;
        }
    }
}

// e^x for x <= 0, to an ulp; 0 below the least normal number. What a compiler can do for several x at once: it has no branch.
static inline float exp_of(float x) {
    const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // to the nearest integer, in the low bits
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f, p = p * r + 8.3334519073e-3f, p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f, p = p * r + 5.0000001201e-1f, p = p * (r * r) + r + 1;
    const float power = from_bits((to_bits(shifted) << 23) + 0x3f800000u);
    return x < -87.3f ? 0.0f : p * power;
}

static inline void softmax_of(float* x, int64_t n) {
    float largest[8] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY}, sums[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int lane = 0; lane < 8; ++lane) largest[lane] = x[i + lane] > largest[lane] ? x[i + lane] : largest[lane];
    for (; i < n; ++i) largest[0] = x[i] > largest[0] ? x[i] : largest[0];
    float most = largest[0];
    for (int lane = 1; lane < 8; ++lane) most = largest[lane] > most ? largest[lane] : most;
    for (i = 0; i < n; ++i) x[i] = exp_of(x[i] - most);
    for (i = 0; i + 8 <= n; i += 8)
        for (int lane = 0; lane < 8; ++lane) sums[lane] += x[i + lane];
    for (; i < n; ++i) sums[i % 8] += x[i];
    const float inverse = 1 / (((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7])));
    for (i = 0; i < n; ++i) x[i] *= inverse;
}

// sums [heads, hv] = softmax(scaling q . k_i) v_i over the items of one row that are there; scores [heads, slots].
static inline void attend(const ShiftCall& c, const float* q, const int64_t* ids, float* scores, float* sums) {
#define USE(keys) scores_of(c, q, keys, ids, scores)
    UNIKE_TYPED(c.keys, 0, USE)
#undef USE
    for (int64_t head = 0; head < c.heads; ++head) softmax_of(scores + head * c.slots, c.slots);
#define USE(values) mix_of(c, values, ids, scores, sums)
    UNIKE_TYPED(c.values, 0, USE)
#undef USE
}

static inline float length_of(const float* x, int64_t n) { return sqrtf(dot_of(x, x, n)); }

// a . b in fp64: the terms of a small cosine cancel.
static inline double exact_dot(const float* a, const float* b, int64_t n) {
    double lanes[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int lane = 0; lane < 8; ++lane) lanes[lane] += double(a[i + lane]) * b[i + lane];
    for (; i < n; ++i) lanes[0] += double(a[i]) * b[i];
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// cos(a, b), 0 where one of them is zero.
static inline float cosine_of(const float* a, const float* b, int64_t n, bool clamp) {
    const double lengths = sqrt(exact_dot(a, a, n)) * sqrt(exact_dot(b, b, n));
    const float cosine = lengths == 0 ? 0 : float(exact_dot(a, b, n) / lengths);
    return !clamp ? cosine : cosine < 0 ? 0 : cosine > 1 ? 1 : cosine;  // NaN stays
}

static inline bool names_an_item(const ShiftCall& c, int64_t row) {
    bool found = false;
    for (int64_t slot = 0; row >= 0 && c.items > 0 && slot < c.slots; ++slot) found |= c.indices[row * c.slots + slot] >= 0;
    return found;
}

void run(const ShiftCall& c, float* work) {
    const int64_t width = c.heads * c.hv;
    const size_t bytes = size_t(width * bytes_of(c.h_input.dtype));
    float *scores = work, *sums = scores + c.heads * c.slots, *qs = sums + width, *hs = qs + c.heads * c.hd;
    const float untouched = c.alpha_of_input ? 1.0f : 0.0f;
    const bool given = c.alpha.data != nullptr;
    for (int64_t i = 0; given && c.used && i < (c.alpha_of_case ? c.cases : c.tokens); ++i) {
        const int64_t row = c.alpha_of_case || !c.token_to_case ? i : c.token_to_case[i];
        c.used[i] = names_an_item(c, row) ? element(c.alpha, i) : untouched;
    }
    for (int64_t t = 0; t < c.tokens; ++t) {
        const int64_t row = c.token_to_case ? c.token_to_case[t] : t;
        const bool acts = names_an_item(c, row);
        float alpha = acts && given ? element(c.alpha, c.alpha_of_case ? row : t) : untouched;
        const float* h = nullptr;
        if (acts && (!given || alpha != untouched)) {
            attend(c, wide(c.q, t * c.heads * c.hd, c.heads * c.hd, qs), c.indices + row * c.slots, scores, sums);
            h = wide(c.h_input, t * width, width, hs);
            if (!given) alpha = cosine_of(sums, h, width, c.clamp);
        }
        if (!given && c.used) c.used[t] = alpha;
        if (alpha == untouched) {  // every bit stays
            std::memcpy(static_cast<char*>(c.out) + size_t(t) * bytes,
                        static_cast<const char*>(c.h_input.data) + size_t(t) * bytes, bytes);
            continue;
        }
        if (c.rescale) {
            const float length = length_of(sums, width), wanted = length_of(h, width);
            for (int64_t i = 0; i < width; ++i) sums[i] = length == 0 ? 0 : sums[i] / length * wanted;
        }
        const float of_h = c.alpha_of_input ? alpha : 1 - alpha, of_knowledge = c.alpha_of_input ? 1 - alpha : alpha;
        for (int64_t i = 0; i < width; ++i) sums[i] = of_h * h[i] + of_knowledge * sums[i];
        round_into(c.out, c.h_input.dtype, t * width, sums, width);
    }
}

#undef UNIKE_TYPED
