// AdamW in fp32 over the flat buffers of many adapters, whose gradients may be bf16: three launches, whatever their
// number.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace alto::cuda {

constexpr std::int64_t kAdamwBlock = 1 << 12;  // elements that one thread block takes

struct alignas(16) AdamwAdapter {
    float* param;
    void* grad;  // fp32, or bf16 where `grad_is_bfloat16`
    float* exp_avg;
    float* exp_avg_sq;
    std::int64_t count;
    std::int64_t b_start;
    std::int64_t first_block;  // where in `partial` its ceil(count / kAdamwBlock) blocks have their sums
    float grad_scale;
    float max_grad_norm;  // 0: not clipped
    float decay;          // 1 - lr weight_decay, for A and for B
    float decay_b;
    float step_size;  // lr / (1 - beta1^step)
    float step_size_b;
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    float inverse_root_correction2;  // 1 / sqrt(1 - beta2^step)
    float eps;
    std::int32_t grad_is_bfloat16;
};

// `partial` [blocks] double and `factor` [adapters] are scratch; `norm` [adapters] and `finite` [adapters] are results.
struct AdamwArguments {
    const AdamwAdapter* adapters;
    double* partial;
    float* factor;
    float* norm;
    bool* finite;
    int adapter_count;
    int most_blocks;  // of any adapter
    bool zero_grad;
};

cudaError_t adamw_step(const AdamwArguments& arguments, cudaStream_t stream);

}  // namespace alto::cuda
