// What every CPU kernel does with one row of C channels. Compiled once per instruction set, so everything is in the
// namespace of that instruction set.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "../tokens.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define IDLEVIT_SIMD _Pragma("omp simd")
#define IDLEVIT_SIMD_SUM(...) _Pragma(IDLEVIT_STRING(omp simd reduction(+ : __VA_ARGS__)))
#define IDLEVIT_STRING(x) #x

namespace idlevit::cpu::IDLEVIT_ISA {

// Below this many elements a parallel region costs more than it saves.
constexpr int64_t kSerialElements = 16384;

struct Half {
    std::uint16_t bits;
};
struct BFloat16 {
    std::uint16_t bits;
};

inline float bits_to_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

inline std::uint32_t float_to_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

inline float to_float(BFloat16 x) { return bits_to_float(static_cast<std::uint32_t>(x.bits) << 16); }

inline BFloat16 to_bfloat16(float value) {
    const std::uint32_t bits = float_to_bits(value);
    const std::uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);  // to nearest, ties to even
    const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    return {static_cast<std::uint16_t>(is_nan ? 0x7FC0u : rounded >> 16)};
}

// IEEE half without hardware support: scaling by powers of two lets the float unit do normalisation and rounding.
inline float to_float(Half x) {
    const std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7FFFu) << 13;
    const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
    const float scaled = bits_to_float(magnitude) * bits_to_float(0x77800000u);  // * 2^112: rebiases the exponent
    const bool special = magnitude >= 0x0F800000u;                               // inf or NaN
    const std::uint32_t bits = special ? (magnitude | 0x7F800000u) : float_to_bits(scaled);
    return bits_to_float(bits | sign);
}

inline Half to_half(float value) {
    const std::uint32_t bits = float_to_bits(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return {static_cast<std::uint16_t>(sign | 0x7E00u)};   // NaN
    if (magnitude >= 0x477FF000u) return {static_cast<std::uint16_t>(sign | 0x7C00u)};  // rounds to inf
    if (magnitude < 0x38800000u) {
        // Subnormal half: adding 0.5 aligns the mantissa so that the float unit rounds to nearest even.
        const std::uint32_t shifted = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3F000000u;
        return {static_cast<std::uint16_t>(sign | shifted)};
    }
    const std::uint32_t rounded = magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u);
    return {static_cast<std::uint16_t>(sign | (rounded >> 13))};
}

// widen: the row as accumulate type; the row itself where it already is.
inline const float* widen(const float* row, float*, int64_t) { return row; }
inline const double* widen(const double* row, double*, int64_t) { return row; }

inline const float* widen(const BFloat16* row, float* buffer, int64_t C) {
    IDLEVIT_SIMD
    for (int64_t c = 0; c < C; ++c) buffer[c] = to_float(row[c]);
    return buffer;
}

inline const float* widen(const Half* row, float* buffer, int64_t C) {
    int64_t c = 0;
#if defined(__F16C__)
    for (; c + 8 <= C; c += 8)
        _mm256_storeu_ps(buffer + c, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + c))));
#endif
    for (; c < C; ++c) buffer[c] = to_float(row[c]);
    return buffer;
}

// narrow: writes the row in the tokens' type.
inline void narrow(const float* values, float* row, int64_t C) {
    if (values != row) std::memcpy(row, values, static_cast<std::size_t>(C) * sizeof(float));
}
inline void narrow(const double* values, double* row, int64_t C) {
    if (values != row) std::memcpy(row, values, static_cast<std::size_t>(C) * sizeof(double));
}

inline void narrow(const float* values, BFloat16* row, int64_t C) {
    IDLEVIT_SIMD
    for (int64_t c = 0; c < C; ++c) row[c] = to_bfloat16(values[c]);
}

inline void narrow(const float* values, Half* row, int64_t C) {
    int64_t c = 0;
#if defined(__F16C__)
    for (; c + 8 <= C; c += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(row + c),
                         _mm256_cvtps_ph(_mm256_loadu_ps(values + c), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; c < C; ++c) row[c] = to_half(values[c]);
}

// Where a row of accumulate type can be built: the destination itself, or a buffer to narrow from.
inline float* staging(float* row, float*) { return row; }
inline double* staging(double* row, double*) { return row; }
inline float* staging(BFloat16*, float* buffer) { return buffer; }
inline float* staging(Half*, float* buffer) { return buffer; }

template <typename T>
constexpr int64_t kBuffer = std::is_same_v<T, acc_t<T>> ? 1 : kMaxChannels;

// The widest vector of the instruction set, in the vector extension of GCC and Clang.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
template <typename A>
struct VectorOf {
    typedef A type __attribute__((vector_size(kVectorBytes)));
};

template <typename V, typename A>
inline V load(const A* address) {
    V value;
    std::memcpy(&value, address, sizeof(V));
    return value;
}

// The sum of a vector's lanes, by halves: one after another, the additions would take longer than a row of terms.
template <typename A, typename V>
inline A sum_lanes(V value) {
    constexpr int64_t L = sizeof(V) / sizeof(A);
    A lanes[L];
    std::memcpy(lanes, &value, sizeof(V));
    for (int64_t half = L / 2; half > 0; half /= 2)
        for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    return lanes[0];
}

// Sum over c of term(c, tag), where tag is a vector (term returns the sum's terms c, c+1, ...) or a scalar. Four
// independent partial sums hide the latency of the adder; a plain loop would wait for each addition.
template <typename A, typename Term>
inline A sum(int64_t C, Term term) {
    using V = typename VectorOf<A>::type;
    constexpr int64_t L = kVectorBytes / sizeof(A);
    V s0{}, s1{}, s2{}, s3{};
    int64_t c = 0;
    for (; c + 4 * L <= C; c += 4 * L) {
        s0 += term(c, V{});
        s1 += term(c + L, V{});
        s2 += term(c + 2 * L, V{});
        s3 += term(c + 3 * L, V{});
    }
    for (; c + L <= C; c += L) s0 += term(c, V{});
    A total = sum_lanes<A>((s0 + s1) + (s2 + s3));
    for (; c < C; ++c) total += term(c, A{});
    return total;
}

template <typename A>
struct Moments {
    A mean, rstd;
};

// Two passes over a row that lies in the first-level cache: no cancellation, no extra memory traffic.
template <typename A>
inline Moments<A> moments(const A* row, int64_t C, double eps) {
    const A mean = sum<A>(C, [&](int64_t c, auto tag) { return load<decltype(tag)>(row + c); }) / static_cast<A>(C);
    const A square = sum<A>(C, [&](int64_t c, auto tag) {
        const auto centred = load<decltype(tag)>(row + c) - mean;
        return centred * centred;
    });
    return {mean, A(1) / std::sqrt(square / static_cast<A>(C) + static_cast<A>(eps))};
}

template <typename A>
inline void normalize(const A* row, const Norm& norm, A* out, int64_t C) {
    const auto [mean, rstd] = moments(row, C, norm.eps);
    const A* weight = static_cast<const A*>(norm.weight);
    const A* bias = static_cast<const A*>(norm.bias);
    if (weight && bias) {
        IDLEVIT_SIMD
        for (int64_t c = 0; c < C; ++c) out[c] = (row[c] - mean) * rstd * weight[c] + bias[c];
    } else if (weight) {
        IDLEVIT_SIMD
        for (int64_t c = 0; c < C; ++c) out[c] = (row[c] - mean) * rstd * weight[c];
    } else {
        IDLEVIT_SIMD
        for (int64_t c = 0; c < C; ++c) out[c] = (row[c] - mean) * rstd + (bias ? bias[c] : A(0));
    }
}

// out = row + scale * gamma * branch
template <typename A>
inline void add_branch(const A* row, const A* branch, const Branch& spec, A* out, int64_t C) {
    const A* gamma = static_cast<const A*>(spec.gamma);
    const A scale = static_cast<A>(spec.scale);
    if (gamma) {
        IDLEVIT_SIMD
        for (int64_t c = 0; c < C; ++c) out[c] = row[c] + scale * gamma[c] * branch[c];
    } else {
        IDLEVIT_SIMD
        for (int64_t c = 0; c < C; ++c) out[c] = row[c] + scale * branch[c];
    }
}

// Asks for a row that is needed soon: gathered rows are out of the hardware prefetcher's reach, and it stops at pages.
template <typename T>
inline void prefetch_row(const T* row, int64_t C) {
    constexpr int64_t step = 64 / sizeof(T);
    for (int64_t c = 0; c < C; c += step) __builtin_prefetch(row + c);
}

template <typename T>
inline const T* token_row(const Tokens& x, int64_t b, int64_t t) {
    return static_cast<const T*>(x.data) + b * x.batch_stride + t * x.token_stride;
}

// Calls f with a value of the tokens' element type.
template <typename F>
inline Status with_dtype(DType dtype, F&& f) {
    switch (dtype) {
        case DType::f32: return f(float{});
        case DType::f64: return f(double{});
        case DType::f16: return f(Half{});
        case DType::bf16: return f(BFloat16{});
    }
    return Status::bad_dtype;
}

// True if the indices of every image ascend strictly inside [0, T). A few nanoseconds a row, and it makes every
// later access safe.
inline bool valid_indices(const int64_t* indices, const Shape& s) {
    bool valid = true;
    for (int64_t b = 0; b < s.B; ++b) {
        int64_t previous = -1;
        for (int64_t i = 0; i < s.n; ++i) {
            const int64_t t = indices[b * s.n + i];
            valid &= t > previous;
            previous = t;
        }
        valid &= previous < s.T;
    }
    return valid;
}

}  // namespace idlevit::cpu::IDLEVIT_ISA
