#pragma once

#include "rows.h"

namespace idlevit::cpu::IDLEVIT_ISA {

// rstd * sum_c (x_c - mean) v_c + offset with v = weight * direction, and offset = sum_c bias_c direction_c, which is
// the same for a whole image. The variance and the product share the second pass over the row.
template <typename A>
inline A score_row(const A* row, const A* v, A offset, double eps, int64_t C) {
    using V = typename VectorOf<A>::type;
    constexpr int64_t L = kVectorBytes / sizeof(A);
    const A mean = sum<A>(C, [&](int64_t c, auto tag) { return load<decltype(tag)>(row + c); }) / static_cast<A>(C);
    V square[2]{}, product[2]{};
    int64_t c = 0;
    for (; c + 2 * L <= C; c += 2 * L)
        for (int64_t i = 0; i < 2; ++i) {
            const V centred = load<V>(row + c + i * L) - mean;
            square[i] += centred * centred;
            product[i] += centred * load<V>(v + c + i * L);
        }
    A variance = sum_lanes<A>(square[0] + square[1]), dot = sum_lanes<A>(product[0] + product[1]);
    for (; c < C; ++c) {
        const A centred = row[c] - mean;
        variance += centred * centred;
        dot += centred * v[c];
    }
    return dot / std::sqrt(variance / static_cast<A>(C) + static_cast<A>(eps)) + offset;
}

// What the scores of an image have in common.
template <typename A>
struct Image {
    A v[kMaxChannels];
    A offset;

    void set(const A* direction, const Norm& norm, int64_t C) {
        const A* weight = static_cast<const A*>(norm.weight);
        const A* bias = static_cast<const A*>(norm.bias);
        IDLEVIT_SIMD
        for (int64_t c = 0; c < C; ++c) v[c] = weight ? weight[c] * direction[c] : direction[c];
        offset = A(0);
        if (bias)
            offset = sum<A>(C, [&](int64_t c, auto tag) {
                using V = decltype(tag);
                return load<V>(bias + c) * load<V>(direction + c);
            });
    }
};

// For a team of threads; on return all scores are written.
template <typename T>
inline void score_tokens(const Shape& s, const Tokens& x, const acc_t<T>* direction, const Norm& norm,
                         acc_t<T>* scores) {
    Image<acc_t<T>> image;
    acc_t<T> buffer[kBuffer<T>];
    int64_t current = -1;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < s.B * s.T; ++row) {
        const int64_t b = row / s.T, t = row % s.T;
        if (b != current) image.set(direction + (current = b) * s.C, norm, s.C);
        scores[row] = score_row(widen(token_row<T>(x, b, t), buffer, s.C), image.v, image.offset, norm.eps, s.C);
    }
}

inline Status token_scores(DType dtype, Shape s, Tokens x, const void* direction, Norm norm, void* scores,
                           int threads) {
    return with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        using A = acc_t<T>;
        [[maybe_unused]] const bool serial = s.B * s.T * s.C < kSerialElements;
#pragma omp parallel num_threads(threads) if (!serial)
        score_tokens<T>(s, x, static_cast<const A*>(direction), norm, static_cast<A*>(scores));
        return Status::ok;
    });
}

}  // namespace idlevit::cpu::IDLEVIT_ISA
