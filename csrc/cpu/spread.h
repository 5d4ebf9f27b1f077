#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "../selection.h"
#include "rows.h"

namespace idlevit::cpu::IDLEVIT_ISA {

// As the reference defines them: up to kExact tokens are chosen one at a time, more in rounds after as many that are
// evenly spaced. kPadding and kChosen lie above every similarity.
constexpr int64_t kExact = 16, kRounds = 4;
constexpr int kPadding = 100000, kChosen = 1000000;

// Rows that are compared at once with a tile of tokens.
#if defined(__AVX512F__)
constexpr int kCompared = 8;
#else
constexpr int kCompared = 4;
#endif

template <typename A>
struct IndexOf {
    using type = std::int32_t;
};
template <>
struct IndexOf<double> {
    using type = std::int64_t;
};

// A loop of a team of threads, or of one thread alone; all threads of a team meet at its end.
template <bool team, typename Body>
inline void each(int64_t count, Body body) {
    if constexpr (team) {
#pragma omp for schedule(static, 1)
        for (int64_t i = 0; i < count; ++i) body(i);
    } else {
        for (int64_t i = 0; i < count; ++i) body(i);
    }
}

template <bool team, typename Body>
inline void once(Body body) {
    if constexpr (team) {
#pragma omp single
        body();
    } else {
        body();
    }
}

// Ascending by key, equal ones in their order: a radix sort, a byte at a time. `keys` and `places` hold two halves of
// `count` each, the second for moving; the result is in the half that is returned.
template <typename Key>
inline const std::int32_t* sort_places(Key* keys, std::int32_t* places, int64_t count) {
    Key *from = keys, *to = keys + count;
    std::int32_t *from_places = places, *to_places = places + count;
    for (std::size_t shift = 0; shift < 8 * sizeof(Key); shift += 8) {
        std::int32_t starts[256] = {};
        for (int64_t i = 0; i < count; ++i) ++starts[from[i] >> shift & 255];
        if (count && starts[from[0] >> shift & 255] == count) continue;  // one byte for all
        std::int32_t sum = 0;
        for (auto& start : starts) {
            const std::int32_t here = start;
            start = sum;
            sum += here;
        }
        for (int64_t i = 0; i < count; ++i) {
            const std::int32_t target = starts[from[i] >> shift & 255]++;
            to[target] = from[i];
            to_places[target] = from_places[i];
        }
        Key* const keys_were = from;
        std::int32_t* const places_were = from_places;
        from = to, to = keys_were;
        from_places = to_places, to_places = places_were;
    }
    return from_places;
}

// What choosing or assigning needs to know of an image. Tokens lie in tiles of two vectors, dimension after dimension,
// so that one row is compared with a whole tile by multiplying vectors.
template <typename A>
struct Crowd {
    using V = typename VectorOf<A>::type;
    using Index = typename IndexOf<A>::type;
    typedef Index I __attribute__((vector_size(kVectorBytes)));
    using Key = decltype(order_key(A{}));
    static constexpr int64_t L = kVectorBytes / sizeof(A), W = 2 * L;

    int64_t N, d, tiles;
    A *tokens, *rows, *candidates, *candidate_rows;  // [tiles, d, W], [N, d], and the same of candidates
    A *nearest, *measure;                            // [tiles * W]
    Index* closest;                                  // [tiles * W], the token that is nearest
    Key* keys;                                       // [2 * N]
    std::int32_t *places, *picks, *ranks;            // [2 * N], [N], [N]

    // Bytes of memory that an image needs; a multiple of 64.
    static int64_t bytes(int64_t N, int64_t d) {
        const int64_t tiles = (N + W - 1) / W, padded = tiles * W;
        const int64_t numbers = 4 * padded * d + 2 * padded + padded + 2 * padded + 4 * padded;
        return (numbers * static_cast<int64_t>(sizeof(A)) + 63) / 64 * 64;
    }

    Crowd(void* memory, int64_t count, int64_t dimensions) : N(count), d(dimensions), tiles((count + W - 1) / W) {
        const int64_t padded = tiles * W;
        tokens = static_cast<A*>(memory);
        rows = tokens + padded * d;
        candidates = rows + padded * d;
        candidate_rows = candidates + padded * d;
        nearest = candidate_rows + padded * d;
        measure = nearest + padded;
        closest = reinterpret_cast<Index*>(measure + padded);
        keys = reinterpret_cast<Key*>(closest + padded);
        places = reinterpret_cast<std::int32_t*>(keys + 2 * padded);
        picks = places + 2 * padded;
        ranks = picks + padded;
    }

    // Of unit vectors nothing changes; of others no similarity is as large as kPadding.
    static A in_bounds(A value) {
        const A limited = value > A(1) ? A(1) : value < A(-1) ? A(-1) : value;
        return value - value == A(0) ? limited : A(0);
    }

    static void copy_row(const A* from, A* to, int64_t d) {
        IDLEVIT_SIMD
        for (int64_t k = 0; k < d; ++k) to[k] = in_bounds(from[k]);
    }

    // A tile from the rows `row(0)`, `row(1)`, ...; places past the end are zero.
    template <typename Row>
    void fill_tile(A* tile, int64_t first, int64_t count, Row row) const {
        for (int64_t lane = 0; lane < W; ++lane) {
            if (first + lane < count) {
                const A* from = row(first + lane);
                for (int64_t k = 0; k < d; ++k) tile[k * W + lane] = in_bounds(from[k]);
            } else {
                for (int64_t k = 0; k < d; ++k) tile[k * W + lane] = A(0);
            }
        }
    }

    // dot[i][v]: products of compared[i] with the vector v of a tile.
    void compare(const A* tile, const A* const (&compared)[kCompared], V (&dot)[kCompared][2]) const {
        for (int i = 0; i < kCompared; ++i) dot[i][0] = dot[i][1] = V{};
        for (int64_t k = 0; k < d; ++k) {
            const V first = load<V>(tile + k * W), second = load<V>(tile + k * W + L);
            for (int i = 0; i < kCompared; ++i) {
                dot[i][0] += compared[i][k] * first;
                dot[i][1] += compared[i][k] * second;
            }
        }
    }

    template <bool team>
    void begin(const A* features, const bool* padding) const {
        each<team>(tiles, [&](int64_t t) {
            fill_tile(tokens + t * W * d, t * W, N, [&](int64_t j) { return features + j * d; });
            for (int64_t j = t * W; j < (t + 1) * W; ++j) {
                nearest[j] = A(j < N && padding && padding[j] ? kPadding : -kChosen);
                closest[j] = 0;
            }
        });
    }

    // The tokens picks[0 .. count) are compared with all: nearest and closest, of equal ones the first. Their rows
    // are in `rows`.
    template <bool team>
    void meet(int64_t count) const {
        each<team>(tiles, [&](int64_t t) {
            V best[2], dot[kCompared][2];
            I who[2];
            std::memcpy(best, nearest + t * W, sizeof(best));
            std::memcpy(who, closest + t * W, sizeof(who));
            for (int64_t p = 0; p < count; p += kCompared) {
                const A* compared[kCompared];
                for (int64_t i = 0; i < kCompared; ++i) compared[i] = rows + (p + i < count ? p + i : p) * d;
                compare(tokens + t * W * d, compared, dot);
                for (int64_t i = 0; i < kCompared; ++i) {
                    const Index token = picks[p + i < count ? p + i : p];
                    for (int v = 0; v < 2; ++v) {
                        const auto nearer = (dot[i][v] > best[v]) | ((dot[i][v] == best[v]) & (token < who[v]));
                        best[v] = nearer ? dot[i][v] : best[v];
                        who[v] = nearer ? I{} + token : who[v];
                    }
                }
            }
            std::memcpy(nearest + t * W, best, sizeof(best));
            std::memcpy(closest + t * W, who, sizeof(who));
        });
    }

    template <bool team>
    void choose(const A* features, int64_t count) const {
        each<team>((count + W - 1) / W, [&](int64_t t) {
            for (int64_t p = t * W; p < count && p < (t + 1) * W; ++p)
                copy_row(features + picks[p] * d, rows + p * d, d);
        });
        meet<team>(count);
        once<team>([&] {
            for (int64_t p = 0; p < count; ++p) nearest[picks[p]] = A(kChosen);
        });
    }

    // Into `measure`: of each candidate the greater of nearest and its similarity to the candidates before it.
    template <bool team>
    void compare_candidates(const A* features, const std::int32_t* order, int64_t count) const {
        const int64_t needed = (count + W - 1) / W;
        each<team>(needed, [&](int64_t t) {
            fill_tile(candidates + t * W * d, t * W, count, [&](int64_t j) { return features + order[j] * d; });
            for (int64_t j = t * W; j < count && j < (t + 1) * W; ++j)
                copy_row(features + order[j] * d, candidate_rows + j * d, d);
        });
        each<team>(needed, [&](int64_t back) {
            const int64_t t = needed - 1 - back;  // the last tile has the most candidates before it
            V best[2], dot[kCompared][2];
            I lane[2];
            for (int64_t j = 0; j < W; ++j) {
                const bool there = t * W + j < count;
                measure[t * W + j] = there ? nearest[order[t * W + j]] : A(kChosen);
                reinterpret_cast<Index*>(lane)[j] = static_cast<Index>(t * W + j);
            }
            std::memcpy(best, measure + t * W, sizeof(best));
            const int64_t before = (t + 1) * W < count ? (t + 1) * W : count;
            for (int64_t p = 0; p < before; p += kCompared) {
                const A* compared[kCompared];
                for (int64_t i = 0; i < kCompared; ++i) compared[i] = candidate_rows + (p + i < before ? p + i : p) * d;
                compare(candidates + t * W * d, compared, dot);
                for (int64_t i = 0; i < kCompared; ++i) {
                    const Index who = static_cast<Index>(p + i < before ? p + i : p);
                    for (int v = 0; v < 2; ++v) {
                        const auto counts = (dot[i][v] > best[v]) & (lane[v] > who);
                        best[v] = counts ? dot[i][v] : best[v];
                    }
                }
            }
            std::memcpy(measure + t * W, best, sizeof(best));
        });
    }

    // The places of `count` values, ascending by value, then by place.
    const std::int32_t* sorted(const A* values, int64_t count) const {
        for (int64_t i = 0; i < count; ++i) {
            keys[i] = order_key(values[i]);
            places[i] = static_cast<std::int32_t>(i);
        }
        return sort_places(keys, places, count);
    }

    // `count` picks, evenly spaced among the tokens that are no padding.
    void pick_evenly(const bool* padding, int64_t count) const {
        int64_t real = 0, rest = 0;
        for (int64_t j = 0; j < N; ++j) real += !(padding && padding[j]);
        for (int64_t j = 0, next = 0; j < N; ++j)
            places[padding && padding[j] ? real + rest++ : next++] = static_cast<std::int32_t>(j);
        if (real < count) real = count;
        for (int64_t i = 0; i < count; ++i) picks[i] = places[(2 * i + 1) * real / (2 * count)];
    }

    // Chooses K tokens: nearest is kChosen where one is chosen.
    template <bool team>
    void spread(const A* features, const bool* padding, int64_t K) const {
        begin<team>(features, padding);
        if (K == N) {
            once<team>([&] {
                for (int64_t j = 0; j < N; ++j) nearest[j] = A(kChosen);
            });
            return;
        }
        if (K <= kExact) {
            for (int64_t i = 0; i < K; ++i) {
                once<team>([&] {
                    int64_t least = 0;
                    for (int64_t j = 1; j < N; ++j)
                        if (nearest[j] < nearest[least]) least = j;
                    picks[0] = static_cast<std::int32_t>(least);
                });
                choose<team>(features, 1);
            }
            return;
        }
        once<team>([&] { pick_evenly(padding, kExact); });
        choose<team>(features, kExact);
        int64_t left = K - kExact;
        for (int64_t rounds = kRounds; rounds > 0 && left > 0; --rounds) {
            const int64_t m = (left + rounds - 1) / rounds, unchosen = N - K + left;
            const int64_t count = 2 * m < unchosen ? 2 * m : unchosen;
            once<team>([&] {
                const std::int32_t* order = sorted(nearest, N);
                std::memcpy(ranks, order, static_cast<std::size_t>(count) * sizeof(*ranks));
            });
            compare_candidates<team>(features, ranks, count);
            once<team>([&] {
                const std::int32_t* best = sorted(measure, count);
                for (int64_t i = 0; i < m; ++i) picks[i] = ranks[best[i]];
            });
            choose<team>(features, m);
            left -= m;
        }
    }

    // indices [n] of the chosen tokens, ascending after the prefix tokens; ranks: their places, 0 of all others.
    void write_indices(int64_t prefix, int64_t* indices) const {
        for (int64_t p = 0; p < prefix; ++p) *indices++ = p;
        std::int32_t place = 0;
        for (int64_t j = 0; j < N; ++j) {
            const bool representative = nearest[j] == A(kChosen);
            ranks[j] = representative ? place++ : 0;
            if (representative) *indices++ = prefix + j;
        }
    }

    // All tokens meet the K given ones, of which padding is met by none.
    template <bool team>
    void gather(const A* features, const bool* padding, const int64_t* indices, int64_t prefix, int64_t K) const {
        begin<team>(features, nullptr);
        once<team>([&] {
            std::memset(ranks, 0, static_cast<std::size_t>(N) * sizeof(*ranks));
            std::int32_t real = 0;
            for (int64_t i = 0; i < K; ++i) {
                const int64_t token = indices[i] - prefix;
                ranks[token] = static_cast<std::int32_t>(i);
                if (!(padding && padding[token])) picks[real++] = static_cast<std::int32_t>(token);
            }
            places[0] = real;
        });
        choose<team>(features, places[0]);
        once<team>([&] {
            for (int64_t i = 0; i < K; ++i) nearest[indices[i] - prefix] = A(kChosen);
        });
    }

    // groups [T] and sizes [n]; nearest is kChosen at a representative, ranks is its place.
    void write_groups(const bool* padding, int64_t prefix, int64_t n, int64_t* groups, A* sizes) const {
        for (int64_t i = 0; i < n; ++i) sizes[i] = A(i < prefix ? 1 : 0);
        for (int64_t p = 0; p < prefix; ++p) groups[p] = p;
        for (int64_t j = 0; j < N; ++j) {
            const bool representative = nearest[j] == A(kChosen);
            const int64_t group = prefix + ranks[representative ? j : closest[j]];
            const bool follows = representative || !(padding && padding[j]);
            groups[prefix + j] = follows ? group : -1;
            if (follows) sizes[group] += A(1);
        }
    }
};

// Bytes of memory that select_spread and assign_tokens need for each thread.
inline int64_t spread_memory(DType dtype, int64_t N, int64_t d) {
    return dtype == DType::f64 ? Crowd<double>::bytes(N, d) : Crowd<float>::bytes(N, d);
}

// Runs body(b, crowd, team) for each image: images beside one another where there are enough of them, else all threads
// on each image in turn; team is a std::bool_constant that says which. A team meets some 25 times an image, each of
// which may wait for a thread that another process has pushed aside: two or three threads would not gain what that can
// cost.
template <typename A, typename Body>
inline void each_crowd(const Shape& s, int64_t N, int64_t K, int64_t d, void* memory, int threads, Body body) {
    const int64_t bytes = Crowd<A>::bytes(N, d);
    if (threads >= 4 && 2 * s.B <= threads && N * K * d >= 32 * kSerialElements) {
        const Crowd<A> crowd(memory, N, d);
#pragma omp parallel num_threads(threads)
        for (int64_t b = 0; b < s.B; ++b) body(b, crowd, std::true_type{});
        return;
    }
    [[maybe_unused]] const bool serial = s.B * N * K * d < 2 * kSerialElements;
#pragma omp parallel num_threads(threads) if (!serial)
    {
#if defined(_OPENMP)
        const int thread = omp_get_thread_num();
#else
        const int thread = 0;
#endif
        const Crowd<A> crowd(static_cast<char*>(memory) + thread * bytes, N, d);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < s.B; ++b) body(b, crowd, std::false_type{});
    }
}

inline Status select_spread(DType dtype, Shape s, int64_t prefix, const void* features, int64_t d, const bool* padding,
                            void* memory, int64_t* indices, int64_t* groups, void* sizes, int threads) {
    if (dtype != DType::f32 && dtype != DType::f64) return Status::bad_dtype;
    return with_dtype(dtype, [&](auto element) {
        using A = acc_t<decltype(element)>;
        const int64_t N = s.T - prefix, K = s.n - prefix;
        each_crowd<A>(s, N, K, d, memory, threads, [&](int64_t b, const Crowd<A>& crowd, auto team) {
            const bool* pads = padding ? padding + b * N : nullptr;
            crowd.template spread<team>(static_cast<const A*>(features) + b * N * d, pads, K);
            once<team>([&] {
                crowd.write_indices(prefix, indices + b * s.n);
                if (groups) crowd.write_groups(pads, prefix, s.n, groups + b * s.T, static_cast<A*>(sizes) + b * s.n);
            });
        });
        return Status::ok;
    });
}

inline Status assign_tokens(DType dtype, Shape s, int64_t prefix, const void* features, int64_t d,
                            const int64_t* indices, const bool* padding, void* memory, int64_t* groups, void* sizes,
                            int threads) {
    if (dtype != DType::f32 && dtype != DType::f64) return Status::bad_dtype;
    if (!valid_indices(indices, s)) return Status::bad_indices;
    for (int64_t b = 0; b < s.B; ++b)
        for (int64_t p = 0; p < prefix; ++p)
            if (indices[b * s.n + p] != p) return Status::bad_indices;
    return with_dtype(dtype, [&](auto element) {
        using A = acc_t<decltype(element)>;
        const int64_t N = s.T - prefix, K = s.n - prefix;
        each_crowd<A>(s, N, K, d, memory, threads, [&](int64_t b, const Crowd<A>& crowd, auto team) {
            const A* tokens = static_cast<const A*>(features) + b * N * d;
            const bool* pads = padding ? padding + b * N : nullptr;
            crowd.template gather<team>(tokens, pads, indices + b * s.n + prefix, prefix, K);
            once<team>(
                [&] { crowd.write_groups(pads, prefix, s.n, groups + b * s.T, static_cast<A*>(sizes) + b * s.n); });
        });
        return Status::ok;
    });
}

}  // namespace idlevit::cpu::IDLEVIT_ISA
