// Runs CUDA kernels on the host, one fiber a thread, one block after the other: enough of the language and the runtime
// for csrc/cuda, to test what the kernels compute where there is no GPU. Time, memory spaces and concurrent blocks are
// not modelled. What is checked beyond the results: all lanes of a warp meet at the same warp-wide operation, and no
// thread is missing at one or at a barrier. Fibers can run in either order, to show a barrier that is missing.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static  // blocks run one after the other
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3() = default;
    explicit dim3(unsigned size) : x(size) {}
};
struct int2 {
    int x, y;
};

inline dim3 threadIdx, blockIdx;

enum cudaError_t { cudaSuccess = 0, cudaErrorNoDevice = 100 };
using cudaStream_t = struct Stream*;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
};

namespace emulator {

constexpr int kThreads = 256, kWarp = 32;
constexpr std::size_t kStack = 128 << 10;

inline bool descending = false;  // the order in which fibers run
inline int current_device = 0, launches = 0;
inline cudaStream_t last_stream = nullptr;
inline cudaError_t last_error = cudaSuccess;

// Where a group of threads meets and exchanges a value each. Two buffers in turn: a thread can reach the next meeting
// before another has read this one, not the one after.
struct Meeting {
    int size = 0, arrived = 0, turn = 0;
    const char* operation = nullptr;
    std::uint64_t values[2][kThreads];
};

// A context gives a fiber its stack and starts it; from then on jumps, which need no system call, switch.
struct Fiber {
    ucontext_t context;
    jmp_buf jump;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool started = false, done = false;
};

inline jmp_buf scheduler;
inline Fiber fibers[kThreads];
inline Meeting block, warps[kThreads / kWarp];
inline std::function<void()> body;
inline bool progress = false;

inline void yield() {
    if (!_setjmp(fibers[threadIdx.x].jump)) _longjmp(scheduler, 1);
}

// Runs a fiber until it yields.
inline __attribute__((noinline)) void resume(Fiber& fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.jump, 1);
    fiber.started = true;
    setcontext(&fiber.context);
}

// All threads of the group leave a value; returns the values.
inline const std::uint64_t* meet(Meeting& meeting, int rank, const char* operation, std::uint64_t value) {
    if (meeting.arrived == 0) meeting.operation = operation;
    if (std::strcmp(meeting.operation, operation) != 0) {
        std::fprintf(stderr, "threads of one group are at %s and at %s\n", meeting.operation, operation);
        std::abort();
    }
    progress = true;
    const int turn = meeting.turn;
    meeting.values[turn][rank] = value;
    if (++meeting.arrived == meeting.size) {
        meeting.arrived = 0;
        meeting.turn ^= 1;
    } else {
        // This turn cannot come round again before this thread has left it.
        while (meeting.turn == turn) yield();
    }
    progress = true;
    return meeting.values[turn];
}

inline const std::uint64_t* meet_warp(const char* operation, std::uint64_t value) {
    return meet(warps[threadIdx.x / kWarp], threadIdx.x % kWarp, operation, value);
}

inline void finish() {
    fibers[threadIdx.x].done = true;
    progress = true;
    yield();
}

inline void enter() {
    body();
    finish();
}

inline void run_block() {
    block = {};
    block.size = kThreads;
    for (Meeting& warp : warps) {
        warp = {};
        warp.size = kWarp;
    }
    for (Fiber& fiber : fibers) {
        fiber.started = fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    for (bool alive = true; alive && last_error == cudaSuccess;) {
        alive = progress = false;
        for (int i = 0; i < kThreads && last_error == cudaSuccess; ++i) {
            const int thread = descending ? kThreads - 1 - i : i;
            if (fibers[thread].done) continue;
            alive = true;
            threadIdx.x = static_cast<unsigned>(thread);
            resume(fibers[thread]);
        }
        if (alive && !progress) {
            std::fprintf(stderr, "threads wait for others that have left the kernel\n");
            std::abort();
        }
    }
}

}  // namespace emulator

inline void __syncthreads() { emulator::meet(emulator::block, threadIdx.x, "__syncthreads", 0); }

inline int __syncthreads_count(int predicate) {
    const auto* values = emulator::meet(emulator::block, threadIdx.x, "__syncthreads_count", predicate != 0);
    int count = 0;
    for (int i = 0; i < emulator::kThreads; ++i) count += static_cast<int>(values[i]);
    return count;
}

inline unsigned __ballot_sync(unsigned, bool predicate) {
    const auto* values = emulator::meet_warp("__ballot_sync", predicate);
    unsigned mask = 0;
    for (int i = 0; i < emulator::kWarp; ++i) mask |= static_cast<unsigned>(values[i]) << i;
    return mask;
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(value));
    bits = emulator::meet_warp("__shfl_xor_sync", bits)[(threadIdx.x % emulator::kWarp) ^ static_cast<unsigned>(mask)];
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }

inline cudaError_t cudaGetDevice(int* device) {
    *device = emulator::current_device;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    emulator::current_device = device;
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return std::exchange(emulator::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return "no CUDA-capable device is detected"; }

template <typename... Parameters, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Args&&... args) {
    const std::tuple<Parameters...> parameters(std::forward<Args>(args)...);
    emulator::body = [&] { std::apply(kernel, parameters); };
    emulator::last_stream = config->stream;
    ++emulator::launches;
    for (unsigned i = 0; i < config->gridDim.x && emulator::last_error == cudaSuccess; ++i) {
        blockIdx.x = i;
        emulator::run_block();
    }
    return emulator::last_error;
}
