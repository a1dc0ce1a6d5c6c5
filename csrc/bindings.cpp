// The module unike_kernels._cuda: addresses, sizes and a stream in. No torch headers and a CUDA runtime of its own, linked
// statically: one build serves any torch. Importing it touches no driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cosine_topk.cuh"
#include "int8_search.cuh"
#include "knowledge_shift.cuh"
#include "probe.cuh"
#include "zeros.cuh"

namespace py = pybind11;

namespace {

using Place = std::tuple<uintptr_t, int64_t, int64_t, std::string>;  // address, strides of rows and heads, dtype

unike::Dtype dtype_of(const std::string& name) {
    if (name == "float32") return unike::Dtype::float32;
    if (name == "bfloat16") return unike::Dtype::bfloat16;
    if (name == "float16") return unike::Dtype::float16;
    throw std::invalid_argument("a kernel takes float32, bfloat16 or float16, but got " + name);
}

unike::Heads heads_of(const Place& place) {
    const auto& [address, row, head, dtype] = place;
    return {reinterpret_cast<const void*>(address), row, head, dtype_of(dtype)};
}

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void require(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

int device_count() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaErrorNoDevice) return 0;
    require(error, "no CUDA driver answers");
    return count;
}

// Refuses a value, naming it and its limits.
void within(const char* name, int64_t value, int64_t least, int64_t most) {
    if (value >= least && value <= most) return;
    throw std::invalid_argument(std::string(name) + " must be " + std::to_string(least) + " to " + std::to_string(most) +
                                ", but is " + std::to_string(value));
}

unike::Search search_of(const std::string& q_dtype, const std::string& key_dtype, int64_t t, int64_t n, int64_t d, int64_t k) {
    within("t", t, 0, unike::kMostQueries);
    within("n", n, 0, unike::kMostKeys);
    within("d", d, 1, unike::kMostColumns);
    within("k", k, 0, unike::kMostItems);
    unike::Search search = {};
    search.q_dtype = dtype_of(q_dtype), search.key_dtype = dtype_of(key_dtype);
    if (search.q_dtype != search.key_dtype && search.q_dtype != unike::Dtype::float32)
        throw std::invalid_argument("q is " + q_dtype + ", keys are " + key_dtype + ": q must be the same or float32");
    search.n = n, search.t = static_cast<int>(t), search.d = static_cast<int>(d), search.k = static_cast<int>(k);
    return search;
}

int64_t cosine_topk_workspace(const std::string& q_dtype, const std::string& key_dtype, int64_t t, int64_t n, int64_t d, int64_t k) {
    int64_t bytes = 0;
    const unike::Search search = search_of(q_dtype, key_dtype, t, n, d, k);
    require(unike::cosine_topk_workspace(search, bytes), "planning cosine_topk");
    return bytes;
}

void cosine_topk(uintptr_t q, int64_t q_stride, uintptr_t keys, int64_t key_stride, uintptr_t key_norm, uintptr_t ranges,
                 const std::string& q_dtype, const std::string& key_dtype, int64_t t, int64_t n, int64_t d, int64_t k,
                 uintptr_t workspace, int64_t bytes, uintptr_t zeros, bool alone, bool bulk, uintptr_t scores,
                 uintptr_t indices, uintptr_t stream) {
    unike::Search search = search_of(q_dtype, key_dtype, t, n, d, k);
    if (t == 0 || k == 0) return;
    within("q_stride", q_stride, 0, INT64_MAX);
    within("key_stride", key_stride, 0, INT64_MAX);
    within("bytes of workspace", bytes, cosine_topk_workspace(q_dtype, key_dtype, t, n, d, k), INT64_MAX);
    if (q == 0 || (keys == 0 && n > 0) || (workspace == 0 && bytes > 0) || zeros == 0 || scores == 0 || indices == 0)
        throw std::invalid_argument("q, keys, workspace, zeros, scores and indices must be addresses of device memory, but one is null");
    search.q = at<void>(q), search.keys = at<void>(keys);
    search.q_stride = q_stride, search.key_stride = key_stride;
    search.key_norm = at<float>(key_norm), search.ranges = at<int64_t>(ranges);
    require(unike::cosine_topk(search, at<void>(workspace), at<void>(zeros), alone, bulk, at<float>(scores),
                               at<int64_t>(indices), at<CUstream_st>(stream)),
            "launching cosine_topk");
}

uintptr_t zeros(int64_t bytes) {
    within("bytes", bytes, 1, INT64_MAX);
    void* at = nullptr;
    require(unike::allocate_zeros(bytes, at), "allocating memory for the blocks of a kernel to meet in");
    return reinterpret_cast<uintptr_t>(at);
}

unsigned long long stream_number(uintptr_t stream) {
    unsigned long long number = 0;
    require(unike::stream_number(at<CUstream_st>(stream), number), "asking for the number of a stream");
    return number;
}

// codes, scale, residual, centre, signs, padded, window, keys, key_norm, their dtype, n, key_stride, d, habit: as csrc/int8_search.cuh.
using Index = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, uintptr_t, uintptr_t, std::string,
                         int64_t, int64_t, int64_t, uintptr_t>;

unike::Int8Keys int8_keys(const Index& index, int64_t t, int64_t k) {
    const auto& [codes, scale, residual, centre, signs, padded, window, keys, norm, dtype, n, stride, d, habit] = index;
    within("t", t, 0, unike::kMostInt8Queries);
    within("k", k, 0, unike::kMostItems);
    within("n", n, 0, unike::kMostKeys);
    within("d", d, 1, unike::kMostColumns);
    within("padded", padded, (d + 63) / 64 * 64, (d + 63) / 64 * 64);
    within("window", window, padded / 2 + 1, padded);
    within("key_stride", stride, 0, INT64_MAX);
    if (n > 0 && (codes == 0 || scale == 0 || residual == 0 || keys == 0 || norm == 0))
        throw std::invalid_argument("codes, scale, residual, keys and key_norm must be addresses, but one is null");
    if (centre == 0 || signs == 0 || habit == 0)
        throw std::invalid_argument("centre, signs and habit must be addresses, but one is null");
    return {at<int8_t>(codes), at<float>(scale), at<float>(residual), at<float>(centre), at<float>(signs),
            static_cast<int>(padded), static_cast<int>(window), at<void>(keys), at<float>(norm), dtype_of(dtype), n, stride,
            static_cast<int>(d), at<unike::Int8Habit>(habit)};
}

int64_t int8_search_workspace(const Index& index, int64_t t, int64_t k) {
    int64_t bytes = 0;
    require(unike::int8_search_workspace(int8_keys(index, t, k), static_cast<int>(t), static_cast<int>(k), bytes),
            "planning int8_search");
    return bytes;
}

void int8_search(const Index& index, uintptr_t q, uintptr_t ranges, int64_t t, int64_t k, uintptr_t workspace, int64_t bytes,
                 uintptr_t scores, uintptr_t indices, uintptr_t reranked, uintptr_t stream) {
    const unike::Int8Keys keys = int8_keys(index, t, k);
    if (t == 0 || k == 0) return;
    within("bytes of workspace", bytes, int8_search_workspace(index, t, k), INT64_MAX);
    if (q == 0 || workspace == 0 || scores == 0 || indices == 0 || reranked == 0)
        throw std::invalid_argument("q, workspace, scores, indices and reranked must be addresses, but one is null");
    require(unike::int8_search(keys, at<float>(q), at<int64_t>(ranges), static_cast<int>(t), static_cast<int>(k), at<void>(workspace),
                               at<float>(scores), at<int64_t>(indices), at<int>(reranked), at<CUstream_st>(stream)),
            "launching int8_search");
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of unike_kernels";
    m.attr("architectures") = UNIKE_ARCHS;  // what the build has code for, such as "80 89 90a 100 ptx100"
    m.def("device_count", &device_count, "CUDA devices here; RuntimeError where no usable driver is installed");
    m.def(
        "probe",
        [](uintptr_t out, uintptr_t stream) {
            if (out == 0) throw std::invalid_argument("probe writes an int32 to device memory, but got a null pointer");
            require(unike::probe(reinterpret_cast<int*>(out), reinterpret_cast<cudaStream_t>(stream)), "launching probe");
        },
        py::arg("out"), py::arg("stream"),
        "Writes the architecture of the code that runs on the current device (90 for sm_90a) to an int32 at `out`.");
    m.def(
        "knowledge_shift",
        [](const Place& q, const Place& keys, const Place& values, const Place& h_input, uintptr_t indices,
           uintptr_t token_to_case, uintptr_t case_tokens, uintptr_t alpha, const std::string& alpha_dtype, bool alpha_per_case,
           uintptr_t out, uintptr_t used, int tokens, int cases, int items, int key_heads, int group, int key_columns,
           int value_columns, float scaling, float softcap, bool input, bool clamp, bool rescale, int split, int rows,
           uintptr_t stream) {
            const unike::KnowledgeShift shift{
                heads_of(q), heads_of(keys), heads_of(values), heads_of(h_input), at<const int64_t>(indices),
                at<const int64_t>(token_to_case), at<const int64_t>(case_tokens), at<const void>(alpha), dtype_of(alpha_dtype),
                alpha_per_case, at<void>(out), at<float>(used), tokens, cases, items, key_heads, group, key_columns,
                value_columns, scaling, softcap, input, clamp, rescale};
            require(unike::knowledge_shift(shift, split, rows, at<CUstream_st>(stream)), "launching knowledge_shift");
        },
        "The arguments of csrc/knowledge_shift.cuh in their order; a missing tensor is address 0.");
    m.def("zeros", &zeros, py::arg("bytes"), "The address of zeros on the current device, which are never given back.");
    m.def("stream_number", &stream_number, py::arg("stream"), "A number that no other stream has.");
    m.def("int8_search_workspace", &int8_search_workspace, py::arg("index"), py::arg("t"), py::arg("k"));
    m.def("int8_search", &int8_search, py::arg("index"), py::arg("q"), py::arg("ranges"), py::arg("t"), py::arg("k"),
          py::arg("workspace"), py::arg("bytes"), py::arg("scores"), py::arg("indices"), py::arg("reranked"), py::arg("stream"),
          "As cosine_topk, through an int8 copy of the keys. See csrc/int8_search.cuh.");
    m.def("cosine_topk_workspace", &cosine_topk_workspace, py::arg("q_dtype"), py::arg("key_dtype"), py::arg("t"), py::arg("n"),
          py::arg("d"), py::arg("k"), "Bytes that cosine_topk needs on the current device.");
    m.def("cosine_topk_zeros", &unike::cosine_topk_zeros, py::arg("t"), py::arg("k"),
          "Bytes that are zeros before and after each cosine_topk.");
    m.def("cosine_topk", &cosine_topk, py::arg("q"), py::arg("q_stride"), py::arg("keys"), py::arg("key_stride"),
          py::arg("key_norm"), py::arg("ranges"), py::arg("q_dtype"), py::arg("key_dtype"), py::arg("t"), py::arg("n"),
          py::arg("d"), py::arg("k"), py::arg("workspace"), py::arg("bytes"), py::arg("zeros"), py::arg("alone"),
          py::arg("bulk"), py::arg("scores"), py::arg("indices"), py::arg("stream"),
          "The k keys of largest cosine to each query: scores float32 and indices int64 [t, k]. See csrc/cosine_topk.cuh.");
}
