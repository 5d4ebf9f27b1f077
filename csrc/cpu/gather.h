#pragma once

#include "rows.h"

namespace idlevit::cpu::IDLEVIT_ISA {

inline Status gather_tokens(DType dtype, Shape s, Tokens x, const int64_t* indices, void* out, int threads) {
    if (!valid_indices(indices, s)) return Status::bad_indices;
    return with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        const std::size_t bytes = static_cast<std::size_t>(s.C) * sizeof(T);
#pragma omp parallel for schedule(static) num_threads(threads) if (s.B * s.n * s.C >= kSerialElements)
        for (int64_t row = 0; row < s.B * s.n; ++row)
            std::memcpy(static_cast<T*>(out) + row * s.C, token_row<T>(x, row / s.n, indices[row]), bytes);
        return Status::ok;
    });
}

inline Status gather_add_norm(DType dtype, Shape s, Tokens x, const int64_t* indices, Branch branch, Norm norm,
                              void* tokens, void* normed, int threads) {
    if (!valid_indices(indices, s)) return Status::bad_indices;
    return with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        using A = acc_t<T>;
        [[maybe_unused]] const bool serial = s.B * s.n * s.C < kSerialElements;
#pragma omp parallel num_threads(threads) if (!serial)
        {
            A first[kBuffer<T>], second[kBuffer<T>];
#pragma omp for schedule(static)
            for (int64_t row = 0; row < s.B * s.n; ++row) {
                if ((row + 1) % s.n) prefetch_row(token_row<T>(x, row / s.n, indices[row + 1]), s.C);
                T* token = static_cast<T*>(tokens) + row * s.C;
                T* target = static_cast<T*>(normed) + row * s.C;
                A* sum = staging(token, first);
                const A* residual = widen(token_row<T>(x, row / s.n, indices[row]), first, s.C);
                const A* added = widen(static_cast<const T*>(branch.data) + row * s.C, second, s.C);
                add_branch(residual, added, branch, sum, s.C);
                narrow(sum, token, s.C);
                // The norm sees the tokens as they are stored, rounded to their type.
                A* values = staging(target, second);
                normalize(widen(token, first, s.C), norm, values, s.C);
                narrow(values, target, s.C);
            }
        }
        return Status::ok;
    });
}

}  // namespace idlevit::cpu::IDLEVIT_ISA
