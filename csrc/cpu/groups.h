#pragma once

#include "rows.h"

namespace idlevit::cpu::IDLEVIT_ISA {

inline bool valid_groups(const int64_t* groups, const Shape& s) {
    bool valid = true;
    for (int64_t i = 0; i < s.B * s.T; ++i) valid &= groups[i] >= -1 && groups[i] < s.n;
    return valid;
}

// The tokens of an image by group: those of group i are order[starts[i] .. starts[i + 1]), ascending. A group's sum
// then reads its rows in one order, whatever the number of threads. `starts` has n + 1 places.
inline void order_by_group(const int64_t* groups, int64_t T, int64_t n, std::int32_t* order, std::int32_t* starts) {
    std::memset(starts, 0, static_cast<std::size_t>(n + 1) * sizeof(*starts));
    for (int64_t t = 0; t < T; ++t)
        if (groups[t] >= 0) ++starts[groups[t]];
    std::int32_t sum = 0;
    for (int64_t i = 0; i < n; ++i) {
        sum += starts[i];
        starts[i] = sum;  // the end of group i; filling from behind moves it to the start
    }
    starts[n] = sum;
    for (int64_t t = T - 1; t >= 0; --t)
        if (groups[t] >= 0) order[--starts[groups[t]]] = static_cast<std::int32_t>(t);
}

// The sum of the rows tokens[0 .. count) of image b, in `total`; of a row alone the row itself is returned.
template <typename T>
inline const acc_t<T>* sum_rows_of(const Tokens& x, int64_t b, const std::int32_t* tokens, int64_t count,
                                   acc_t<T>* total, acc_t<T>* buffer, int64_t C) {
    using A = acc_t<T>;
    if (count == 1) return widen(token_row<T>(x, b, tokens[0]), buffer, C);
    if (count == 0) {
        std::memset(total, 0, static_cast<std::size_t>(C) * sizeof(A));
        return total;
    }
    const A* row = widen(token_row<T>(x, b, tokens[0]), buffer, C);
    std::memcpy(total, row, static_cast<std::size_t>(C) * sizeof(A));
    for (int64_t i = 1; i < count; ++i) {
        row = widen(token_row<T>(x, b, tokens[i]), buffer, C);
        IDLEVIT_SIMD
        for (int64_t c = 0; c < C; ++c) total[c] += row[c];
    }
    return total;
}

// body(row, b, members, count) for each of the B * n groups, after the tokens are ordered. For a team of threads.
template <typename Body>
inline void each_group(const Shape& s, const int64_t* groups, std::int32_t* workspace, Body body) {
    const int64_t numbers = s.T + s.n + 1;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < s.B; ++b)
        order_by_group(groups + b * s.T, s.T, s.n, workspace + b * numbers, workspace + b * numbers + s.T);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < s.B * s.n; ++row) {
        const int64_t b = row / s.n, i = row % s.n;
        const std::int32_t *order = workspace + b * numbers, *starts = order + s.T;
        body(row, b, order + starts[i], starts[i + 1] - starts[i]);
    }
}

inline Status gather_mean_norm(DType dtype, Shape s, Tokens x, const int64_t* groups, const void* sizes, Norm norm,
                               std::int32_t* workspace, void* tokens, void* normed, int threads) {
    if (!valid_groups(groups, s)) return Status::bad_indices;
    return with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        using A = acc_t<T>;
#pragma omp parallel num_threads(threads) if (s.B * s.T * s.C >= kSerialElements)
        {
            A total[kMaxChannels], buffer[kBuffer<T>];
            each_group(s, groups, workspace, [&](int64_t row, int64_t b, const std::int32_t* members, int64_t count) {
                T* token = static_cast<T*>(tokens) + row * s.C;
                T* target = static_cast<T*>(normed) + row * s.C;
                const A* sum = sum_rows_of<T>(x, b, members, count, total, buffer, s.C);
                const A factor = A(1) / static_cast<const A*>(sizes)[row];
                A* mean = staging(token, total);
                IDLEVIT_SIMD
                for (int64_t c = 0; c < s.C; ++c) mean[c] = sum[c] * factor;
                narrow(mean, token, s.C);
                A* values = staging(target, total);
                // The norm sees the tokens as they are stored, rounded to their type.
                normalize(widen(token, buffer, s.C), norm, values, s.C);
                narrow(values, target, s.C);
            });
        }
        return Status::ok;
    });
}

inline Status sum_groups(DType dtype, Shape s, Tokens x, const int64_t* groups, std::int32_t* workspace, void* out,
                         int threads) {
    if (!valid_groups(groups, s)) return Status::bad_indices;
    return with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        using A = acc_t<T>;
#pragma omp parallel num_threads(threads) if (s.B * s.T * s.C >= kSerialElements)
        {
            A buffer[kBuffer<T>];
            each_group(s, groups, workspace, [&](int64_t row, int64_t b, const std::int32_t* members, int64_t count) {
                A* target = static_cast<A*>(out) + row * s.C;
                narrow(sum_rows_of<T>(x, b, members, count, target, buffer, s.C), target, s.C);
            });
        }
        return Status::ok;
    });
}

inline Status expand_groups(DType dtype, Shape s, const void* tokens, const int64_t* groups, void* out, int threads) {
    if (!valid_groups(groups, s)) return Status::bad_indices;
    return with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        const std::size_t bytes = static_cast<std::size_t>(s.C) * sizeof(T);
#pragma omp parallel for schedule(static) num_threads(threads) if (s.B * s.T * s.C >= kSerialElements)
        for (int64_t row = 0; row < s.B * s.T; ++row) {
            T* target = static_cast<T*>(out) + row * s.C;
            if (groups[row] < 0)
                std::memset(target, 0, bytes);
            else
                std::memcpy(target, static_cast<const T*>(tokens) + (row / s.T * s.n + groups[row]) * s.C, bytes);
        }
        return Status::ok;
    });
}

inline Status follow_tokens(DType dtype, Shape s, Tokens x, const int64_t* groups, Branch first, Branch second,
                            void* out, int64_t out_batch_stride, int64_t out_token_stride, int threads) {
    if (!valid_groups(groups, s)) return Status::bad_indices;
    return with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        using A = acc_t<T>;
        const std::size_t bytes = static_cast<std::size_t>(s.C) * sizeof(T);
#pragma omp parallel num_threads(threads) if (s.B * s.T * s.C >= kSerialElements)
        {
            A factor1[kMaxChannels], factor2[kMaxChannels];
            const auto set = [&](const Branch& branch, A* factor) {
                const A* gamma = static_cast<const A*>(branch.gamma);
                for (int64_t c = 0; c < s.C; ++c) factor[c] = static_cast<A>(branch.scale) * (gamma ? gamma[c] : A(1));
            };
            set(first, factor1);
            set(second, factor2);
            A one[kBuffer<T>], two[kBuffer<T>], three[kBuffer<T>];
#pragma omp for schedule(static)
            for (int64_t row = 0; row < s.B * s.T; ++row) {
                const int64_t b = row / s.T, t = row % s.T;
                const T* token = token_row<T>(x, b, t);
                T* target = static_cast<T*>(out) + b * out_batch_stride + t * out_token_stride;
                if (groups[row] < 0) {
                    if (target != token) std::memcpy(target, token, bytes);
                    continue;
                }
                const int64_t leader = (b * s.n + groups[row]) * s.C;
                const A* added1 = widen(static_cast<const T*>(first.data) + leader, one, s.C);
                const A* added2 = widen(static_cast<const T*>(second.data) + leader, two, s.C);
                const A* before = widen(token, three, s.C);
                A* after = staging(target, three);
                IDLEVIT_SIMD
                for (int64_t c = 0; c < s.C; ++c)
                    after[c] = before[c] + (factor1[c] * added1[c] + factor2[c] * added2[c]);
                narrow(after, target, s.C);
            }
        }
        return Status::ok;
    });
}

}  // namespace idlevit::cpu::IDLEVIT_ISA
