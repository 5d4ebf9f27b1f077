#include "launch.cuh"

namespace idlevit::cuda {
namespace {

// E is any type of the elements' size.
template <typename E, typename L>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(Shape s, Tokens x, const int64_t* indices, E* out, unsigned blocks_per_image) {
    const Portion portion(blocks_per_image);
    const int64_t i = portion.part * L::kRows + L::row();
    if (i >= s.n) return;
    const int64_t row = portion.image * s.n + i;
    const E* source = token_row<E>(x, portion.image, nearest_token(indices[row], s.T));
    for (int64_t c = 0; c < s.C; c += L::kChannels) {
        const int rest = static_cast<int>(s.C - c);
        Row<E, L> values;
        values.load(source + c, rest);
        values.store(out + row * s.C + c, rest);
    }
}

template <typename T, typename P, typename L>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    gather_add_norm_kernel(Shape s, Tokens x, const int64_t* indices, TypedBranch<T, P> branch,
                           TypedNorm<acc_t<T>, P> norm, T* tokens, T* normed, unsigned blocks_per_image) {
    const Portion portion(blocks_per_image);
    const int64_t i = portion.part * L::kRows + L::row();
    if (i >= s.n) return;
    const int C = static_cast<int>(s.C);
    const int64_t index = portion.image * s.n + i, offset = index * s.C;
    Row<T, L> row;
    row.load(token_row<T>(x, portion.image, nearest_token(indices[index], s.T)), C);
    branch.add_to(row, offset, 0, C);
    row.store(tokens + offset, C);
    // The norm sees the tokens as they are stored, rounded to their type.
    RowSum<acc_t<T>, L> sum;
    normalize(row, norm, normed + offset, C, sum);
}

}  // namespace

const char* gather_tokens(DType dtype, Shape s, Tokens x, const int64_t* indices, void* out, Launch launch) {
    if (s.B == 0 || s.n == 0 || s.C == 0) return nullptr;
    return with_types(dtype, dtype, [&](auto token, auto) {
        using T = typename decltype(token)::type;
        using E = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, __half, T>;
        const bool full = full_width<E>(s.C, {x.data, out}, {x.batch_stride, x.token_stride});
        return on_device(launch, [&](cudaStream_t stream) {
            const auto launch_with = [&](auto layout) {
                using L = decltype(layout);
                const int64_t blocks = ceil_div(s.n, L::kRows);
                launch_blocks(gather_kernel<E, L>, s.B * blocks, stream, s, x, indices, static_cast<E*>(out),
                              static_cast<unsigned>(blocks));
            };
            full ? launch_with(Moving<kFullWidth<E>>{}) : launch_with(Moving<1>{});
        });
    });
}

const char* gather_add_norm(DType dtype, DType parameters, Shape s, Tokens x, const int64_t* indices, Branch branch,
                            Norm norm, void* tokens, void* normed, Launch launch) {
    if (s.B == 0 || s.n == 0) return nullptr;
    return with_types(dtype, parameters, [&](auto token, auto parameter) {
        using T = typename decltype(token)::type;
        using P = typename decltype(parameter)::type;
        const bool full =
            full_width<T>(s.C, {x.data, branch.data, branch.gamma, norm.weight, norm.bias, tokens, normed},
                          {x.batch_stride, x.token_stride});
        return on_device(launch, [&](cudaStream_t stream) {
            with_layout<T>(s.C, full, [&](auto layout) {
                using L = decltype(layout);
                const int64_t blocks = ceil_div(s.n, L::kRows);
                launch_blocks(gather_add_norm_kernel<T, P, L>, s.B * blocks, stream, s, x, indices,
                              TypedBranch<T, P>(branch), TypedNorm<acc_t<T>, P>(norm), static_cast<T*>(tokens),
                              static_cast<T*>(normed), static_cast<unsigned>(blocks));
            });
        });
    });
}

}  // namespace idlevit::cuda
