#pragma once

#include "rows.h"

namespace idlevit::cpu::IDLEVIT_ISA {

// Reads both weights once for each image, on all threads. For a few images that is the memory's speed; for many, a
// matrix product that reuses the weights is better.
inline Status cls_direction(DType dtype, Shape s, Tokens x, Norm norm, const void* qkv_weight, const void* qkv_bias,
                            int64_t width, void* query, void* direction, int threads) {
    if (dtype != DType::f32 && dtype != DType::f64) return Status::bad_dtype;
    return with_dtype(dtype, [&](auto element) {
        using A = acc_t<decltype(element)>;
        const A* query_weight = static_cast<const A*>(qkv_weight);
        const A* key_weight = query_weight + width * s.C;
        const A* bias = static_cast<const A*>(qkv_bias);
        const int64_t parts = threads;
#pragma omp parallel num_threads(threads)
        {
            A row[kMaxChannels];
            for (int64_t b = 0; b < s.B; ++b) {
                const A* cls = static_cast<const A*>(x.data) + b * x.batch_stride;
                A* q = static_cast<A*>(query) + b * width;
                A* u = static_cast<A*>(direction) + b * s.C;
                normalize(cls, norm, row, s.C);
#pragma omp for schedule(static)
                for (int64_t o = 0; o < width; ++o) {
                    const A* weight = query_weight + o * s.C;
                    q[o] = (bias ? bias[o] : A(0)) + sum<A>(s.C, [&](int64_t c, auto tag) {
                               using V = decltype(tag);
                               return load<V>(weight + c) * load<V>(row + c);
                           });
                }
                // The transposed product: each part owns a range of channels and walks down the rows.
#pragma omp for schedule(static)
                for (int64_t part = 0; part < parts; ++part) {
                    const int64_t first = s.C * part / parts, last = s.C * (part + 1) / parts;
                    for (int64_t c = first; c < last; ++c) u[c] = 0;
                    for (int64_t o = 0; o < width; ++o) {
                        const A* weight = key_weight + o * s.C;
                        const A factor = q[o];
                        IDLEVIT_SIMD
                        for (int64_t c = first; c < last; ++c) u[c] += factor * weight[c];
                    }
                }
            }
        }
        return Status::ok;
    });
}

}  // namespace idlevit::cpu::IDLEVIT_ISA
