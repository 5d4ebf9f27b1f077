// Every kernel of this package, on raw pointers: no framework types, no allocation, no Python.
//
// Notation: B images, T tokens (P prefix tokens first, then N = T - P image tokens), C channels,
// K kept image tokens, n = P + K. Strides count elements; channels are always contiguous.
// `accumulate type`: float for f32, f16 and bf16; double for f64. Parameters (norm weight and bias,
// layer scale, direction) and scores have the accumulate type, tokens have `dtype`.
// `indices` is int64 [B, n], strictly ascending in each image, every value in [0, T).
#pragma once

#include <cstdint>

namespace idlevit {

using std::int64_t;

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

// The accumulate type of the type of a token.
template <typename T>
struct Accumulate {
    using type = float;
};
template <>
struct Accumulate<double> {
    using type = double;
};
template <typename T>
using acc_t = typename Accumulate<T>::type;

enum class Status : int {
    ok = 0,
    bad_indices = 1,  // an index is outside [0, T), the indices of an image are not strictly ascending, or a group is
                      // outside [-1, n)
    bad_dtype = 2,
};

// The widest row a kernel converts in its stack buffers.
constexpr int64_t kMaxChannels = 8192;

// x: [B, T, C] with strides (batch, token, 1).
struct Tokens {
    const void* data;
    int64_t batch_stride;
    int64_t token_stride;
};

// LayerNorm over the C channels; weight and bias are [C] or null.
struct Norm {
    const void* weight;
    const void* bias;
    double eps;
};

// A residual branch, contiguous [B, n, C]: adds scale * gamma * data; gamma is [C] or null; data may be null.
struct Branch {
    const void* data;
    const void* gamma;
    double scale;
};

struct Shape {
    int64_t B, T, n, C;
};

namespace cpu {

// One table of kernels per instruction set; each entry uses at most `threads` OpenMP threads.
struct Kernels {
    const char* name;

    // direction[b] = W_k^T (W_q LN(x[b, 0]) + b_q), [B, C], with W_q and W_k the first two blocks of `width` rows of
    // qkv_weight [3 * width, C] and b_q the first of qkv_bias (or null). f32 and f64 only, C <= kMaxChannels;
    // query [B, width] receives W_q LN(x[b, 0]) + b_q.
    Status (*cls_direction)(DType dtype, Shape shape, Tokens x, Norm norm, const void* qkv_weight, const void* qkv_bias,
                            int64_t width, void* query, void* direction, int threads);

    // scores[b, t] = LN(x[b, t]) . direction[b];  direction: [B, C], scores: [B, T], both accumulate type.
    Status (*token_scores)(DType dtype, Shape shape, Tokens x, const void* direction, Norm norm, void* scores,
                           int threads);

    // indices[b] = 0..P-1, then the n - P image tokens of image b with the largest scores, ascending.
    // Equal scores go to the lower index (-0 equals +0), NaN ranks below -inf. scores: contiguous [B, T];
    // dtype is the scores' own: f32 or f64.
    Status (*select_tokens)(DType dtype, Shape shape, int64_t prefix, const void* scores, int64_t* indices,
                            int threads);

    // select_tokens, then normed[b, i] = LN(x[b, indices[b, i]]), contiguous [B, n, C].
    Status (*select_gather_norm)(DType dtype, Shape shape, int64_t prefix, Tokens x, const void* scores, Norm norm,
                                 int64_t* indices, void* normed, int threads);

    // cls_direction, token_scores and select_gather_norm as one parallel region: a few images are done before the
    // threads of three regions would have met. f32 and f64 only; workspace: B * (width + C + T) numbers.
    Status (*cls_select_gather_norm)(DType dtype, Shape shape, int64_t prefix, Tokens x, Norm norm,
                                     const void* qkv_weight, const void* qkv_bias, int64_t width, void* workspace,
                                     int64_t* indices, void* normed, int threads);

    // out[b, i] = x[b, indices[b, i]], contiguous [B, n, C].
    Status (*gather_tokens)(DType dtype, Shape shape, Tokens x, const int64_t* indices, void* out, int threads);

    // tokens[b, i] = x[b, indices[b, i]] + branch[b, i];  normed = LN(tokens); both contiguous [B, n, C].
    Status (*gather_add_norm)(DType dtype, Shape shape, Tokens x, const int64_t* indices, Branch branch, Norm norm,
                              void* tokens, void* normed, int threads);

    // out[b, indices[b, i]] = tokens[b, i] + branch[b, i]; tokens is contiguous [B, n, C]. Every other row of out
    // is the row of x, or zero where x.data is null, or left alone where x.data is out. out: [B, T, C] with
    // strides (out_batch_stride, out_token_stride, 1). Nothing is written when the indices are bad.
    Status (*scatter_tokens)(DType dtype, Shape shape, Tokens x, const int64_t* indices, const void* tokens,
                             Branch branch, void* out, int64_t out_batch_stride, int64_t out_token_stride, int threads);

    // Idle tokens that follow. features: [B, N, d], accumulate type, contiguous, unit vectors; padding: bool [B, N], or
    // null; groups: int64 [B, T], of each token a place in [0, n) or -1 (follows nobody); sizes: [B, n], accumulate
    // type. The reference of each says what it computes.

    // features[b, j] = LN(x[b, P + j]) projection, made a unit vector; projection: [C, d], accumulate type.
    Status (*project_tokens)(DType dtype, Shape shape, int64_t prefix, Tokens x, Norm norm, const void* projection,
                             int64_t d, void* features, int threads);

    // indices[b] of tokens that differ from one another, and, unless groups is null, what assign_tokens would say of
    // them. dtype is that of features: f32 or f64. memory: threads * spread_memory bytes, aligned to 64.
    Status (*select_spread)(DType dtype, Shape shape, int64_t prefix, const void* features, int64_t d,
                            const bool* padding, void* memory, int64_t* indices, int64_t* groups, void* sizes,
                            int threads);

    // groups and sizes of the representatives at indices.
    Status (*assign_tokens)(DType dtype, Shape shape, int64_t prefix, const void* features, int64_t d,
                            const int64_t* indices, const bool* padding, void* memory, int64_t* groups, void* sizes,
                            int threads);

    int64_t (*spread_memory)(DType dtype, int64_t N, int64_t d);

    // tokens[b, i] = the sum of group i over sizes[b, i]; normed = LN(tokens); both contiguous [B, n, C].
    // workspace, here and below: int32 [B, T + n + 1].
    Status (*gather_mean_norm)(DType dtype, Shape shape, Tokens x, const int64_t* groups, const void* sizes, Norm norm,
                               std::int32_t* workspace, void* tokens, void* normed, int threads);

    // out[b, t] = x[b, t] + first[b, groups[b, t]] + second[b, groups[b, t]]; may write where x lies.
    Status (*follow_tokens)(DType dtype, Shape shape, Tokens x, const int64_t* groups, Branch first, Branch second,
                            void* out, int64_t out_batch_stride, int64_t out_token_stride, int threads);

    // out[b, i] = the sum of group i, contiguous [B, n, C], accumulate type.
    Status (*sum_groups)(DType dtype, Shape shape, Tokens x, const int64_t* groups, std::int32_t* workspace, void* out,
                         int threads);

    // out[b, t] = tokens[b, groups[b, t]], zero for -1; both contiguous.
    Status (*expand_groups)(DType dtype, Shape shape, const void* tokens, const int64_t* groups, void* out,
                            int threads);
};

// The best table this processor runs, or the one set_instruction_set chose.
const Kernels& kernels();

// Chooses a table by name; false if there is no such table or this processor cannot run it.
bool set_instruction_set(const char* name);

// The i-th table this processor runs, best last; null past the end.
const Kernels* available(int i);

}  // namespace cpu

namespace cuda {

// The widest row that a block holds in registers.
constexpr int64_t kMaxChannels = 4096;

// The same ops on device pointers. Parameters have the dtype `parameters`: that of the tokens or their accumulate type.
// Each launches on `stream` (a cudaStream_t) of `device`, waits for nothing and allocates nothing, so a CUDA graph can
// capture it. Each returns null, or the message of the error. Index values are not checked on the host: a kernel that
// would read or write outside [0, T) stops with an error.
struct Launch {
    int device;
    std::uintptr_t stream;
};

const char* token_scores(DType dtype, DType parameters, Shape shape, Tokens x, const void* direction, Norm norm,
                         void* scores, Launch launch);

const char* select_tokens(DType dtype, Shape shape, int64_t prefix, const void* scores, int64_t* indices,
                          Launch launch);

const char* select_gather_norm(DType dtype, DType parameters, Shape shape, int64_t prefix, Tokens x, const void* scores,
                               Norm norm, int64_t* indices, void* normed, Launch launch);

const char* gather_tokens(DType dtype, Shape shape, Tokens x, const int64_t* indices, void* out, Launch launch);

const char* gather_add_norm(DType dtype, DType parameters, Shape shape, Tokens x, const int64_t* indices, Branch branch,
                            Norm norm, void* tokens, void* normed, Launch launch);

const char* scatter_tokens(DType dtype, DType parameters, Shape shape, Tokens x, const int64_t* indices,
                           const void* tokens, Branch branch, void* out, int64_t out_batch_stride,
                           int64_t out_token_stride, Launch launch);

// Null if the device can run the kernels of this build, else the reason.
const char* unusable(int device);

}  // namespace cuda
}  // namespace idlevit
