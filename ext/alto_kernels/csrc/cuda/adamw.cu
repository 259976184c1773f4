#include <cuda_bf16.h>

#include "adamw.hpp"

namespace alto::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;            // of each buffer that a thread has on their way at once
constexpr int kStride = kThreads * 4;  // elements
static_assert(kAdamwBlock == kVectors * kStride);

// Sum over the thread block in a fixed order; the result is thread 0's.
__device__ double block_sum(double value) {
    __shared__ double by_warp[kThreads / 32];
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, offset);
    if (threadIdx.x % 32 == 0) by_warp[threadIdx.x / 32] = value;
    __syncthreads();
    double total = 0.0;
    if (threadIdx.x == 0)
        for (double part : by_warp) total += part;
    return total;
}

// A gradient's elements, one or four, as they lie in memory and in fp32.
__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ float widened(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float4 widened(float4 values) { return values; }
__device__ __forceinline__ float4 widened(uint2 values) {
    const float2 low = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&values.x));
    const float2 high = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&values.y));
    return {low.x, low.y, high.x, high.y};
}
template <typename Gradient>
struct FourOf;
template <>
struct FourOf<float> {
    using type = float4;
};
template <>
struct FourOf<__nv_bfloat16> {
    using type = uint2;
};
template <typename Gradient>
using Four = typename FourOf<Gradient>::type;

// A thread's part of the sum of squares of elements [begin, end). fp32 within its 16 elements, double beyond: the error
// stays below fp32 rounding of the norm.
template <typename Gradient>
__device__ __forceinline__ float squares(const Gradient* grad, std::int64_t begin, std::int64_t end, float scale) {
    float sum = 0.0f;
    if (reinterpret_cast<std::uintptr_t>(grad) % 16 == 0 && end - begin == kAdamwBlock) {
        Four<Gradient> vectors[kVectors];
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
            vectors[i] = *reinterpret_cast<const Four<Gradient>*>(grad + begin + i * kStride + threadIdx.x * 4);
#pragma unroll
        for (const Four<Gradient>& vector : vectors) {
            const float4 g = widened(vector);
            const float x = g.x * scale, y = g.y * scale, z = g.z * scale, w = g.w * scale;
            sum += x * x + y * y + z * z + w * w;
        }
    } else {
        for (std::int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
            const float g = widened(grad[i]) * scale;
            sum += g * g;
        }
    }
    return sum;
}

// Blocks (x) of an adapter (y); those beyond its size have nothing to do.
__global__ void square_kernel(AdamwArguments arguments) {
    const AdamwAdapter& adapter = arguments.adapters[blockIdx.y];
    const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kAdamwBlock;
    const std::int64_t end = min(begin + kAdamwBlock, adapter.count);
    if (begin >= end) return;
    const float sum = adapter.grad_is_bfloat16
                          ? squares(static_cast<const __nv_bfloat16*>(adapter.grad), begin, end, adapter.grad_scale)
                          : squares(static_cast<const float*>(adapter.grad), begin, end, adapter.grad_scale);
    const double total = block_sum(static_cast<double>(sum));
    if (threadIdx.x == 0) arguments.partial[adapter.first_block + blockIdx.x] = total;
}

// One block an adapter: its norm, whether it is finite, and the factor on its gradient.
__global__ void norm_kernel(AdamwArguments arguments) {
    const AdamwAdapter& adapter = arguments.adapters[blockIdx.x];
    const std::int64_t blocks = (adapter.count + kAdamwBlock - 1) / kAdamwBlock;
    double sum = 0.0;
    for (std::int64_t i = threadIdx.x; i < blocks; i += kThreads) sum += arguments.partial[adapter.first_block + i];
    const double total = block_sum(sum);
    if (threadIdx.x != 0) return;
    const double norm = sqrt(total);
    double factor = adapter.grad_scale;
    if (adapter.max_grad_norm > 0.0f) factor *= fmin(1.0, adapter.max_grad_norm / (norm + 1e-6));
    arguments.norm[blockIdx.x] = static_cast<float>(norm);
    arguments.finite[blockIdx.x] = isfinite(norm);
    arguments.factor[blockIdx.x] = static_cast<float>(factor);
}

struct Element {
    float param;
    float exp_avg;
    float exp_avg_sq;
};

__device__ __forceinline__ void update(Element& e, float grad, const AdamwAdapter& adapter, float factor, bool of_b) {
    const float g = grad * factor;
    e.exp_avg += adapter.one_minus_beta1 * (g - e.exp_avg);
    e.exp_avg_sq = e.exp_avg_sq * adapter.beta2 + adapter.one_minus_beta2 * (g * g);
    const float denominator = sqrtf(e.exp_avg_sq) * adapter.inverse_root_correction2 + adapter.eps;
    e.param = e.param * (of_b ? adapter.decay_b : adapter.decay) -
              (of_b ? adapter.step_size_b : adapter.step_size) * (e.exp_avg / denominator);
}

// A vector of each of an adapter's four buffers, read and written past the caches: nothing comes back to it.
template <typename Gradient>
struct Vectors {
    float4 param;
    float4 exp_avg;
    float4 exp_avg_sq;
    Four<Gradient> grad;
};

template <typename Gradient>
__device__ __forceinline__ Vectors<Gradient> load_vectors(const AdamwAdapter& adapter, const Gradient* grad,
                                                          std::int64_t at) {
    return {__ldcs(reinterpret_cast<const float4*>(adapter.param + at)),
            __ldcs(reinterpret_cast<const float4*>(adapter.exp_avg + at)),
            __ldcs(reinterpret_cast<const float4*>(adapter.exp_avg_sq + at)),
            __ldcs(reinterpret_cast<const Four<Gradient>*>(grad + at))};
}

template <typename Gradient>
__device__ __forceinline__ void store_vectors(const AdamwAdapter& adapter, std::int64_t at,
                                              const Vectors<Gradient>& vectors) {
    __stcs(reinterpret_cast<float4*>(adapter.param + at), vectors.param);
    __stcs(reinterpret_cast<float4*>(adapter.exp_avg + at), vectors.exp_avg);
    __stcs(reinterpret_cast<float4*>(adapter.exp_avg_sq + at), vectors.exp_avg_sq);
}

template <typename Gradient>
__device__ __forceinline__ void update(Vectors<Gradient>& v, const AdamwAdapter& adapter, float factor,
                                       std::int64_t at) {
    const float4 grad = widened(v.grad);
    Element e[4] = {{v.param.x, v.exp_avg.x, v.exp_avg_sq.x},
                    {v.param.y, v.exp_avg.y, v.exp_avg_sq.y},
                    {v.param.z, v.exp_avg.z, v.exp_avg_sq.z},
                    {v.param.w, v.exp_avg.w, v.exp_avg_sq.w}};
    update(e[0], grad.x, adapter, factor, at >= adapter.b_start);
    update(e[1], grad.y, adapter, factor, at + 1 >= adapter.b_start);
    update(e[2], grad.z, adapter, factor, at + 2 >= adapter.b_start);
    update(e[3], grad.w, adapter, factor, at + 3 >= adapter.b_start);
    v.param = {e[0].param, e[1].param, e[2].param, e[3].param};
    v.exp_avg = {e[0].exp_avg, e[1].exp_avg, e[2].exp_avg, e[3].exp_avg};
    v.exp_avg_sq = {e[0].exp_avg_sq, e[1].exp_avg_sq, e[2].exp_avg_sq, e[3].exp_avg_sq};
}

// Steps elements [begin, end) where the adapter's gradient is finite, and clears the gradient where that is wanted.
template <typename Gradient>
__device__ __forceinline__ void update_range(const AdamwAdapter& adapter, Gradient* grad, std::int64_t begin,
                                             std::int64_t end, bool finite, float factor, bool zero_grad) {
    const std::uintptr_t addresses =
        reinterpret_cast<std::uintptr_t>(adapter.param) | reinterpret_cast<std::uintptr_t>(grad) |
        reinterpret_cast<std::uintptr_t>(adapter.exp_avg) | reinterpret_cast<std::uintptr_t>(adapter.exp_avg_sq);
    if (finite && addresses % 16 == 0 && end - begin == kAdamwBlock) {
        // All loads before the first store, which could alias them for all that the compiler knows.
        const std::int64_t first = begin + threadIdx.x * 4;
        Vectors<Gradient> vectors[kVectors];
#pragma unroll
        for (int i = 0; i < kVectors; ++i) vectors[i] = load_vectors(adapter, grad, first + i * kStride);
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            update(vectors[i], adapter, factor, first + i * kStride);
            store_vectors(adapter, first + i * kStride, vectors[i]);
            if (zero_grad) __stcs(reinterpret_cast<Four<Gradient>*>(grad + first + i * kStride), Four<Gradient>{});
        }
        return;
    }
    for (std::int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
        if (finite) {
            Element e{adapter.param[at], adapter.exp_avg[at], adapter.exp_avg_sq[at]};
            update(e, widened(grad[at]), adapter, factor, at >= adapter.b_start);
            adapter.param[at] = e.param;
            adapter.exp_avg[at] = e.exp_avg;
            adapter.exp_avg_sq[at] = e.exp_avg_sq;
        }
        if (zero_grad) grad[at] = Gradient{};
    }
}

// Blocks in the opposite order of square_kernel: the last gradients that it read are still in the L2 cache.
__global__ void update_kernel(AdamwArguments arguments) {
    const int index = static_cast<int>(gridDim.y - 1 - blockIdx.y);
    const AdamwAdapter adapter = arguments.adapters[index];
    const std::int64_t begin = static_cast<std::int64_t>(gridDim.x - 1 - blockIdx.x) * kAdamwBlock;
    const std::int64_t end = min(begin + kAdamwBlock, adapter.count);
    if (begin >= end) return;
    const bool finite = arguments.finite[index];
    const float factor = arguments.factor[index];
    if (adapter.grad_is_bfloat16) {
        update_range(adapter, static_cast<__nv_bfloat16*>(adapter.grad), begin, end, finite, factor,
                     arguments.zero_grad);
    } else {
        update_range(adapter, static_cast<float*>(adapter.grad), begin, end, finite, factor, arguments.zero_grad);
    }
}

}  // namespace

cudaError_t adamw_step(const AdamwArguments& arguments, cudaStream_t stream) {
    const dim3 blocks(static_cast<unsigned>(arguments.most_blocks), static_cast<unsigned>(arguments.adapter_count));
    square_kernel<<<blocks, kThreads, 0, stream>>>(arguments);
    norm_kernel<<<arguments.adapter_count, kThreads, 0, stream>>>(arguments);
    update_kernel<<<blocks, kThreads, 0, stream>>>(arguments);
    return cudaGetLastError();
}

}  // namespace alto::cuda
