// The host side of every launch: device, stream and errors; element types; layouts.
#pragma once

#include <initializer_list>
#include <type_traits>
#include <utility>

#include "rows.cuh"

namespace idlevit::cuda {

inline const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// Calls f(stream) with the device current, and returns the error of its launches.
template <typename F>
const char* on_device(Launch launch, F&& f) {
    int previous = -1;
    cudaError_t error = cudaGetDevice(&previous);
    if (error == cudaSuccess && previous != launch.device) error = cudaSetDevice(launch.device);
    if (error != cudaSuccess) return message(error);
    f(reinterpret_cast<cudaStream_t>(launch.stream));
    error = cudaGetLastError();
    if (previous != launch.device) {
        const cudaError_t restored = cudaSetDevice(previous);
        if (error == cudaSuccess) error = restored;
    }
    return message(error);
}

// Blocks of kThreads. Errors are collected by on_device.
template <typename... Parameters, typename... Args>
void launch_blocks(void (*kernel)(Parameters...), int64_t blocks, cudaStream_t stream, Args&&... args) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

template <typename T>
struct Type {
    using type = T;
};

// Calls f(Type<T>, Type<P>): tokens have type T; parameters P are of that type too, or of its accumulate type.
template <typename F>
const char* with_types(DType tokens, DType parameters, F&& f) {
    const auto with_parameters = [&](auto token) {
        using A = acc_t<typename decltype(token)::type>;
        if (parameters == tokens) return f(token, token);
        if (parameters == (std::is_same_v<A, double> ? DType::f64 : DType::f32)) return f(token, Type<A>{});
        return "parameters must have the dtype of the tokens or their accumulate dtype";
    };
    switch (tokens) {
        case DType::f32: return with_parameters(Type<float>{});
        case DType::f64: return with_parameters(Type<double>{});
        case DType::f16: return with_parameters(Type<__half>{});
        case DType::bf16: return with_parameters(Type<__nv_bfloat16>{});
    }
    return "unknown dtype";
}

template <typename T>
constexpr int kFullWidth = 16 / static_cast<int>(sizeof(T));

// Whether rows of C channels, at these addresses and with these strides, can be moved 16 bytes at a time.
template <typename T>
bool full_width(int64_t C, std::initializer_list<const void*> addresses, std::initializer_list<int64_t> strides) {
    std::uintptr_t bits = 0;
    for (const void* address : addresses) bits |= reinterpret_cast<std::uintptr_t>(address);
    std::uint64_t sizes = static_cast<std::uint64_t>(C);
    for (int64_t stride : strides) sizes |= static_cast<std::uint64_t>(stride);
    return bits % 16 == 0 && sizes % kFullWidth<T> == 0;
}

// Calls f(Layout): a warp a row where 32 channels a thread are enough, so that no reduction leaves the warp (16 for
// narrow rows: fewer registers, more rows in flight); else a block a row. Rows that cannot be moved 16 bytes at a time,
// and float64, which is there for gradient checks, take one element at a time.
template <typename T, typename F>
void with_layout(int64_t C, bool full, F&& f) {
    if constexpr (!std::is_same_v<T, double>) {
        constexpr int W = kFullWidth<T>;
        if (full && C <= 16 * kWarpSize) return f(Layout<W, 16 / W, kWarpSize>{});
        if (full && C <= 32 * kWarpSize) return f(Layout<W, 32 / W, kWarpSize>{});
        if (full) return f(Layout<W, 16 / W, kThreads>{});
    }
    static_assert(kMaxChannels <= 16 * kThreads);
    return f(Layout<1, 16, kThreads>{});
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace idlevit::cuda
