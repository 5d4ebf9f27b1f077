#pragma once

#include "rows.h"

namespace idlevit::cpu::IDLEVIT_ISA {

// What a thread that walks through the weights once takes along: at most this many images, and as many numbers as fit
// the smallest stacks of threads.
constexpr int kDirectionImages = 8;
constexpr int64_t kDirectionNumbers = 2 * kMaxChannels;
constexpr int64_t kAhead = 8;

// query[i] = bias + weight . rows[i] for the images i < count, with one pass over the weight row.
template <typename A, int count>
inline void dot_rows(const A* weight, A bias, const A* rows, int64_t C, A* const* query) {
    using V = typename VectorOf<A>::type;
    constexpr int64_t L = kVectorBytes / sizeof(A);
    V even[count]{}, odd[count]{};
    int64_t c = 0;
    for (; c + 2 * L <= C; c += 2 * L) {
        const V first = load<V>(weight + c), second = load<V>(weight + c + L);
        for (int i = 0; i < count; ++i) {
            even[i] += first * load<V>(rows + i * C + c);
            odd[i] += second * load<V>(rows + i * C + c + L);
        }
    }
    for (int i = 0; i < count; ++i) {
        A total = bias + sum_lanes<A>(even[i] + odd[i]);
        for (int64_t rest = c; rest < C; ++rest) total += weight[rest] * rows[i * C + rest];
        *query[i] = total;
    }
}

// direction[i][c] = sum_o query[i][o] weight[o][c] for first <= c < last and the images i < count. A strip of channels
// stays in registers while the rows of the weight go by.
template <typename A, int count>
inline void sum_rows(const A* weight, int64_t width, const A* query, int64_t first, int64_t last, int64_t C,
                     A* direction) {
    using V = typename VectorOf<A>::type;
    constexpr int64_t L = kVectorBytes / sizeof(A), S = count > 4 ? 2 : 4;
    int64_t c = first;
    for (; c + S * L <= last; c += S * L) {
        V total[count][S]{};
        for (int64_t o = 0; o < width; ++o) {
            // The first strip fetches whole rows; the hardware would see two lines of each.
            if (c == first && o + kAhead < width) prefetch_row(weight + (o + kAhead) * C + first, last - first);
            V row[S];
            for (int64_t v = 0; v < S; ++v) row[v] = load<V>(weight + o * C + c + v * L);
            for (int i = 0; i < count; ++i)
                for (int64_t v = 0; v < S; ++v) total[i][v] += query[i * width + o] * row[v];
        }
        for (int i = 0; i < count; ++i) std::memcpy(direction + i * C + c, total[i], sizeof(total[i]));
    }
    for (; c < last; ++c) {
        A total[count]{};
        for (int64_t o = 0; o < width; ++o)
            for (int i = 0; i < count; ++i) total[i] += query[i * width + o] * weight[o * C + c];
        for (int i = 0; i < count; ++i) direction[i * C + c] = total[i];
    }
}

template <int count, typename A>
inline void direct_images(const A* rows, const A* qkv_weight, const A* bias, int64_t width, int64_t C, A* query,
                          A* direction, int64_t strips) {
#pragma omp for schedule(static)
    for (int64_t o = 0; o < width; ++o) {
        A* out[count];
        for (int i = 0; i < count; ++i) out[i] = query + i * width + o;
        dot_rows<A, count>(qkv_weight + o * C, bias ? bias[o] : A(0), rows, C, out);
    }
#pragma omp for schedule(static)
    for (int64_t strip = 0; strip < strips; ++strip)
        sum_rows<A, count>(qkv_weight + width * C, width, query, C * strip / strips, C * (strip + 1) / strips, C,
                           direction);
}

// For a team of threads, all of which call it; on return direction is complete for each of them.
template <typename A>
inline void direct(const Shape& s, const Tokens& x, const Norm& norm, const A* qkv_weight, const A* bias, int64_t width,
                   A* query, A* direction, int threads) {
    A rows[kDirectionNumbers];
    int64_t count;
    for (int64_t b = 0; b < s.B; b += count) {
        count = s.B - b < kDirectionImages ? s.B - b : kDirectionImages;
        if (count * s.C > kDirectionNumbers) count = kDirectionNumbers / s.C;
        while (count & (count - 1)) count &= count - 1;  // the largest power of two
        for (int64_t i = 0; i < count; ++i) normalize(token_row<A>(x, b + i, 0), norm, rows + i * s.C, s.C);
        A *q = query + b * width, *u = direction + b * s.C;
        switch (count) {
            case 1: direct_images<1>(rows, qkv_weight, bias, width, s.C, q, u, threads); break;
            case 2: direct_images<2>(rows, qkv_weight, bias, width, s.C, q, u, threads); break;
            case 4: direct_images<4>(rows, qkv_weight, bias, width, s.C, q, u, threads); break;
            default: direct_images<kDirectionImages>(rows, qkv_weight, bias, width, s.C, q, u, threads);
        }
    }
}

inline Status cls_direction(DType dtype, Shape s, Tokens x, Norm norm, const void* qkv_weight, const void* qkv_bias,
                            int64_t width, void* query, void* direction, int threads) {
    if (dtype != DType::f32 && dtype != DType::f64) return Status::bad_dtype;
    return with_dtype(dtype, [&](auto element) {
        using A = acc_t<decltype(element)>;
#pragma omp parallel num_threads(threads)
        direct(s, x, norm, static_cast<const A*>(qkv_weight), static_cast<const A*>(qkv_bias), width,
               static_cast<A*>(query), static_cast<A*>(direction), threads);
        return Status::ok;
    });
}

}  // namespace idlevit::cpu::IDLEVIT_ISA
