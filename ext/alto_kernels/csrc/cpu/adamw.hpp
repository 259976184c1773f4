// AdamW in fp32 over the flat buffers of many adapters, whose gradients may be bf16.
#pragma once

#include <cstdint>
#include <vector>

namespace alto::cpu {

struct AdapterStep {
    float* param = nullptr;         // all four: [count]
    void* grad = nullptr;           // fp32, or
    bool grad_is_bfloat16 = false;  // bf16
    float* exp_avg = nullptr;
    float* exp_avg_sq = nullptr;
    std::int64_t count = 0;
    std::int64_t b_start = 0;  // elements from here on take lr_b
    std::int64_t step = 1;     // this step's number, from 1
    double lr = 0.0;
    double lr_b = 0.0;
    double beta1 = 0.9;
    double beta2 = 0.999;
    double eps = 1e-8;
    double weight_decay = 0.0;
    double max_grad_norm = 0.0;  // 0: no clipping
    double grad_scale = 1.0;     // the gradient is multiplied by this before anything else
};

struct StepOutcome {
    float grad_norm = 0.0f;  // after grad_scale, before clipping
    bool finite = true;      // false: nothing of this adapter was changed
};

// Steps every adapter as torch.optim.AdamW would, each by itself; zeroes the gradients afterwards when asked.
std::vector<StepOutcome> adamw_step(const std::vector<AdapterStep>& adapters, bool zero_grad, int threads);

}  // namespace alto::cpu
