#pragma once

#include "../selection.h"
#include "direction.h"
#include "score.h"

namespace idlevit::cpu::IDLEVIT_ISA {

// The `keep` largest of N scores: a pass over the scores for each step of the search, then one that writes the indices
// in order.
template <typename A>
inline void select_image(const A* scores, int64_t N, int64_t keep, int64_t prefix, int64_t* out) {
    using Key = decltype(order_key(A{}));
    ThresholdSearch<Key> search(keep);
    while (!search.done()) {
        const Key candidate = search.candidate();
        std::int32_t count = 0;
        IDLEVIT_SIMD_SUM(count)
        for (int64_t j = 0; j < N; ++j) count += order_key(scores[j]) >= candidate ? 1 : 0;
        search.advance(count);
    }
    for (int64_t p = 0; p < prefix; ++p) *out++ = p;
    int64_t equal = 0;
    for (int64_t j = 0; j < N; ++j) {
        const Key key = order_key(scores[j]);
        if (search.keeps(key, equal)) *out++ = prefix + j;
        equal += key == search.threshold;
    }
}

template <typename A>
inline void select_row(const A* scores, const Shape& s, int64_t prefix, int64_t b, int64_t* indices) {
    select_image(scores + b * s.T + prefix, s.T - prefix, s.n - prefix, prefix, indices + b * s.n);
}

inline Status select_tokens(DType dtype, Shape s, int64_t prefix, const void* scores, int64_t* indices, int threads) {
    if (dtype != DType::f32 && dtype != DType::f64) return Status::bad_dtype;
    return with_dtype(dtype, [&](auto element) {
        using A = acc_t<decltype(element)>;
#pragma omp parallel for schedule(static) num_threads(threads) if (s.B * s.T >= kSerialElements / 32)
        for (int64_t b = 0; b < s.B; ++b) select_row(static_cast<const A*>(scores), s, prefix, b, indices);
        return Status::ok;
    });
}

template <typename T>
inline void normalize_token(const Shape& s, const Tokens& x, int64_t row, const Norm& norm, const int64_t* indices,
                            T* normed, acc_t<T>* in, acc_t<T>* out) {
    if ((row + 1) % s.n) prefetch_row(token_row<T>(x, row / s.n, indices[row + 1]), s.C);
    T* target = normed + row * s.C;
    acc_t<T>* values = staging(target, out);
    normalize(widen(token_row<T>(x, row / s.n, indices[row]), in, s.C), norm, values, s.C);
    narrow(values, target, s.C);
}

// For a team of threads.
template <typename T>
inline void select_and_normalize(const Shape& s, int64_t prefix, const Tokens& x, const acc_t<T>* scores,
                                 const Norm& norm, int64_t* indices, T* normed) {
#pragma omp for schedule(static)
    for (int64_t b = 0; b < s.B; ++b) select_row(scores, s, prefix, b, indices);
    acc_t<T> in[kBuffer<T>], out[kBuffer<T>];
#pragma omp for schedule(static)
    for (int64_t row = 0; row < s.B * s.n; ++row) normalize_token(s, x, row, norm, indices, normed, in, out);
}

// Both, image by image: the tokens that were scored are still in the cache when they are gathered.
template <typename A>
inline void score_select_and_normalize(const Shape& s, int64_t prefix, const Tokens& x, const A* direction,
                                       const Norm& norm, A* scores, int64_t* indices, A* normed) {
    Image<A> image;
    A none[1];
#pragma omp for schedule(static)
    for (int64_t b = 0; b < s.B; ++b) {
        image.set(direction + b * s.C, norm, s.C);
        for (int64_t t = 0; t < s.T; ++t)
            scores[b * s.T + t] = score_row(token_row<A>(x, b, t), image.v, image.offset, norm.eps, s.C);
        select_row(scores, s, prefix, b, indices);
        for (int64_t i = 0; i < s.n; ++i) normalize_token(s, x, b * s.n + i, norm, indices, normed, none, none);
    }
}

inline Status select_gather_norm(DType dtype, Shape s, int64_t prefix, Tokens x, const void* scores, Norm norm,
                                 int64_t* indices, void* normed, int threads) {
    return with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        [[maybe_unused]] const bool serial = s.B * s.n * s.C < kSerialElements;
#pragma omp parallel num_threads(threads) if (!serial)
        select_and_normalize<T>(s, prefix, x, static_cast<const acc_t<T>*>(scores), norm, indices,
                                static_cast<T*>(normed));
        return Status::ok;
    });
}

inline Status cls_select_gather_norm(DType dtype, Shape s, int64_t prefix, Tokens x, Norm norm, const void* qkv_weight,
                                     const void* qkv_bias, int64_t width, void* workspace, int64_t* indices,
                                     void* normed, int threads) {
    if (dtype != DType::f32 && dtype != DType::f64) return Status::bad_dtype;
    return with_dtype(dtype, [&](auto element) {
        using A = acc_t<decltype(element)>;
        A* query = static_cast<A*>(workspace);
        A* direction = query + s.B * width;
        A* scores = direction + s.B * s.C;
#pragma omp parallel num_threads(threads)
        {
            direct(s, x, norm, static_cast<const A*>(qkv_weight), static_cast<const A*>(qkv_bias), width, query,
                   direction, threads);
            if (s.B % threads == 0 && s.B > 1) {
                score_select_and_normalize(s, prefix, x, direction, norm, scores, indices, static_cast<A*>(normed));
            } else {
                score_tokens<A>(s, x, direction, norm, scores);
                select_and_normalize<A>(s, prefix, x, scores, norm, indices, static_cast<A*>(normed));
            }
        }
        return Status::ok;
    });
}

}  // namespace idlevit::cpu::IDLEVIT_ISA
