#pragma once

#include "rows.h"

namespace idlevit::cpu::IDLEVIT_ISA {

// One row: rstd * sum_c (x_c - mean) weight_c u_c  +  sum_c bias_c u_c. The second term is the image's `offset`.
template <typename A>
inline A score_row(const A* row, const A* weight, const A* u, A offset, double eps, int64_t C) {
    const auto [mean, rstd] = moments(row, C, eps);
    A dot = 0;
    if (weight) {
        IDLEVIT_SIMD_SUM(dot)
        for (int64_t c = 0; c < C; ++c) dot += (row[c] - mean) * (weight[c] * u[c]);
    } else {
        IDLEVIT_SIMD_SUM(dot)
        for (int64_t c = 0; c < C; ++c) dot += (row[c] - mean) * u[c];
    }
    return rstd * dot + offset;
}

inline Status token_scores(DType dtype, Shape s, Tokens x, const void* direction, Norm norm, void* scores,
                           int threads) {
    return with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        using A = acc_t<T>;
        const A* weight = static_cast<const A*>(norm.weight);
        const A* bias = static_cast<const A*>(norm.bias);
        [[maybe_unused]] const bool serial = s.B * s.T * s.C < kSerialElements;
#pragma omp parallel num_threads(threads) if (!serial)
        {
            A buffer[kBuffer<T>];
            int64_t image = -1;
            A offset = 0;
#pragma omp for schedule(static)
            for (int64_t row = 0; row < s.B * s.T; ++row) {
                const int64_t b = row / s.T, t = row % s.T;
                const A* u = static_cast<const A*>(direction) + b * s.C;
                if (b != image) {
                    image = b;
                    A sum = 0;
                    if (bias) {
                        IDLEVIT_SIMD_SUM(sum)
                        for (int64_t c = 0; c < s.C; ++c) sum += bias[c] * u[c];
                    }
                    offset = sum;
                }
                const A* values = widen(token_row<T>(x, b, t), buffer, s.C);
                static_cast<A*>(scores)[row] = score_row(values, weight, u, offset, norm.eps, s.C);
            }
        }
        return Status::ok;
    });
}

}  // namespace idlevit::cpu::IDLEVIT_ISA
