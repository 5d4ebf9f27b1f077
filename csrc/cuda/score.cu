#include <algorithm>

#include "launch.cuh"

namespace idlevit::cuda {
namespace {

// scores[b, t] = rstd * sum_c (x_c - mean) weight_c u_c  +  sum_c bias_c u_c.
// The threads of a row take `rows` tokens of one image: weight * u stays in registers, or reading the parameters from
// the first-level cache would cost more than reading x from memory. The next token is loaded before this one is summed,
// unless a thread's part of it is so large that it would cost the registers of other warps.
template <typename T, typename P, typename L>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    score_kernel(Shape s, Tokens x, const P* direction, TypedNorm<acc_t<T>, P> norm, acc_t<T>* scores, int rows,
                 unsigned blocks_per_image) {
    using A = acc_t<T>;
    const Portion portion(blocks_per_image);
    const int64_t b = portion.image;
    const int64_t first = (portion.part * L::kRows + L::row()) * rows;
    const int64_t last = min(first + rows, s.T);
    if (first >= last) return;
    const int C = static_cast<int>(s.C);

    constexpr bool kPrefetch = sizeof(Row<T, L>) <= 64;
    Row<T, L> next;
    if constexpr (kPrefetch) next.load(token_row<T>(x, b, first), C);

    const P* u = direction + b * s.C;
    A factor[L::kSlots][L::kWidth];
    A offset[1] = {0};
    L::each(C, [&](int slot, int c) {
        Vector<P, L::kWidth> direction_c = vector_at<P, L::kWidth>(u + c), weight, bias;
        if (norm.weight) weight = vector_at<P, L::kWidth>(norm.weight + c);
        if (norm.bias) bias = vector_at<P, L::kWidth>(norm.bias + c);
#pragma unroll
        for (int i = 0; i < L::kWidth; ++i) {
            const A u_c = static_cast<A>(direction_c.at[i]);
            factor[slot][i] = norm.weight ? u_c * static_cast<A>(weight.at[i]) : u_c;
            if (norm.bias) offset[0] += u_c * static_cast<A>(bias.at[i]);
        }
    });

    RowSum<A, L> sum;
    sum(offset);
    for (int64_t t = first; t < last; ++t) {
        Row<T, L> row;
        if constexpr (kPrefetch) {
            row = next;
            if (t + 1 < last) next.load(token_row<T>(x, b, t + 1), C);
        } else {
            row.load(token_row<T>(x, b, t), C);
        }
        const A mean = row_mean(row, C, sum);
        A sums[2] = {0, 0};  // squares, dot product
        row.each(C, [&](int slot, int i, int, A value) {
            const A centered = value - mean;
            sums[0] += centered * centered;
            sums[1] += centered * factor[slot][i];
        });
        sum(sums);
        const A rstd = reciprocal_sqrt(sums[0] / static_cast<A>(C) + norm.eps);
        if (L::lane() == 0) scores[b * s.T + t] = rstd * sums[1] + offset[0];
    }
}

}  // namespace

const char* token_scores(DType dtype, DType parameters, Shape s, Tokens x, const void* direction, Norm norm,
                         void* scores, Launch launch) {
    if (s.B == 0 || s.T == 0) return nullptr;
    return with_types(dtype, parameters, [&](auto token, auto parameter) {
        using T = typename decltype(token)::type;
        using P = typename decltype(parameter)::type;
        const bool full =
            full_width<T>(s.C, {x.data, direction, norm.weight, norm.bias}, {x.batch_stride, x.token_stride});
        return on_device(launch, [&](cudaStream_t stream) {
            with_layout<T>(s.C, full, [&](auto layout) {
                using L = decltype(layout);
                // About 8192 groups fill the largest GPU several times over; fewer rows than that go one to a group.
                const int64_t groups = L::kOneWarp ? 8192 : 8192 / kWarps;
                const int64_t rows = std::clamp<int64_t>(s.B * s.T / groups, 1, 8);
                const int64_t blocks = ceil_div(s.T, rows * L::kRows);
                launch_blocks(score_kernel<T, P, L>, s.B * blocks, stream, s, x, static_cast<const P*>(direction),
                              TypedNorm<acc_t<T>, P>(norm), static_cast<acc_t<T>*>(scores), static_cast<int>(rows),
                              static_cast<unsigned>(blocks));
            });
        });
    });
}

}  // namespace idlevit::cuda
