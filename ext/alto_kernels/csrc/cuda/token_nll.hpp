// The loss of each row of logits and its gradient, in one launch that reads the row twice and writes it once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace alto::cuda {

// logits = softcap(scale z) of `rows` rows of z, [rows, vocabulary] in 16 bits, contiguous, 16 bytes aligned, the
// vocabulary a multiple of 8. softcap(x) = c tanh(x / c), with c 0: x. targets: [rows], each within the vocabulary.
// nll [rows] = log(sum exp(logits)) - logits[target], in fp32. With `wants_gradient` z is overwritten by d nll / d z.
struct TokenNllArguments {
    void* z;
    const std::int64_t* targets;
    float* nll;
    std::int64_t rows;
    std::int64_t vocabulary;
    float scale;
    float softcap;
    bool wants_gradient;
};

cudaError_t token_nll(const TokenNllArguments& arguments, bool is_float16, cudaStream_t stream);

}  // namespace alto::cuda
