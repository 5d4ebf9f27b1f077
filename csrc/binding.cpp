// The extension: addresses, sizes and strides in, status out. No torch headers, so one build serves every torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "tokens.h"

namespace py = pybind11;
using idlevit::Branch;
using idlevit::DType;
using idlevit::int64_t;
using idlevit::Norm;
using idlevit::Shape;
using idlevit::Status;
using idlevit::Tokens;
using Address = std::uintptr_t;

namespace {

// What a call is about: the type and the sizes of its tensors.
struct Problem {
    DType dtype;
    Shape shape;
};

// A parameter of a kernel, made of what Python passes for it: an address for a pointer, the numbers one after the other
// for a structure. Python objects that hold them would cost more than a small kernel.
template <typename T>
struct Flat {
    static T make(T value) { return value; }
};
template <typename T>
struct Flat<T*> {
    static T* make(Address address) { return reinterpret_cast<T*>(address); }
};
template <>
struct Flat<Problem> {
    static Problem make(int dtype, int64_t B, int64_t T, int64_t n, int64_t C) {
        return {static_cast<DType>(dtype), {B, T, n, C}};
    }
};
template <>
struct Flat<Tokens> {
    static Tokens make(Address x, int64_t batch_stride, int64_t token_stride) {
        return {reinterpret_cast<const void*>(x), batch_stride, token_stride};
    }
};
template <>
struct Flat<Norm> {
    static Norm make(Address weight, Address bias, double eps) {
        return {reinterpret_cast<const void*>(weight), reinterpret_cast<const void*>(bias), eps};
    }
};
template <>
struct Flat<Branch> {
    static Branch make(Address branch, Address gamma, double scale) {
        return {reinterpret_cast<const void*>(branch), reinterpret_cast<const void*>(gamma), scale};
    }
};

template <typename R, typename... Values>
std::tuple<Values...> values_of(R (*)(Values...));
template <typename T>
using values_t = decltype(values_of(&Flat<T>::make));

template <typename T, std::size_t first, typename All, std::size_t... i>
T make(const All& all, std::index_sequence<i...>) {
    return Flat<T>::make(std::get<first + i>(all)...);
}

// How many values the parameters before the j-th one take.
template <typename... Parameters>
constexpr std::size_t values_before(std::size_t j) {
    const std::size_t counts[] = {std::tuple_size_v<values_t<Parameters>>...};
    std::size_t sum = 0;
    for (std::size_t i = 0; i < j; ++i) sum += counts[i];
    return sum;
}

template <auto function, typename R, typename... Parameters, typename All, std::size_t... j>
R call(R (*)(Parameters...), const All& all, std::index_sequence<j...>) {
    return function(make<Parameters, values_before<Parameters...>(j)>(
        all, std::make_index_sequence<std::tuple_size_v<values_t<Parameters>>>{})...);
}

template <auto function, typename R, typename... Parameters, typename... Values>
auto flat(R (*)(Parameters...), std::tuple<Values...>) {
    return +[](Values... values) -> R {
        return call<function>(function, std::make_tuple(values...), std::index_sequence_for<Parameters...>{});
    };
}

template <typename R, typename... Parameters>
auto all_values_of(R (*)(Parameters...)) -> decltype(std::tuple_cat(std::declval<values_t<Parameters>>()...));

// `function` with the parameters of each structure spelled out.
template <auto function>
auto flat() {
    return flat<function>(function, decltype(all_values_of(function)){});
}

// Refuses a tensor without memory where one must be. One whose memory was freed (a storage resized to 0, as FSDP does)
// has an address near 0; it must not be read, nor taken for a tensor that is left out.
void require(const void* data, int64_t elements, const char* name) {
    constexpr Address kNeverMapped = 4096;
    if (reinterpret_cast<Address>(data) < kNeverMapped && elements > 0)
        throw py::value_error(std::string(name) + " must be a tensor with memory, got one whose storage was freed");
}

int64_t all_elements(const Shape& s) { return s.B * s.T * s.C; }
int64_t kept_elements(const Shape& s) { return s.B * s.n * s.C; }

template <typename... Parameters, typename... Arguments>
int run(Status (*kernel)(DType, Shape, Parameters...), const Problem& p, Arguments... arguments) {
    py::gil_scoped_release release;
    return static_cast<int>(kernel(p.dtype, p.shape, arguments...));
}

int cpu_cls_direction(Problem p, Tokens x, Norm norm, const void* qkv_weight, const void* qkv_bias, int64_t width,
                      void* query, void* direction, int threads) {
    require(x.data, all_elements(p.shape), "x");
    require(qkv_weight, width * p.shape.C, "qkv_weight");
    return run(idlevit::cpu::kernels().cls_direction, p, x, norm, qkv_weight, qkv_bias, width, query, direction,
               threads);
}

int cpu_token_scores(Problem p, Tokens x, const void* direction, Norm norm, void* scores, int threads) {
    require(x.data, all_elements(p.shape), "x");
    require(direction, p.shape.B * p.shape.C, "direction");
    return run(idlevit::cpu::kernels().token_scores, p, x, direction, norm, scores, threads);
}

int cpu_select_tokens(Problem p, int64_t prefix, const void* scores, int64_t* indices, int threads) {
    require(scores, p.shape.B * p.shape.T, "scores");
    return run(idlevit::cpu::kernels().select_tokens, p, prefix, scores, indices, threads);
}

int cpu_select_gather_norm(Problem p, int64_t prefix, Tokens x, const void* scores, Norm norm, int64_t* indices,
                           void* normed, int threads) {
    require(x.data, all_elements(p.shape), "x");
    require(scores, p.shape.B * p.shape.T, "scores");
    return run(idlevit::cpu::kernels().select_gather_norm, p, prefix, x, scores, norm, indices, normed, threads);
}

int cpu_cls_select_gather_norm(Problem p, int64_t prefix, Tokens x, Norm norm, const void* qkv_weight,
                               const void* qkv_bias, int64_t width, void* workspace, int64_t* indices, void* normed,
                               int threads) {
    require(x.data, all_elements(p.shape), "x");
    require(qkv_weight, width * p.shape.C, "qkv_weight");
    return run(idlevit::cpu::kernels().cls_select_gather_norm, p, prefix, x, norm, qkv_weight, qkv_bias, width,
               workspace, indices, normed, threads);
}

int cpu_gather_tokens(Problem p, Tokens x, const int64_t* indices, void* out, int threads) {
    require(x.data, all_elements(p.shape), "x");
    require(indices, p.shape.B * p.shape.n, "indices");
    return run(idlevit::cpu::kernels().gather_tokens, p, x, indices, out, threads);
}

int cpu_gather_add_norm(Problem p, Tokens x, const int64_t* indices, Branch branch, Norm norm, void* tokens,
                        void* normed, int threads) {
    require(x.data, all_elements(p.shape), "x");
    require(indices, p.shape.B * p.shape.n, "indices");
    require(branch.data, kept_elements(p.shape), "branch");
    return run(idlevit::cpu::kernels().gather_add_norm, p, x, indices, branch, norm, tokens, normed, threads);
}

int cpu_scatter_tokens(Problem p, Tokens x, const int64_t* indices, const void* tokens, Branch branch, void* out,
                       int64_t out_batch, int64_t out_token, int threads) {
    require(indices, p.shape.B * p.shape.n, "indices");
    require(tokens, kept_elements(p.shape), "tokens");
    require(out, all_elements(p.shape), "x");
    return run(idlevit::cpu::kernels().scatter_tokens, p, x, indices, tokens, branch, out, out_batch, out_token,
               threads);
}

int cpu_project_tokens(Problem p, int64_t prefix, Tokens x, Norm norm, const void* projection, int64_t d,
                       void* features, int threads) {
    require(x.data, all_elements(p.shape), "x");
    require(projection, p.shape.C * d, "projection");
    return run(idlevit::cpu::kernels().project_tokens, p, prefix, x, norm, projection, d, features, threads);
}

int cpu_select_spread(Problem p, int64_t prefix, const void* features, int64_t d, const bool* padding, void* memory,
                      int64_t* indices, int64_t* groups, void* sizes, int threads) {
    require(features, p.shape.B * (p.shape.T - prefix) * d, "features");
    return run(idlevit::cpu::kernels().select_spread, p, prefix, features, d, padding, memory, indices, groups, sizes,
               threads);
}

int cpu_assign_tokens(Problem p, int64_t prefix, const void* features, int64_t d, const int64_t* indices,
                      const bool* padding, void* memory, int64_t* groups, void* sizes, int threads) {
    require(features, p.shape.B * (p.shape.T - prefix) * d, "features");
    require(indices, p.shape.B * p.shape.n, "indices");
    return run(idlevit::cpu::kernels().assign_tokens, p, prefix, features, d, indices, padding, memory, groups, sizes,
               threads);
}

int64_t cpu_spread_memory(int dtype, int64_t N, int64_t d) {
    return idlevit::cpu::kernels().spread_memory(static_cast<DType>(dtype), N, d);
}

int cpu_gather_mean_norm(Problem p, Tokens x, const int64_t* groups, const void* sizes, Norm norm,
                         std::int32_t* workspace, void* tokens, void* normed, int threads) {
    require(x.data, all_elements(p.shape), "x");
    require(groups, p.shape.B * p.shape.T, "groups");
    require(sizes, p.shape.B * p.shape.n, "sizes");
    return run(idlevit::cpu::kernels().gather_mean_norm, p, x, groups, sizes, norm, workspace, tokens, normed, threads);
}

int cpu_follow_tokens(Problem p, Tokens x, const int64_t* groups, Branch first, Branch second, void* out,
                      int64_t out_batch, int64_t out_token, int threads) {
    require(x.data, all_elements(p.shape), "x");
    require(groups, p.shape.B * p.shape.T, "groups");
    require(first.data, kept_elements(p.shape), "branch1");
    require(second.data, kept_elements(p.shape), "branch2");
    return run(idlevit::cpu::kernels().follow_tokens, p, x, groups, first, second, out, out_batch, out_token, threads);
}

int cpu_sum_groups(Problem p, Tokens x, const int64_t* groups, std::int32_t* workspace, void* out, int threads) {
    require(x.data, all_elements(p.shape), "x");
    require(groups, p.shape.B * p.shape.T, "groups");
    return run(idlevit::cpu::kernels().sum_groups, p, x, groups, workspace, out, threads);
}

int cpu_expand_groups(Problem p, const void* tokens, const int64_t* groups, void* out, int threads) {
    require(tokens, kept_elements(p.shape), "tokens");
    require(groups, p.shape.B * p.shape.T, "groups");
    return run(idlevit::cpu::kernels().expand_groups, p, tokens, groups, out, threads);
}

#if defined(IDLEVIT_WITH_CUDA)

// Each returns None, or the message of the error.
using idlevit::cuda::Launch;

// A problem whose parameters (norms, gamma, direction) have a type of their own.
struct MixedProblem {
    DType dtype, parameters;
    Shape shape;
};
template <>
struct Flat<MixedProblem> {
    static MixedProblem make(int dtype, int parameters, int64_t B, int64_t T, int64_t n, int64_t C) {
        return {static_cast<DType>(dtype), static_cast<DType>(parameters), {B, T, n, C}};
    }
};
template <>
struct Flat<Launch> {
    static Launch make(int device, Address stream) { return {device, stream}; }
};

template <typename... Parameters, typename... Arguments>
const char* launch(const char* (*kernel)(DType, Shape, Parameters...), const Problem& p, Arguments... arguments) {
    py::gil_scoped_release release;
    return kernel(p.dtype, p.shape, arguments...);
}
template <typename... Parameters, typename... Arguments>
const char* launch(const char* (*kernel)(DType, DType, Shape, Parameters...), const MixedProblem& p,
                   Arguments... arguments) {
    py::gil_scoped_release release;
    return kernel(p.dtype, p.parameters, p.shape, arguments...);
}

const char* cuda_token_scores(MixedProblem p, Tokens x, const void* direction, Norm norm, void* scores, Launch to) {
    require(x.data, all_elements(p.shape), "x");
    require(direction, p.shape.B * p.shape.C, "direction");
    return launch(idlevit::cuda::token_scores, p, x, direction, norm, scores, to);
}

const char* cuda_select_tokens(Problem p, int64_t prefix, const void* scores, int64_t* indices, Launch to) {
    require(scores, p.shape.B * p.shape.T, "scores");
    return launch(idlevit::cuda::select_tokens, p, prefix, scores, indices, to);
}

const char* cuda_select_gather_norm(MixedProblem p, int64_t prefix, Tokens x, const void* scores, Norm norm,
                                    int64_t* indices, void* normed, Launch to) {
    require(x.data, all_elements(p.shape), "x");
    require(scores, p.shape.B * p.shape.T, "scores");
    return launch(idlevit::cuda::select_gather_norm, p, prefix, x, scores, norm, indices, normed, to);
}

const char* cuda_gather_tokens(Problem p, Tokens x, const int64_t* indices, void* out, Launch to) {
    require(x.data, all_elements(p.shape), "x");
    require(indices, p.shape.B * p.shape.n, "indices");
    return launch(idlevit::cuda::gather_tokens, p, x, indices, out, to);
}

const char* cuda_gather_add_norm(MixedProblem p, Tokens x, const int64_t* indices, Branch branch, Norm norm,
                                 void* tokens, void* normed, Launch to) {
    require(x.data, all_elements(p.shape), "x");
    require(indices, p.shape.B * p.shape.n, "indices");
    require(branch.data, kept_elements(p.shape), "branch");
    return launch(idlevit::cuda::gather_add_norm, p, x, indices, branch, norm, tokens, normed, to);
}

const char* cuda_scatter_tokens(MixedProblem p, Tokens x, const int64_t* indices, const void* tokens, Branch branch,
                                void* out, int64_t out_batch, int64_t out_token, Launch to) {
    require(indices, p.shape.B * p.shape.n, "indices");
    require(tokens, kept_elements(p.shape), "tokens");
    require(out, all_elements(p.shape), "x");
    return launch(idlevit::cuda::scatter_tokens, p, x, indices, tokens, branch, out, out_batch, out_token, to);
}

#endif  // IDLEVIT_WITH_CUDA

std::vector<std::string> cpu_instruction_sets() {
    std::vector<std::string> names;
    for (int i = 0; const auto* table = idlevit::cpu::available(i); ++i) names.emplace_back(table->name);
    return names;
}

// Whether a block is as it was when its parts were looked up: `unchanged` of idlevit_kernels/block/parts.py, which says
// what the record holds. It runs in every layer, over some hundred entries.
bool unchanged(const py::tuple& record) {
    const auto list = [&](int i) { return py::reinterpret_borrow<py::list>(PyTuple_GET_ITEM(record.ptr(), i)); };
    const auto size = [](const py::list& items) { return PyList_GET_SIZE(items.ptr()); };
    const auto item = [](const py::list& items, Py_ssize_t i) { return PyList_GET_ITEM(items.ptr(), i); };

    const py::list places = list(0), names = list(1), values = list(2);
    for (Py_ssize_t i = 0; i < size(places); ++i) {
        PyObject* value = PyDict_GetItemWithError(item(places, i), item(names, i));
        if (!value && PyErr_Occurred()) throw py::error_already_set();
        if ((value ? value : Py_None) != item(values, i)) return false;
    }
    const py::list empty = list(3), filled = list(4);
    for (Py_ssize_t i = 0; i < size(empty); ++i)
        if (PyObject_IsTrue(item(empty, i)) != 0) return false;
    for (Py_ssize_t i = 0; i < size(filled); ++i)
        if (PyObject_IsTrue(item(filled, i)) != 1) return false;
    const py::list modules = list(5), types = list(6);
    for (Py_ssize_t i = 0; i < size(modules); ++i)
        if (reinterpret_cast<PyObject*>(Py_TYPE(item(modules, i))) != item(types, i)) return false;
    const py::list kinds = list(7), attributes = list(8), functions = list(9);
    for (Py_ssize_t i = 0; i < size(kinds); ++i)
        if (py::getattr(item(kinds, i), item(attributes, i)).ptr() != item(functions, i)) return false;
    return true;
}

void cpu_set_instruction_set(const std::string& name) {
    if (!idlevit::cpu::set_instruction_set(name.c_str()))
        throw py::value_error("instruction set: expected one that cpu_instruction_sets() lists, got '" + name + "'");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.def("unchanged", &unchanged);
    m.attr("MAX_CHANNELS") = idlevit::kMaxChannels;
    m.def("cpu_cls_direction", flat<&cpu_cls_direction>());
    m.def("cpu_token_scores", flat<&cpu_token_scores>());
    m.def("cpu_select_tokens", flat<&cpu_select_tokens>());
    m.def("cpu_select_gather_norm", flat<&cpu_select_gather_norm>());
    m.def("cpu_cls_select_gather_norm", flat<&cpu_cls_select_gather_norm>());
    m.def("cpu_gather_tokens", flat<&cpu_gather_tokens>());
    m.def("cpu_gather_add_norm", flat<&cpu_gather_add_norm>());
    m.def("cpu_scatter_tokens", flat<&cpu_scatter_tokens>());
    m.def("cpu_project_tokens", flat<&cpu_project_tokens>());
    m.def("cpu_select_spread", flat<&cpu_select_spread>());
    m.def("cpu_assign_tokens", flat<&cpu_assign_tokens>());
    m.def("cpu_gather_mean_norm", flat<&cpu_gather_mean_norm>());
    m.def("cpu_follow_tokens", flat<&cpu_follow_tokens>());
    m.def("cpu_sum_groups", flat<&cpu_sum_groups>());
    m.def("cpu_expand_groups", flat<&cpu_expand_groups>());
    m.def("cpu_spread_memory", &cpu_spread_memory);
    m.def("cpu_instruction_sets", &cpu_instruction_sets);
    m.def("cpu_instruction_set", [] { return std::string(idlevit::cpu::kernels().name); });
#if defined(__x86_64__)
    m.attr("cpu_is_intel") = __builtin_cpu_is("intel") != 0;
#else
    m.attr("cpu_is_intel") = false;
#endif
    m.def("cpu_set_instruction_set", &cpu_set_instruction_set);
#if defined(IDLEVIT_WITH_CUDA)
    m.attr("cuda_built") = true;
    m.attr("CUDA_MAX_CHANNELS") = idlevit::cuda::kMaxChannels;
    m.def("cuda_token_scores", flat<&cuda_token_scores>());
    m.def("cuda_select_tokens", flat<&cuda_select_tokens>());
    m.def("cuda_select_gather_norm", flat<&cuda_select_gather_norm>());
    m.def("cuda_gather_tokens", flat<&cuda_gather_tokens>());
    m.def("cuda_gather_add_norm", flat<&cuda_gather_add_norm>());
    m.def("cuda_scatter_tokens", flat<&cuda_scatter_tokens>());
    m.def("cuda_unusable", &idlevit::cuda::unusable);
#else
    m.attr("cuda_built") = false;
#endif
}
