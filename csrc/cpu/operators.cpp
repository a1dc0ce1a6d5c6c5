#include "operators.h"

#include <cmath>
#include <cstring>
#include <memory>

#include "halves.h"
#include "vectors.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between functions of this file alone
#endif

namespace unike {

namespace portable {
#define UNIKE_F16C 0
#include "operators.inl"
#undef UNIKE_F16C
}  // namespace portable

int64_t work_of(const NeuronCall& c) {
    const int64_t tokens = c.route.data || c.selected ? 1 : c.tokens;
    return tokens * (c.d + c.d_out) + c.d_out;
}

int64_t work_of(const ShiftCall& c) { return c.heads * (c.slots + 2 * c.hv + c.hd); }

namespace {

const char* const kBadPointers = "group_ptr falls, or points behind the last neuron";

bool bad_span(const NeuronCall& c, int64_t group) {
    return c.group_ptr[group] < 0 || c.group_ptr[group + 1] < c.group_ptr[group] || c.group_ptr[group + 1] > c.n;
}

const char* out_of_range(const NeuronCall& c) {
    const bool routed = c.route.data || c.selected;
    for (int64_t t = 0; routed && c.token_to_case && t < c.tokens; ++t)
        if (c.token_to_case[t] >= c.rows) return "token_to_case names a case that has no row in route or selected";
    if (!c.selected) {
        for (int64_t group = 0; c.group_ptr && group < c.groups; ++group)
            if (bad_span(c, group)) return kBadPointers;
        return nullptr;
    }
    for (int64_t i = 0; i < c.rows * c.slots; ++i) {  // only the groups in question: there may be 10,000
        if (c.selected[i] >= c.groups) return "selected names a group that group_ptr does not have";
        if (c.selected[i] >= 0 && c.group_ptr && bad_span(c, c.selected[i])) return kBadPointers;
    }
    return nullptr;
}

const char* out_of_range(const ShiftCall& c) {
    for (int64_t t = 0; c.token_to_case && t < c.tokens; ++t)
        if (c.token_to_case[t] >= c.cases) return "token_to_case names a case that indices has no row for";
    for (int64_t i = 0; c.items > 0 && i < c.cases * c.slots; ++i)
        if (c.indices[i] >= c.items) return "indices name an item that the memory does not have";
    return nullptr;
}

template <typename Call>
const char* checked(const Call& call, bool portably) {
    if (const char* wrong = out_of_range(call)) return wrong;
    const std::unique_ptr<float[]> work(new float[size_t(work_of(call))]);
    static const bool fast = has_avx2();
    if (fast && !portably)
        avx2::run(call, work.get());
    else
        portable::run(call, work.get());
    return nullptr;
}

}  // namespace

const char* extra_neurons(const NeuronCall& call, bool portably) { return checked(call, portably); }
const char* knowledge_shift(const ShiftCall& call, bool portably) { return checked(call, portably); }

}  // namespace unike
