// The extension: addresses, sizes and strides in, status out. No torch headers, so one build serves every torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "tokens.h"

namespace py = pybind11;
using idlevit::Branch;
using idlevit::DType;
using idlevit::int64_t;
using idlevit::Norm;
using idlevit::Shape;
using idlevit::Tokens;
using Address = std::uintptr_t;

namespace {

void* at(Address address) { return reinterpret_cast<void*>(address); }

// The address of a tensor that is there. One whose memory was freed (a storage resized to 0, as FSDP does) has an address
// near 0; it must not be read, nor taken for a tensor that is left out.
void* required(Address address, int64_t elements, const char* name) {
    constexpr Address kNeverMapped = 4096;
    if (address < kNeverMapped && elements > 0)
        throw py::value_error(std::string(name) + " must be a tensor with memory, got one whose storage was freed");
    return at(address);
}

const int64_t* indices_at(Address address, int64_t elements) {
    return static_cast<const int64_t*>(required(address, elements, "indices"));
}
int64_t* indices_out(Address address) { return static_cast<int64_t*>(at(address)); }

// A strided [B, T, C] tensor: address, batch stride, token stride.
#define TOKENS Address x, int64_t x_batch, int64_t x_token
#define SHAPE int dtype, int64_t B, int64_t T, int64_t n, int64_t C
#define NORM Address weight, Address bias, double eps
#define BRANCH Address branch, Address gamma, double scale

Shape shape(int64_t B, int64_t T, int64_t n, int64_t C) { return {B, T, n, C}; }

template <typename... Args>
int run(idlevit::Status (*kernel)(Args...), Args... args) {
    py::gil_scoped_release release;
    return static_cast<int>(kernel(args...));
}

int cpu_cls_direction(SHAPE, TOKENS, NORM, Address qkv_weight, Address qkv_bias, int64_t width, Address query,
                      Address direction, int threads) {
    return run<DType, Shape, Tokens, Norm, const void*, const void*, int64_t, void*, void*, int>(
        idlevit::cpu::kernels().cls_direction, static_cast<DType>(dtype), shape(B, T, n, C),
        Tokens{required(x, B * T * C, "x"), x_batch, x_token}, Norm{at(weight), at(bias), eps}, required(qkv_weight, width * C, "qkv_weight"), at(qkv_bias), width,
        at(query), at(direction), threads);
}

int cpu_token_scores(SHAPE, TOKENS, Address direction, NORM, Address scores, int threads) {
    return run<DType, Shape, Tokens, const void*, Norm, void*, int>(
        idlevit::cpu::kernels().token_scores, static_cast<DType>(dtype), shape(B, T, n, C),
        Tokens{required(x, B * T * C, "x"), x_batch, x_token}, required(direction, B * C, "direction"), Norm{at(weight), at(bias), eps}, at(scores), threads);
}

int cpu_select_tokens(SHAPE, int64_t prefix, Address scores, Address indices, int threads) {
    return run<DType, Shape, int64_t, const void*, int64_t*, int>(
        idlevit::cpu::kernels().select_tokens, static_cast<DType>(dtype), shape(B, T, n, C), prefix, required(scores, B * T, "scores"),
        indices_out(indices), threads);
}

int cpu_select_gather_norm(SHAPE, int64_t prefix, TOKENS, Address scores, NORM, Address indices, Address normed,
                           int threads) {
    return run<DType, Shape, int64_t, Tokens, const void*, Norm, int64_t*, void*, int>(
        idlevit::cpu::kernels().select_gather_norm, static_cast<DType>(dtype), shape(B, T, n, C), prefix,
        Tokens{required(x, B * T * C, "x"), x_batch, x_token}, required(scores, B * T, "scores"), Norm{at(weight), at(bias), eps}, indices_out(indices), at(normed),
        threads);
}

int cpu_cls_select_gather_norm(SHAPE, int64_t prefix, TOKENS, NORM, Address qkv_weight, Address qkv_bias, int64_t width,
                               Address workspace, Address indices, Address normed, int threads) {
    return run<DType, Shape, int64_t, Tokens, Norm, const void*, const void*, int64_t, void*, int64_t*, void*, int>(
        idlevit::cpu::kernels().cls_select_gather_norm, static_cast<DType>(dtype), shape(B, T, n, C), prefix,
        Tokens{required(x, B * T * C, "x"), x_batch, x_token}, Norm{at(weight), at(bias), eps}, required(qkv_weight, width * C, "qkv_weight"), at(qkv_bias), width,
        at(workspace), indices_out(indices), at(normed), threads);
}

int cpu_gather_tokens(SHAPE, TOKENS, Address indices, Address out, int threads) {
    return run<DType, Shape, Tokens, const int64_t*, void*, int>(
        idlevit::cpu::kernels().gather_tokens, static_cast<DType>(dtype), shape(B, T, n, C),
        Tokens{required(x, B * T * C, "x"), x_batch, x_token}, indices_at(indices, B * n), at(out), threads);
}

int cpu_gather_add_norm(SHAPE, TOKENS, Address indices, BRANCH, NORM, Address tokens, Address normed, int threads) {
    return run<DType, Shape, Tokens, const int64_t*, Branch, Norm, void*, void*, int>(
        idlevit::cpu::kernels().gather_add_norm, static_cast<DType>(dtype), shape(B, T, n, C),
        Tokens{required(x, B * T * C, "x"), x_batch, x_token}, indices_at(indices, B * n), Branch{required(branch, B * n * C, "branch"), at(gamma), scale},
        Norm{at(weight), at(bias), eps}, at(tokens), at(normed), threads);
}

int cpu_scatter_tokens(SHAPE, TOKENS, Address indices, Address tokens, BRANCH, Address out, int64_t out_batch,
                       int64_t out_token, int threads) {
    return run<DType, Shape, Tokens, const int64_t*, const void*, Branch, void*, int64_t, int64_t, int>(
        idlevit::cpu::kernels().scatter_tokens, static_cast<DType>(dtype), shape(B, T, n, C),
        Tokens{at(x), x_batch, x_token}, indices_at(indices, B * n), required(tokens, B * n * C, "tokens"), Branch{at(branch), at(gamma), scale}, required(out, B * T * C, "x"),
        out_batch, out_token, threads);
}

const bool* padding_at(Address address) { return static_cast<const bool*>(at(address)); }
std::int32_t* workspace_at(Address address) { return static_cast<std::int32_t*>(at(address)); }

int cpu_project_tokens(SHAPE, int64_t prefix, TOKENS, NORM, Address projection, int64_t d, Address features,
                       int threads) {
    return run<DType, Shape, int64_t, Tokens, Norm, const void*, int64_t, void*, int>(
        idlevit::cpu::kernels().project_tokens, static_cast<DType>(dtype), shape(B, T, n, C), prefix,
        Tokens{required(x, B * T * C, "x"), x_batch, x_token}, Norm{at(weight), at(bias), eps},
        required(projection, C * d, "projection"), d, at(features), threads);
}

int cpu_select_spread(SHAPE, int64_t prefix, Address features, int64_t d, Address padding, Address memory,
                      Address indices, Address groups, Address sizes, int threads) {
    return run<DType, Shape, int64_t, const void*, int64_t, const bool*, void*, int64_t*, int64_t*, void*, int>(
        idlevit::cpu::kernels().select_spread, static_cast<DType>(dtype), shape(B, T, n, C), prefix,
        required(features, B * (T - prefix) * d, "features"), d, padding_at(padding), at(memory),
        indices_out(indices), indices_out(groups), at(sizes), threads);
}

int cpu_assign_tokens(SHAPE, int64_t prefix, Address features, int64_t d, Address indices, Address padding,
                      Address memory, Address groups, Address sizes, int threads) {
    return run<DType, Shape, int64_t, const void*, int64_t, const int64_t*, const bool*, void*, int64_t*, void*, int>(
        idlevit::cpu::kernels().assign_tokens, static_cast<DType>(dtype), shape(B, T, n, C), prefix,
        required(features, B * (T - prefix) * d, "features"), d, indices_at(indices, B * n), padding_at(padding),
        at(memory), indices_out(groups), at(sizes), threads);
}

int64_t cpu_spread_memory(int dtype, int64_t N, int64_t d) {
    return idlevit::cpu::kernels().spread_memory(static_cast<DType>(dtype), N, d);
}

int cpu_gather_mean_norm(SHAPE, TOKENS, Address groups, Address sizes, NORM, Address workspace, Address tokens,
                         Address normed, int threads) {
    return run<DType, Shape, Tokens, const int64_t*, const void*, Norm, std::int32_t*, void*, void*, int>(
        idlevit::cpu::kernels().gather_mean_norm, static_cast<DType>(dtype), shape(B, T, n, C),
        Tokens{required(x, B * T * C, "x"), x_batch, x_token}, indices_at(groups, B * T),
        required(sizes, B * n, "sizes"), Norm{at(weight), at(bias), eps}, workspace_at(workspace), at(tokens),
        at(normed), threads);
}

int cpu_follow_tokens(SHAPE, TOKENS, Address groups, Address branch1, Address gamma1, double scale1, Address branch2,
                      Address gamma2, double scale2, Address out, int64_t out_batch, int64_t out_token, int threads) {
    return run<DType, Shape, Tokens, const int64_t*, Branch, Branch, void*, int64_t, int64_t, int>(
        idlevit::cpu::kernels().follow_tokens, static_cast<DType>(dtype), shape(B, T, n, C),
        Tokens{required(x, B * T * C, "x"), x_batch, x_token}, indices_at(groups, B * T),
        Branch{required(branch1, B * n * C, "branch1"), at(gamma1), scale1},
        Branch{required(branch2, B * n * C, "branch2"), at(gamma2), scale2}, at(out), out_batch, out_token, threads);
}

int cpu_sum_groups(SHAPE, TOKENS, Address groups, Address workspace, Address out, int threads) {
    return run<DType, Shape, Tokens, const int64_t*, std::int32_t*, void*, int>(
        idlevit::cpu::kernels().sum_groups, static_cast<DType>(dtype), shape(B, T, n, C),
        Tokens{required(x, B * T * C, "x"), x_batch, x_token}, indices_at(groups, B * T), workspace_at(workspace),
        at(out), threads);
}

int cpu_expand_groups(SHAPE, Address tokens, Address groups, Address out, int threads) {
    return run<DType, Shape, const void*, const int64_t*, void*, int>(
        idlevit::cpu::kernels().expand_groups, static_cast<DType>(dtype), shape(B, T, n, C),
        required(tokens, B * n * C, "tokens"), indices_at(groups, B * T), at(out), threads);
}

#if defined(IDLEVIT_WITH_CUDA)

// Each returns None, or the message of the error.
#define TYPES int dtype, int parameters, int64_t B, int64_t T, int64_t n, int64_t C
#define LAUNCH int device, Address stream

using idlevit::cuda::Launch;

const char* cuda_token_scores(TYPES, TOKENS, Address direction, NORM, Address scores, LAUNCH) {
    py::gil_scoped_release release;
    return idlevit::cuda::token_scores(static_cast<DType>(dtype), static_cast<DType>(parameters), shape(B, T, n, C),
                                       Tokens{required(x, B * T * C, "x"), x_batch, x_token}, required(direction, B * C, "direction"),
                                       Norm{at(weight), at(bias), eps}, at(scores), Launch{device, stream});
}

const char* cuda_select_tokens(SHAPE, int64_t prefix, Address scores, Address indices, LAUNCH) {
    py::gil_scoped_release release;
    return idlevit::cuda::select_tokens(static_cast<DType>(dtype), shape(B, T, n, C), prefix, required(scores, B * T, "scores"),
                                        indices_out(indices), Launch{device, stream});
}

const char* cuda_select_gather_norm(TYPES, int64_t prefix, TOKENS, Address scores, NORM, Address indices,
                                    Address normed, LAUNCH) {
    py::gil_scoped_release release;
    return idlevit::cuda::select_gather_norm(static_cast<DType>(dtype), static_cast<DType>(parameters),
                                             shape(B, T, n, C), prefix, Tokens{required(x, B * T * C, "x"), x_batch, x_token}, required(scores, B * T, "scores"),
                                             Norm{at(weight), at(bias), eps}, indices_out(indices), at(normed),
                                             Launch{device, stream});
}

const char* cuda_gather_tokens(SHAPE, TOKENS, Address indices, Address out, LAUNCH) {
    py::gil_scoped_release release;
    return idlevit::cuda::gather_tokens(static_cast<DType>(dtype), shape(B, T, n, C), Tokens{required(x, B * T * C, "x"), x_batch, x_token},
                                        indices_at(indices, B * n), at(out), Launch{device, stream});
}

const char* cuda_gather_add_norm(TYPES, TOKENS, Address indices, BRANCH, NORM, Address tokens, Address normed,
                                 LAUNCH) {
    py::gil_scoped_release release;
    return idlevit::cuda::gather_add_norm(static_cast<DType>(dtype), static_cast<DType>(parameters),
                                          shape(B, T, n, C), Tokens{required(x, B * T * C, "x"), x_batch, x_token}, indices_at(indices, B * n),
                                          Branch{required(branch, B * n * C, "branch"), at(gamma), scale}, Norm{at(weight), at(bias), eps},
                                          at(tokens), at(normed), Launch{device, stream});
}

const char* cuda_scatter_tokens(TYPES, TOKENS, Address indices, Address tokens, BRANCH, Address out, int64_t out_batch,
                                int64_t out_token, LAUNCH) {
    py::gil_scoped_release release;
    return idlevit::cuda::scatter_tokens(static_cast<DType>(dtype), static_cast<DType>(parameters), shape(B, T, n, C),
                                         Tokens{at(x), x_batch, x_token}, indices_at(indices, B * n), required(tokens, B * n * C, "tokens"),
                                         Branch{at(branch), at(gamma), scale}, required(out, B * T * C, "x"), out_batch, out_token,
                                         Launch{device, stream});
}

const char* cuda_unusable(int device) { return idlevit::cuda::unusable(device); }

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
    m.def("cpu_cls_direction", &cpu_cls_direction);
    m.def("cpu_token_scores", &cpu_token_scores);
    m.def("cpu_select_tokens", &cpu_select_tokens);
    m.def("cpu_select_gather_norm", &cpu_select_gather_norm);
    m.def("cpu_cls_select_gather_norm", &cpu_cls_select_gather_norm);
    m.def("cpu_gather_tokens", &cpu_gather_tokens);
    m.def("cpu_gather_add_norm", &cpu_gather_add_norm);
    m.def("cpu_scatter_tokens", &cpu_scatter_tokens);
    m.def("cpu_project_tokens", &cpu_project_tokens);
    m.def("cpu_select_spread", &cpu_select_spread);
    m.def("cpu_assign_tokens", &cpu_assign_tokens);
    m.def("cpu_spread_memory", &cpu_spread_memory);
    m.def("cpu_gather_mean_norm", &cpu_gather_mean_norm);
    m.def("cpu_follow_tokens", &cpu_follow_tokens);
    m.def("cpu_sum_groups", &cpu_sum_groups);
    m.def("cpu_expand_groups", &cpu_expand_groups);
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
    m.def("cuda_token_scores", &cuda_token_scores);
    m.def("cuda_select_tokens", &cuda_select_tokens);
    m.def("cuda_select_gather_norm", &cuda_select_gather_norm);
    m.def("cuda_gather_tokens", &cuda_gather_tokens);
    m.def("cuda_gather_add_norm", &cuda_gather_add_norm);
    m.def("cuda_scatter_tokens", &cuda_scatter_tokens);
    m.def("cuda_unusable", &cuda_unusable);
#else
    m.attr("cuda_built") = false;
#endif
}
