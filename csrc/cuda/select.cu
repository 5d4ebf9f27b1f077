#include <algorithm>

#include "../selection.h"
#include "launch.cuh"

namespace idlevit::cuda {
namespace {

// The sum over the block of a count of at most `limit`, one barrier for each bit of the limit: a single one where a
// thread has one key.
__device__ __forceinline__ int block_sum(int count, int limit) {
    int sum = 0;
    for (int bit = 0; limit >> bit; ++bit) sum += __syncthreads_count((count >> bit) & 1) << bit;
    return sum;
}

// The whole block finds the `keep` largest of N scores and calls write(position, j) for each kept j, from the thread
// that holds it; positions ascend with j. Each warp has a contiguous segment of the scores, so that one barrier is
// enough to rank them. The first kHeld keys of a thread stay in registers; the others (N > 2048) are read again, from
// the first-level cache.
template <typename A, typename F>
__device__ __forceinline__ void select_image(const A* scores, int N, int64_t keep, F&& write) {
    using Key = decltype(order_key(A{}));
    constexpr int kHeld = 8;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int keys_per_thread = (N + kThreads - 1) / kThreads;
    const int begin = warp * keys_per_thread * kWarpSize;
    const int end = min(begin + keys_per_thread * kWarpSize, N);

    Key held[kHeld];
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
        const int j = begin + h * kWarpSize + lane;
        held[h] = j < end ? order_key(scores[j]) : 0;
    }
    // f(j, key) for each key of this thread; called by all lanes of a warp together, with j >= end past the segment.
    const auto each_key = [&](auto&& f) {
#pragma unroll
        for (int h = 0; h < kHeld; ++h) {
            if (begin + h * kWarpSize < end) f(begin + h * kWarpSize + lane, held[h]);
        }
        for (int base = begin + kHeld * kWarpSize; base < end; base += kWarpSize) {
            const int j = base + lane;
            f(j, j < end ? order_key(scores[j]) : Key{0});
        }
    };

    ThresholdSearch<Key> search(keep);
    while (!search.done()) {
        const Key candidate = search.candidate();
        int count = 0;
        each_key([&](int, Key key) { count += key >= candidate; });
        search.advance(block_sum(count, keys_per_thread));
    }

    const auto above_mask = [&](int j, Key key) { return __ballot_sync(kAllLanes, j < end && key > search.threshold); };
    const auto equal_mask = [&](int j, Key key) {
        return __ballot_sync(kAllLanes, j < end && key == search.threshold);
    };
    int above = 0, equal = 0;
    each_key([&](int j, Key key) {
        above += __popc(above_mask(j, key));
        equal += __popc(equal_mask(j, key));
    });
    __shared__ int2 totals[kWarps];
    if (lane == 0) totals[warp] = {above, equal};
    __syncthreads();
    above = equal = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        above += w < warp ? totals[w].x : 0;
        equal += w < warp ? totals[w].y : 0;
    }
    const unsigned lanes_before = (1u << lane) - 1;
    each_key([&](int j, Key key) {
        const unsigned above_here = above_mask(j, key), equal_here = equal_mask(j, key);
        const int above_before = above + __popc(above_here & lanes_before);
        const int equal_before = equal + __popc(equal_here & lanes_before);
        if (j < end && search.keeps(key, equal_before))
            write(static_cast<int>(search.position(above_before, equal_before)), j);
        above += __popc(above_here);
        equal += __popc(equal_here);
    });
}

// One block an image.
template <typename A>
__global__ void __launch_bounds__(kThreads) select_kernel(Shape s, int prefix, const A* scores, int64_t* indices) {
    const int64_t b = blockIdx.x;
    int64_t* out = indices + b * s.n;
    for (int p = threadIdx.x; p < prefix; p += kThreads) out[p] = p;
    select_image(scores + b * s.T + prefix, static_cast<int>(s.T) - prefix, s.n - prefix,
                 [&](int position, int j) { out[prefix + position] = prefix + j; });
}

// The most rows a block takes from select to norm.
constexpr int kSliceRows = 256;

// Every block selects, and then writes and normalises its slice of the kept tokens. Selecting again in every block
// takes as long as doing it once (under a microsecond for 196 tokens), all blocks at the same time, and saves a second
// launch and its wait; the host takes few blocks an image where there are many images, so that it stays a small part.
template <typename T, typename P, typename L>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    select_gather_norm_kernel(Shape s, int prefix, Tokens x, const acc_t<T>* scores, TypedNorm<acc_t<T>, P> norm,
                              int64_t* indices, T* normed, int slice_rows, unsigned slices) {
    using A = acc_t<T>;
    __shared__ int tokens[kSliceRows];
    const Portion portion(slices);
    const int64_t b = portion.image;
    const int first = static_cast<int>(portion.part) * slice_rows;
    const int rows = min(slice_rows, static_cast<int>(s.n) - first);
    const auto write = [&](int position, int t) {
        if (position >= first && position < first + rows) {
            tokens[position - first] = t;
            indices[b * s.n + position] = t;
        }
    };
    for (int p = threadIdx.x; p < prefix; p += kThreads) write(p, p);
    select_image(scores + b * s.T + prefix, static_cast<int>(s.T) - prefix, s.n - prefix,
                 [&](int position, int j) { write(prefix + position, prefix + j); });
    __syncthreads();

    const int C = static_cast<int>(s.C);
    RowSum<A, L> sum;
    for (int i = L::row(); i < rows; i += L::kRows) {
        Row<T, L> row;
        row.load(token_row<T>(x, b, tokens[i]), C);
        normalize(row, norm, normed + (b * s.n + first + i) * s.C, C, sum);
    }
}

}  // namespace

const char* select_tokens(DType dtype, Shape s, int64_t prefix, const void* scores, int64_t* indices, Launch launch) {
    if (s.B == 0 || s.n == 0) return nullptr;
    const auto launch_with = [&](auto zero) {
        using A = decltype(zero);
        return on_device(launch, [&](cudaStream_t stream) {
            launch_blocks(select_kernel<A>, s.B, stream, s, static_cast<int>(prefix), static_cast<const A*>(scores),
                          indices);
        });
    };
    if (dtype == DType::f32) return launch_with(0.0f);
    if (dtype == DType::f64) return launch_with(0.0);
    return "scores must be float32 or float64";
}

const char* select_gather_norm(DType dtype, DType parameters, Shape s, int64_t prefix, Tokens x, const void* scores,
                               Norm norm, int64_t* indices, void* normed, Launch launch) {
    if (s.B == 0 || s.n == 0) return nullptr;
    return with_types(dtype, parameters, [&](auto token, auto parameter) {
        using T = typename decltype(token)::type;
        using P = typename decltype(parameter)::type;
        const bool full =
            full_width<T>(s.C, {x.data, norm.weight, norm.bias, normed}, {x.batch_stride, x.token_stride});
        return on_device(launch, [&](cudaStream_t stream) {
            with_layout<T>(s.C, full, [&](auto layout) {
                using L = decltype(layout);
                // About 1024 blocks in all, and never more than there are rows to work on at a time.
                const int64_t wanted = std::max<int64_t>(1024 / s.B, 1);
                const int64_t rows = ceil_div(ceil_div(s.n, wanted), L::kRows) * L::kRows;
                const int64_t slice_rows = std::min<int64_t>(rows, kSliceRows);
                const int64_t slices = ceil_div(s.n, slice_rows);
                launch_blocks(select_gather_norm_kernel<T, P, L>, s.B * slices, stream, s, static_cast<int>(prefix), x,
                              static_cast<const acc_t<T>*>(scores), TypedNorm<acc_t<T>, P>(norm), indices,
                              static_cast<T*>(normed), static_cast<int>(slice_rows), static_cast<unsigned>(slices));
            });
        });
    });
}

}  // namespace idlevit::cuda
