#include "adamw.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bfloat16.hpp"
#include "thread_pool.hpp"
#include "vectorised.hpp"

namespace alto::cpu {
namespace {

constexpr std::int64_t kBlock = 1 << 15;

struct Constants {
    float grad_factor;
    float decay;
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    float root_correction2;
    float eps;
    float step_size;
};

ALTO_VECTORISED
void widen(const Bfloat16* from, std::int64_t count, float* to) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = widened(from[i]);
}

std::int64_t gradient_bytes(const AdapterStep& adapter) {
    return adapter.grad_is_bfloat16 ? sizeof(Bfloat16) : sizeof(float);
}

// The gradient's elements [first, last) in fp32: where they lie, or in `scratch`.
const float* gradient(const AdapterStep& adapter, std::int64_t first, std::int64_t last, std::vector<float>& scratch) {
    if (!adapter.grad_is_bfloat16) return static_cast<const float*>(adapter.grad) + first;
    scratch.resize(static_cast<std::size_t>(last - first));
    widen(static_cast<const Bfloat16*>(adapter.grad) + first, last - first, scratch.data());
    return scratch.data();
}

ALTO_VECTORISED
double sum_of_squares(const float* grad, std::int64_t count, float scale) {
    double total = 0.0;
    for (std::int64_t i = 0; i < count; ++i) {
        const double g = static_cast<double>(grad[i] * scale);
        total += g * g;
    }
    return total;
}

ALTO_VECTORISED
void update(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, std::int64_t count,
            const Constants& c) {
    for (std::int64_t i = 0; i < count; ++i) {
        const float g = grad[i] * c.grad_factor;
        const float m = exp_avg[i] + c.one_minus_beta1 * (g - exp_avg[i]);
        const float v = exp_avg_sq[i] * c.beta2 + c.one_minus_beta2 * (g * g);
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        const float denominator = std::sqrt(v) / c.root_correction2 + c.eps;
        param[i] = param[i] * c.decay - c.step_size * (m / denominator);
    }
}

// `grad` is that of element `first`.
void update_range(const AdapterStep& adapter, const float* grad, std::int64_t first, std::int64_t last, double lr,
                  double grad_factor) {
    if (first >= last) return;
    const double step = static_cast<double>(adapter.step);
    const double correction1 = 1.0 - std::pow(adapter.beta1, step);
    const double correction2 = 1.0 - std::pow(adapter.beta2, step);
    const Constants c{static_cast<float>(grad_factor),         static_cast<float>(1.0 - lr * adapter.weight_decay),
                      static_cast<float>(1.0 - adapter.beta1), static_cast<float>(adapter.beta2),
                      static_cast<float>(1.0 - adapter.beta2), static_cast<float>(std::sqrt(correction2)),
                      static_cast<float>(adapter.eps),         static_cast<float>(lr / correction1)};
    update(adapter.param + first, grad, adapter.exp_avg + first, adapter.exp_avg_sq + first, last - first, c);
}

}  // namespace

std::vector<StepOutcome> adamw_step(const std::vector<AdapterStep>& adapters, bool zero_grad, int threads) {
    struct Block {
        std::size_t adapter;
        std::int64_t first;
        std::int64_t last;
    };
    std::vector<Block> blocks;
    for (std::size_t i = 0; i < adapters.size(); ++i)
        for (std::int64_t at = 0; at < adapters[i].count; at += kBlock)
            blocks.push_back({i, at, std::min(at + kBlock, adapters[i].count)});

    // Sums of fixed blocks, added in order: the norm does not depend on the number of threads.
    std::vector<double> partial(blocks.size());
    parallel_for(static_cast<std::int64_t>(blocks.size()), threads, [&](std::int64_t task) {
        const Block& block = blocks[static_cast<std::size_t>(task)];
        const AdapterStep& adapter = adapters[block.adapter];
        std::vector<float> scratch;
        const float* grad = gradient(adapter, block.first, block.last, scratch);
        partial[static_cast<std::size_t>(task)] =
            sum_of_squares(grad, block.last - block.first, static_cast<float>(adapter.grad_scale));
    });
    std::vector<double> squares(adapters.size(), 0.0);
    for (std::size_t i = 0; i < blocks.size(); ++i) squares[blocks[i].adapter] += partial[i];

    std::vector<StepOutcome> outcomes(adapters.size());
    std::vector<double> factors(adapters.size());
    for (std::size_t i = 0; i < adapters.size(); ++i) {
        const double norm = std::sqrt(squares[i]);
        outcomes[i].grad_norm = static_cast<float>(norm);
        outcomes[i].finite = std::isfinite(norm);
        factors[i] = adapters[i].grad_scale;
        if (adapters[i].max_grad_norm > 0.0) factors[i] *= std::min(1.0, adapters[i].max_grad_norm / (norm + 1e-6));
    }

    parallel_for(static_cast<std::int64_t>(blocks.size()), threads, [&](std::int64_t task) {
        const Block& block = blocks[static_cast<std::size_t>(task)];
        const AdapterStep& adapter = adapters[block.adapter];
        if (outcomes[block.adapter].finite) {
            const std::int64_t middle = std::clamp(adapter.b_start, block.first, block.last);
            std::vector<float> scratch;
            const float* grad = gradient(adapter, block.first, block.last, scratch);
            update_range(adapter, grad, block.first, middle, adapter.lr, factors[block.adapter]);
            update_range(adapter, grad + (middle - block.first), middle, block.last, adapter.lr_b,
                         factors[block.adapter]);
        }
        const std::int64_t bytes = gradient_bytes(adapter);
        if (zero_grad)
            std::memset(static_cast<char*>(adapter.grad) + block.first * bytes, 0,
                        static_cast<std::size_t>((block.last - block.first) * bytes));
    });
    return outcomes;
}

}  // namespace alto::cpu
