#pragma once

#include "rows.h"

namespace idlevit::cpu::IDLEVIT_ISA {

// The first of the ascending values in [first, last) that is not below t. Not std::lower_bound: a template of the
// standard library would be merged across instruction sets by the linker.
inline const int64_t* first_not_below(const int64_t* first, const int64_t* last, int64_t t) {
    while (first != last) {
        const int64_t* middle = first + (last - first) / 2;
        if (*middle < t)
            first = middle + 1;
        else
            last = middle;
    }
    return first;
}

inline Status scatter_tokens(DType dtype, Shape s, Tokens x, const int64_t* indices, const void* tokens, Branch branch,
                             void* out, int64_t out_batch_stride, int64_t out_token_stride, int threads) {
    if (!valid_indices(indices, s)) return Status::bad_indices;
    return with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        using A = acc_t<T>;
        const std::size_t bytes = static_cast<std::size_t>(s.C) * sizeof(T);
        const auto out_row = [&](int64_t b, int64_t t) {
            return static_cast<T*>(out) + b * out_batch_stride + t * out_token_stride;
        };
        const auto write_kept = [&](int64_t row, T* target, A* first, A* second) {
            const T* token = static_cast<const T*>(tokens) + row * s.C;
            if (!branch.data) {
                std::memcpy(target, token, bytes);
                return;
            }
            A* sum = staging(target, first);
            const A* added = widen(static_cast<const T*>(branch.data) + row * s.C, second, s.C);
            add_branch(widen(token, first, s.C), added, branch, sum, s.C);
            narrow(sum, target, s.C);
        };
        const bool in_place = x.data == out;
        [[maybe_unused]] const bool serial = s.B * s.T * s.C < kSerialElements;
#pragma omp parallel num_threads(threads) if (!serial)
        {
            A first[kBuffer<T>], second[kBuffer<T>];
            if (in_place) {
#pragma omp for schedule(static)
                for (int64_t row = 0; row < s.B * s.n; ++row)
                    write_kept(row, out_row(row / s.n, indices[row]), first, second);
            } else {
                // Every row of out once, in order. `next` walks the image's ascending indices beside it.
                int64_t image = -1;
                const int64_t *next = nullptr, *end = nullptr;
#pragma omp for schedule(static)
                for (int64_t row = 0; row < s.B * s.T; ++row) {
                    const int64_t b = row / s.T, t = row % s.T;
                    if (b != image) {
                        image = b;
                        end = indices + (b + 1) * s.n;
                        next = first_not_below(indices + b * s.n, end, t);
                    }
                    if (next != end && *next == t)
                        write_kept(next++ - indices, out_row(b, t), first, second);
                    else if (x.data)
                        std::memcpy(out_row(b, t), token_row<T>(x, b, t), bytes);
                    else
                        std::memset(out_row(b, t), 0, bytes);
                }
            }
        }
        return Status::ok;
    });
}

}  // namespace idlevit::cpu::IDLEVIT_ISA
