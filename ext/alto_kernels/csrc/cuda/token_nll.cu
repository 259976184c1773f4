#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "lines.cuh"
#include "token_nll.hpp"

namespace alto::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

// The largest of some logits, and the sum of exp(logit - largest); what is not finite stays so.
struct Sum {
    float largest;
    float total;
};

__device__ __forceinline__ Sum together(Sum a, Sum b) {
    const float largest = fmaxf(a.largest, b.largest);
    // Of nothing yet: exp(-inf - -inf) would not be a number.
    const float of_a = a.largest == largest ? a.total : a.total * __expf(a.largest - largest);
    const float of_b = b.largest == largest ? b.total : b.total * __expf(b.largest - largest);
    return {largest, of_a + of_b};
}

__device__ Sum over_block(Sum sum) {
    __shared__ Sum of_warps[kWarps];
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2)
        sum = together(
            sum, {__shfl_xor_sync(0xffffffffu, sum.largest, step), __shfl_xor_sync(0xffffffffu, sum.total, step)});
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = sum;
    __syncthreads();
    sum = of_warps[0];
    for (int warp = 1; warp < kWarps; ++warp) sum = together(sum, of_warps[warp]);
    return sum;
}

struct Map {
    float scale;
    float softcap;

    __device__ __forceinline__ float logit(float z) const {
        const float scaled = scale * z;
        return softcap > 0.0f ? softcap * tanhf(scaled / softcap) : scaled;
    }
    // d logit / d z
    __device__ __forceinline__ float slope(float logit) const {
        if (softcap <= 0.0f) return scale;
        const float part = logit / softcap;
        return scale * (1.0f - part * part);
    }
};

template <typename Element>
__global__ void __launch_bounds__(kThreads) token_nll_kernel(TokenNllArguments arguments) {
    const std::int64_t row = blockIdx.x;
    const std::int64_t start = row * arguments.vocabulary;
    const Map map{arguments.scale, arguments.softcap};
    const auto target = arguments.targets[row];
    const float target_logit = map.logit(static_cast<float>(static_cast<const Element*>(arguments.z)[start + target]));

    Sum sum{-INFINITY, 0.0f};
    for (std::int64_t at = threadIdx.x * kLine; at < arguments.vocabulary; at += kThreads * kLine) {
        float logits[kLine];
        load<Element>(logits, arguments.z, start + at);
        float largest = -INFINITY, total = 0.0f;
#pragma unroll
        for (int i = 0; i < kLine; ++i) {
            logits[i] = map.logit(logits[i]);
            largest = fmaxf(largest, logits[i]);
        }
        // A logit may be -inf, and all of a line.
        const float base = largest == -INFINITY ? 0.0f : largest;
#pragma unroll
        for (int i = 0; i < kLine; ++i) total += __expf(logits[i] - base);
        sum = together(sum, {largest, total});
    }
    sum = over_block(sum);  // after its barrier nobody reads the target's logit from z any more
    if (threadIdx.x == 0) arguments.nll[row] = logf(sum.total) + sum.largest - target_logit;
    if (!arguments.wants_gradient) return;

    const float factor = 1.0f / sum.total;
    for (std::int64_t at = threadIdx.x * kLine; at < arguments.vocabulary; at += kThreads * kLine) {
        float values[kLine];
        load<Element>(values, arguments.z, start + at);
#pragma unroll
        for (int i = 0; i < kLine; ++i) {
            const float logit = map.logit(values[i]);
            const float probability = __expf(logit - sum.largest) * factor;
            values[i] = (at + i == target ? probability - 1.0f : probability) * map.slope(logit);
        }
        store<Element>(arguments.z, start + at, values);
    }
}

}  // namespace

cudaError_t token_nll(const TokenNllArguments& arguments, bool is_float16, cudaStream_t stream) {
    if (arguments.rows == 0) return cudaSuccess;
    const auto kernel = is_float16 ? token_nll_kernel<__half> : token_nll_kernel<__nv_bfloat16>;
    kernel<<<static_cast<unsigned>(arguments.rows), kThreads, 0, stream>>>(arguments);
    return cudaGetLastError();
}

}  // namespace alto::cuda
