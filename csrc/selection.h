// The arithmetic of selection: score order, the search for the smallest kept key, and where a kept token goes.
// Compiles for the host and for the device, so that every backend keeps the same tokens.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define IDLEVIT_INLINE __host__ __device__ __forceinline__
#else
// Always inlined: the linker would merge the copies that the CPU's instruction sets compile.
#define IDLEVIT_INLINE inline __attribute__((always_inline))
#endif

namespace idlevit {

// A score as an unsigned integer of the same order: NaN is 0, the smallest; adding zero makes -0 equal to +0.
IDLEVIT_INLINE std::uint32_t order_key(float score) {
    const float value = score + 0.0f;
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const std::uint32_t flip = (bits >> 31) ? 0xFFFFFFFFu : 0x80000000u;
    return score != score ? 0u : bits ^ flip;
}

IDLEVIT_INLINE std::uint64_t order_key(double score) {
    const double value = score + 0.0;
    std::uint64_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const std::uint64_t flip = (bits >> 63) ? ~std::uint64_t{0} : std::uint64_t{1} << 63;
    return score != score ? 0u : bits ^ flip;
}

// Which keys are the `keep` largest: all above `threshold`, and of those equal to it the first `ties`.
//
// The threshold is built bit by bit, highest first: a bit stays if at least `keep` keys are no smaller than the
// candidate. That needs no sort and no memory; the caller counts. It ends early once a candidate separates exactly
// `keep` keys, which takes about half of the bits where scores differ.
template <typename Key>
struct ThresholdSearch {
    std::int64_t keep;
    std::int64_t ties = keep;
    Key threshold = 0;
    int bit = 8 * static_cast<int>(sizeof(Key)) - 1;

    IDLEVIT_INLINE explicit ThresholdSearch(std::int64_t count) : keep(count) {}

    IDLEVIT_INLINE bool done() const { return bit < 0; }

    // Never 0, so a key of 0 is never counted.
    IDLEVIT_INLINE Key candidate() const { return threshold | Key{1} << bit; }

    // `count` keys are no smaller than the candidate.
    IDLEVIT_INLINE void advance(std::int64_t count) {
        if (count < keep) {
            ties = keep - count;
        } else {
            threshold = candidate();
            if (count == keep) {
                ties = keep;  // every key equal to this threshold is kept
                bit = 0;
            }
        }
        --bit;
    }

    // `equal_before` keys before this one equal the threshold.
    IDLEVIT_INLINE bool keeps(Key key, std::int64_t equal_before) const {
        return key > threshold || (key == threshold && equal_before < ties);
    }

    // The place of a kept key in the output, from the keys before it.
    IDLEVIT_INLINE std::int64_t position(std::int64_t above_before, std::int64_t equal_before) const {
        return above_before + (equal_before < ties ? equal_before : ties);
    }
};

}  // namespace idlevit
