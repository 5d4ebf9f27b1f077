// csrc/cuda for the host, with the C names and the arguments of the binding; and the selection arithmetic alone.
#include "emulator.h"
//
#include "cuda/gather.cu"
#include "cuda/scatter.cu"
#include "cuda/score.cu"
#include "cuda/select.cu"

using namespace idlevit;
using idlevit::cuda::Launch;

#define TOKENS const void *x, int64_t x_batch, int64_t x_token
#define SHAPE int64_t B, int64_t T, int64_t n, int64_t C
#define NORM const void *weight, const void *bias, double eps
#define BRANCH const void *branch, const void *gamma, double scale
#define LAUNCH int64_t device, std::uintptr_t stream
#define DTYPE(code) static_cast<DType>(code)
#define TO \
    Launch { static_cast<int>(device), stream }

extern "C" {

const char* cuda_token_scores(int64_t dtype, int64_t parameters, SHAPE, TOKENS, const void* direction, NORM,
                              void* scores, LAUNCH) {
    return cuda::token_scores(DTYPE(dtype), DTYPE(parameters), {B, T, n, C}, {x, x_batch, x_token}, direction,
                              {weight, bias, eps}, scores, TO);
}

const char* cuda_select_tokens(int64_t dtype, SHAPE, int64_t prefix, const void* scores, int64_t* indices, LAUNCH) {
    return cuda::select_tokens(DTYPE(dtype), {B, T, n, C}, prefix, scores, indices, TO);
}

const char* cuda_select_gather_norm(int64_t dtype, int64_t parameters, SHAPE, int64_t prefix, TOKENS,
                                    const void* scores, NORM, int64_t* indices, void* normed, LAUNCH) {
    return cuda::select_gather_norm(DTYPE(dtype), DTYPE(parameters), {B, T, n, C}, prefix, {x, x_batch, x_token},
                                    scores, {weight, bias, eps}, indices, normed, TO);
}

const char* cuda_gather_tokens(int64_t dtype, SHAPE, TOKENS, const int64_t* indices, void* out, LAUNCH) {
    return cuda::gather_tokens(DTYPE(dtype), {B, T, n, C}, {x, x_batch, x_token}, indices, out, TO);
}

const char* cuda_gather_add_norm(int64_t dtype, int64_t parameters, SHAPE, TOKENS, const int64_t* indices, BRANCH, NORM,
                                 void* tokens, void* normed, LAUNCH) {
    return cuda::gather_add_norm(DTYPE(dtype), DTYPE(parameters), {B, T, n, C}, {x, x_batch, x_token}, indices,
                                 {branch, gamma, scale}, {weight, bias, eps}, tokens, normed, TO);
}

const char* cuda_scatter_tokens(int64_t dtype, int64_t parameters, SHAPE, TOKENS, const int64_t* indices,
                                const void* tokens, BRANCH, void* out, int64_t out_batch, int64_t out_token, LAUNCH) {
    return cuda::scatter_tokens(DTYPE(dtype), DTYPE(parameters), {B, T, n, C}, {x, x_batch, x_token}, indices, tokens,
                                {branch, gamma, scale}, out, out_batch, out_token, TO);
}

void emulator_set_descending(int64_t descending) { emulator::descending = descending != 0; }
int64_t emulator_device() { return emulator::current_device; }
int64_t emulator_launches() { return emulator::launches; }
std::uintptr_t emulator_stream() { return reinterpret_cast<std::uintptr_t>(emulator::last_stream); }

void order_keys_f32(const float* scores, int64_t N, std::uint32_t* keys) {
    for (int64_t j = 0; j < N; ++j) keys[j] = order_key(scores[j]);
}
void order_keys_f64(const double* scores, int64_t N, std::uint64_t* keys) {
    for (int64_t j = 0; j < N; ++j) keys[j] = order_key(scores[j]);
}

// Writes the kept j in order and returns the number of steps of the search.
int64_t select_f32(const float* scores, int64_t N, int64_t keep, int64_t* kept) {
    ThresholdSearch<std::uint32_t> search(keep);
    int64_t steps = 0;
    for (; !search.done(); ++steps) {
        const std::uint32_t candidate = search.candidate();
        search.advance(std::count_if(scores, scores + N, [&](float s) { return order_key(s) >= candidate; }));
    }
    int64_t above = 0, equal = 0;
    for (int64_t j = 0; j < N; ++j) {
        const std::uint32_t key = order_key(scores[j]);
        if (search.keeps(key, equal)) kept[search.position(above, equal)] = j;
        above += key > search.threshold;
        equal += key == search.threshold;
    }
    return steps;
}

}  // extern "C"
