#pragma once

#include "rows.h"

namespace idlevit::cpu::IDLEVIT_ISA {

// Tokens that are projected at once, each with two vectors of dimensions: their sums stay in registers.
#if defined(__AVX512F__)
constexpr int kProjected = 8;
#else
constexpr int kProjected = 4;
#endif
// Channels of those tokens that are normalised before they are multiplied; they stay in the first-level cache.
constexpr int64_t kChunk = 256;

// out[i][j] += sum_c rows[i][c] projection[c][j] for the dimensions j of two vectors.
template <typename A>
inline void multiply_rows(const A (&rows)[kProjected][kChunk], int64_t channels, const A* projection, int64_t d,
                          A* const* out) {
    using V = typename VectorOf<A>::type;
    constexpr int64_t L = kVectorBytes / sizeof(A);
    V total[kProjected][2];
    for (int i = 0; i < kProjected; ++i)
        for (int v = 0; v < 2; ++v) total[i][v] = load<V>(out[i] + v * L);
    for (int64_t c = 0; c < channels; ++c) {
        const V first = load<V>(projection + c * d), second = load<V>(projection + c * d + L);
        for (int i = 0; i < kProjected; ++i) {
            total[i][0] += rows[i][c] * first;
            total[i][1] += rows[i][c] * second;
        }
    }
    for (int i = 0; i < kProjected; ++i) std::memcpy(out[i], total[i], sizeof(total[i]));
}

template <typename A>
inline void to_unit_length(A* row, int64_t d) {
    A square = 0;
    for (int64_t j = 0; j < d; ++j) square += row[j] * row[j];
    const A length = std::sqrt(square);
    const A factor = A(1) / (length > A(1e-12) ? length : A(1e-12));
    for (int64_t j = 0; j < d; ++j) row[j] *= factor;
}

inline Status project_tokens(DType dtype, Shape s, int64_t prefix, Tokens x, Norm norm, const void* projection,
                             int64_t d, void* features, int threads) {
    return with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        using A = acc_t<T>;
        constexpr int64_t L = kVectorBytes / sizeof(A);
        const int64_t N = s.T - prefix, rows = s.B * N, groups = (rows + kProjected - 1) / kProjected;
        const A *matrix = static_cast<const A*>(projection), *weight = static_cast<const A*>(norm.weight),
                *bias = static_cast<const A*>(norm.bias);
        A* out = static_cast<A*>(features);
#pragma omp parallel num_threads(threads) if (rows * s.C >= kSerialElements)
        {
            A buffer[kBuffer<T>], chunk[kProjected][kChunk] = {},
                                  spare[kProjected][2 * L] = {};  // zero: the last group may have fewer tokens
#pragma omp for schedule(static)
            for (int64_t group = 0; group < groups; ++group) {
                const int64_t first = group * kProjected;
                const int64_t count = rows - first < kProjected ? rows - first : kProjected;
                Moments<A> statistics[kProjected];
                for (int64_t i = 0; i < count; ++i) {
                    const T* row = token_row<T>(x, (first + i) / N, prefix + (first + i) % N);
                    statistics[i] = moments(widen(row, buffer, s.C), s.C, norm.eps);
                    std::memset(out + (first + i) * d, 0, static_cast<std::size_t>(d) * sizeof(A));
                }
                for (int64_t c = 0; c < s.C; c += kChunk) {
                    const int64_t channels = s.C - c < kChunk ? s.C - c : kChunk;
                    for (int64_t i = 0; i < count; ++i) {
                        const T* token = token_row<T>(x, (first + i) / N, prefix + (first + i) % N);
                        const A* row = widen(token + c, buffer, channels);
                        const auto [mean, rstd] = statistics[i];
                        A* target = chunk[i];
                        for (int64_t k = 0; k < channels; ++k) {
                            const A value = (row[k] - mean) * rstd * (weight ? weight[c + k] : A(1));
                            target[k] = value + (bias ? bias[c + k] : A(0));
                        }
                    }
                    A* targets[kProjected];
                    int64_t j = 0;
                    for (; j + 2 * L <= d; j += 2 * L) {
                        for (int64_t i = 0; i < kProjected; ++i)
                            targets[i] = i < count ? out + (first + i) * d + j : spare[i];
                        multiply_rows(chunk, channels, matrix + c * d + j, d, targets);
                    }
                    for (; j < d; ++j)
                        for (int64_t i = 0; i < count; ++i)
                            for (int64_t k = 0; k < channels; ++k)
                                out[(first + i) * d + j] += chunk[i][k] * matrix[(c + k) * d + j];
                }
                for (int64_t i = 0; i < count; ++i) to_unit_length(out + (first + i) * d, d);
            }
        }
        return Status::ok;
    });
}

}  // namespace idlevit::cpu::IDLEVIT_ISA
