// What every CUDA kernel does with one row of C channels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../tokens.h"

namespace idlevit::cuda {

constexpr int kThreads = 256;
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Blocks that must fit a multiprocessor: at most 128 registers a thread. Without it ptxas aims at 64 and spills.
template <typename T>
constexpr int kBlocks = sizeof(T) == 8 ? 1 : 2;

// N neighbouring elements, moved in accesses of up to 16 bytes.
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Vector {
    T at[N];
};

template <typename T, int N>
__device__ __forceinline__ const Vector<T, N>& vector_at(const T* address) {
    return *reinterpret_cast<const Vector<T, N>*>(address);
}
template <typename T, int N>
__device__ __forceinline__ Vector<T, N>& vector_at(T* address) {
    return *reinterpret_cast<Vector<T, N>*>(address);
}

// How a row is spread over `Lanes` threads, a warp or the whole block: each holds `Slots` vectors of `Width` channels,
// in registers from the first use to the last.
template <int Width, int Slots, int Lanes>
struct Layout {
    static constexpr int kWidth = Width;
    static constexpr int kSlots = Slots;
    static constexpr int kRows = kThreads / Lanes;  // rows that a block works on at a time
    static constexpr int kChannels = Width * Slots * Lanes;
    static constexpr bool kOneWarp = Lanes == kWarpSize;

    // Which of the block's rows this thread works on.
    static __device__ __forceinline__ int row() { return threadIdx.x / Lanes; }
    static __device__ __forceinline__ int lane() { return threadIdx.x % Lanes; }

    // f(slot, channel) for each vector of this thread that lies inside the row.
    template <typename F>
    static __device__ __forceinline__ void each(int C, F&& f) {
#pragma unroll
        for (int slot = 0; slot < Slots; ++slot) {
            const int c = (slot * Lanes + lane()) * Width;
            if (c < C) f(slot, c);
        }
    }
};

// Rows that only pass through: a warp a row, a few vectors of each lane in flight.
template <int Width>
using Moving = Layout<Width, 4, kWarpSize>;

template <typename T, typename L>
struct Row {
    using A = acc_t<T>;
    Vector<T, L::kWidth> slots[L::kSlots];

    __device__ __forceinline__ void load(const T* row, int C) {
        L::each(C, [&](int slot, int c) { slots[slot] = vector_at<T, L::kWidth>(row + c); });
    }
    __device__ __forceinline__ void store(T* row, int C) const {
        L::each(C, [&](int slot, int c) { vector_at<T, L::kWidth>(row + c) = slots[slot]; });
    }

    // f(slot, i, channel, value) for each channel of this thread.
    template <typename F>
    __device__ __forceinline__ void each(int C, F&& f) const {
        L::each(C, [&](int slot, int c) {
#pragma unroll
            for (int i = 0; i < L::kWidth; ++i) f(slot, i, c + i, static_cast<A>(slots[slot].at[i]));
        });
    }
};

// Sums over the threads of a row; all of them get the same bits. Calls must be uniform over those threads.
template <typename A, typename L>
class RowSum {
   public:
    template <int K>
    __device__ __forceinline__ void operator()(A (&values)[K]) {
#pragma unroll
        for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
#pragma unroll
            for (int k = 0; k < K; ++k) values[k] += __shfl_xor_sync(kAllLanes, values[k], distance);
        }
        if constexpr (!L::kOneWarp) {
            // Two buffers in turn: nobody writes one before all have passed the barrier after reading it.
            __shared__ A partial[2][kWarps][K];
            turn_ ^= 1;
            if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
                for (int k = 0; k < K; ++k) partial[turn_][threadIdx.x / kWarpSize][k] = values[k];
            }
            __syncthreads();
#pragma unroll
            for (int k = 0; k < K; ++k) {
                values[k] = 0;
#pragma unroll
                for (int warp = 0; warp < kWarps; ++warp) values[k] += partial[turn_][warp][k];
            }
        }
    }

   private:
    int turn_ = 0;
};

__device__ __forceinline__ float reciprocal_sqrt(float x) { return rsqrtf(x); }
__device__ __forceinline__ double reciprocal_sqrt(double x) { return rsqrt(x); }

template <typename T, typename L>
__device__ __forceinline__ acc_t<T> row_mean(const Row<T, L>& row, int C, RowSum<acc_t<T>, L>& sum) {
    acc_t<T> total[1] = {0};
    row.each(C, [&](int, int, int, acc_t<T> value) { total[0] += value; });
    sum(total);
    return total[0] / static_cast<acc_t<T>>(C);
}

// LayerNorm with parameters of type P.
template <typename A, typename P>
struct TypedNorm {
    const P* weight;
    const P* bias;
    A eps;

    explicit TypedNorm(const Norm& norm)
        : weight(static_cast<const P*>(norm.weight)),
          bias(static_cast<const P*>(norm.bias)),
          eps(static_cast<A>(norm.eps)) {}
};

// out = LN(row). The statistics take two passes over registers: no cancellation.
template <typename T, typename P, typename L>
__device__ __forceinline__ void normalize(const Row<T, L>& row, const TypedNorm<acc_t<T>, P>& norm, T* out, int C,
                                          RowSum<acc_t<T>, L>& sum) {
    using A = acc_t<T>;
    constexpr int W = L::kWidth;
    const A mean = row_mean(row, C, sum);
    A square[1] = {0};
    row.each(C, [&](int, int, int, A value) { square[0] += (value - mean) * (value - mean); });
    sum(square);
    const A rstd = reciprocal_sqrt(square[0] / static_cast<A>(C) + norm.eps);
    L::each(C, [&](int slot, int c) {
        Vector<P, W> weight, bias;
        if (norm.weight) weight = vector_at<P, W>(norm.weight + c);
        if (norm.bias) bias = vector_at<P, W>(norm.bias + c);
        Vector<T, W> result;
#pragma unroll
        for (int i = 0; i < W; ++i) {
            A value = (static_cast<A>(row.slots[slot].at[i]) - mean) * rstd;
            if (norm.weight) value *= static_cast<A>(weight.at[i]);
            if (norm.bias) value += static_cast<A>(bias.at[i]);
            result.at[i] = static_cast<T>(value);
        }
        vector_at<T, W>(out + c) = result;
    });
}

// A residual branch with gamma of type P; adds scale * gamma * data to rows.
template <typename T, typename P>
struct TypedBranch {
    using A = acc_t<T>;
    const T* data;
    const P* gamma;
    A scale;

    explicit TypedBranch(const Branch& branch)
        : data(static_cast<const T*>(branch.data)),
          gamma(static_cast<const P*>(branch.gamma)),
          scale(static_cast<A>(branch.scale)) {}

    // `offset`: where the thread's row begins in data; `first`: the row's first channel.
    template <typename L>
    __device__ __forceinline__ void add_to(Row<T, L>& row, int64_t offset, int first, int C) const {
        constexpr int W = L::kWidth;
        Row<T, L> added;
        added.load(data + offset, C);
        L::each(C, [&](int slot, int c) {
            Vector<P, W> factor;
            if (gamma) factor = vector_at<P, W>(gamma + first + c);
#pragma unroll
            for (int i = 0; i < W; ++i) {
                const A weight = gamma ? scale * static_cast<A>(factor.at[i]) : scale;
                T& element = row.slots[slot].at[i];
                element = static_cast<T>(static_cast<A>(element) + weight * static_cast<A>(added.slots[slot].at[i]));
            }
        });
    }
};

// Which image a block works on, and which of the blocks of that image it is.
struct Portion {
    int64_t image;
    int64_t part;

    __device__ __forceinline__ explicit Portion(unsigned blocks_per_image)
        : image(blockIdx.x / blocks_per_image), part(blockIdx.x % blocks_per_image) {}
};

template <typename T>
__device__ __forceinline__ const T* token_row(const Tokens& x, int64_t b, int64_t t) {
    return static_cast<const T*>(x.data) + b * x.batch_stride + t * x.token_stride;
}

// Index values are not checked on the host, which would wait for the device. A wrong one acts as the nearest token: no
// read or write outside the tensor, and no trap, after which the process could not use the device any more.
__device__ __forceinline__ int64_t nearest_token(int64_t t, int64_t T) { return min(max(t, int64_t{0}), T - 1); }

}  // namespace idlevit::cuda
