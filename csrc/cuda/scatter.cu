#include "launch.cuh"

namespace idlevit::cuda {
namespace {

// The place of t among n ascending indices, or -1. In each round the lanes of the warp test evenly spaced indices.
__device__ __forceinline__ int64_t find(const int64_t* indices, int64_t n, int64_t t) {
    const int lane = threadIdx.x % kWarpSize;
    int64_t begin = 0, end = n;
    while (end - begin > kWarpSize) {
        const int64_t stride = (end - begin + kWarpSize - 1) / kWarpSize;
        const int64_t i = begin + lane * stride;
        const int no_larger = __popc(__ballot_sync(kAllLanes, i < end && indices[i] <= t));
        if (no_larger == 0) return -1;
        begin += (no_larger - 1) * stride;
        end = min(begin + stride, end);
    }
    const unsigned found = __ballot_sync(kAllLanes, begin + lane < end && indices[begin + lane] == t);
    return found ? begin + __ffs(found) - 1 : -1;
}

// A warp a row: the kept rows where x is out, every row of out otherwise.
template <typename T, typename P, typename L>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    scatter_kernel(Shape s, Tokens x, const int64_t* indices, const T* tokens, TypedBranch<T, P> branch, T* out,
                   int64_t out_batch_stride, int64_t out_token_stride, unsigned blocks_per_image) {
    const Portion portion(blocks_per_image);
    const int64_t b = portion.image, row = portion.part * L::kRows + L::row();
    const int64_t* indices_b = indices + b * s.n;
    const bool in_place = x.data == out;
    if (row >= (in_place ? s.n : s.T)) return;
    const int64_t i = in_place ? row : find(indices_b, s.n, row);
    const int64_t t = in_place ? nearest_token(indices_b[row], s.T) : row;
    const int64_t offset = (b * s.n + i) * s.C;
    const T* source = i >= 0 ? tokens + offset : x.data ? token_row<T>(x, b, t) : nullptr;
    T* target = out + b * out_batch_stride + t * out_token_stride;
    for (int64_t c = 0; c < s.C; c += L::kChannels) {
        const int rest = static_cast<int>(s.C - c);
        Row<T, L> values{};
        if (source) values.load(source + c, rest);
        if (i >= 0 && branch.data) branch.add_to(values, offset + c, static_cast<int>(c), rest);
        values.store(target + c, rest);
    }
}

}  // namespace

const char* scatter_tokens(DType dtype, DType parameters, Shape s, Tokens x, const int64_t* indices, const void* tokens,
                           Branch branch, void* out, int64_t out_batch_stride, int64_t out_token_stride,
                           Launch launch) {
    const int64_t rows = x.data == out ? s.n : s.T;
    if (s.B == 0 || rows == 0 || s.C == 0) return nullptr;
    return with_types(dtype, parameters, [&](auto token, auto parameter) {
        using T = typename decltype(token)::type;
        using P = typename decltype(parameter)::type;
        const bool full = full_width<T>(s.C, {x.data, tokens, branch.data, branch.gamma, out},
                                        {x.batch_stride, x.token_stride, out_batch_stride, out_token_stride});
        return on_device(launch, [&](cudaStream_t stream) {
            const auto launch_with = [&](auto layout) {
                using L = decltype(layout);
                const int64_t blocks = ceil_div(rows, L::kRows);
                launch_blocks(scatter_kernel<T, P, L>, s.B * blocks, stream, s, x, indices,
                              static_cast<const T*>(tokens), TypedBranch<T, P>(branch), static_cast<T*>(out),
                              out_batch_stride, out_token_stride, static_cast<unsigned>(blocks));
            };
            full ? launch_with(Moving<kFullWidth<T>>{}) : launch_with(Moving<1>{});
        });
    });
}

}  // namespace idlevit::cuda
