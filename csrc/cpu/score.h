#pragma once

#include "rows.h"

namespace idlevit::cpu::IDLEVIT_ISA {

// rstd * sum_c (x_c - mean) weight_c u_c + offset, where offset = sum_c bias_c u_c is the same for a whole image.
template <typename A>
inline A score_row(const A* row, const A* weight, const A* u, A offset, double eps, int64_t C) {
    const auto [mean, rstd] = moments(row, C, eps);
    const A centre = mean;
    const A dot = weight ? sum<A>(C,
                                  [&](int64_t c, auto tag) {
                                      using V = decltype(tag);
                                      return (load<V>(row + c) - centre) * (load<V>(weight + c) * load<V>(u + c));
                                  })
                         : sum<A>(C, [&](int64_t c, auto tag) {
                               using V = decltype(tag);
                               return (load<V>(row + c) - centre) * load<V>(u + c);
                           });
    return rstd * dot + offset;
}

// For a team of threads; on return all scores are written.
template <typename T>
inline void score_tokens(const Shape& s, const Tokens& x, const acc_t<T>* direction, const Norm& norm,
                         acc_t<T>* scores) {
    using A = acc_t<T>;
    const A* weight = static_cast<const A*>(norm.weight);
    const A* bias = static_cast<const A*>(norm.bias);
    A buffer[kBuffer<T>];
    int64_t image = -1;
    A offset = 0;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < s.B * s.T; ++row) {
        const int64_t b = row / s.T, t = row % s.T;
        const A* u = direction + b * s.C;
        if (b != image) {
            image = b;
            offset = bias ? sum<A>(s.C,
                                   [&](int64_t c, auto tag) {
                                       using V = decltype(tag);
                                       return load<V>(bias + c) * load<V>(u + c);
                                   })
                          : A(0);
        }
        const A* values = widen(token_row<T>(x, b, t), buffer, s.C);
        scores[row] = score_row(values, weight, u, offset, norm.eps, s.C);
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
