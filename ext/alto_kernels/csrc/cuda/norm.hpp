// RMSNorm, with the sum before it and the sum after its gradient, a launch each way. 16-bit in and out, fp32 between.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace alto::cuda {

constexpr int kWidestNorm = 16384;

// Of `rows` rows of `width` elements, a multiple of 8 of at most kWidestNorm, contiguous and 16 bytes aligned.
struct NormShape {
    std::int64_t rows;
    int width;
};

// sum = x + y, rounded, or x itself where y is null; out = sum / rms * weight with rms = sqrt(mean of squares +
// epsilon).
struct NormArguments {
    NormShape shape;
    const void* x;
    const void* y;
    const void* weight;
    void* sum;  // not written where y is null
    void* out;
    float epsilon;
};

cudaError_t rms_norm(const NormArguments& arguments, bool is_float16, cudaStream_t stream);

// The gradient of sum, from that of out, whose place it may take, and, unless null, another that it has besides. 1 /
// rms is found again from rows that are read anyway: keeping it would cost a tensor.
struct NormGradientArguments {
    NormShape shape;
    const void* gradient;
    const void* sum;
    const void* weight;
    const void* beside;
    void* sum_gradient;
    float epsilon;
};

cudaError_t rms_norm_backward(const NormGradientArguments& arguments, bool is_float16, cudaStream_t stream);

}  // namespace alto::cuda
