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

// Blocks (x) of an adapter (y); those beyond its size have nothing to do.
__global__ void square_kernel(AdamwArguments arguments) {
    const AdamwAdapter& adapter = arguments.adapters[blockIdx.y];
    const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kAdamwBlock;
    const std::int64_t end = min(begin + kAdamwBlock, adapter.count);
    if (begin >= end) return;
    const float scale = adapter.grad_scale;
    // fp32 within a thread's 16 elements, double beyond: the error stays below fp32 rounding of the norm.
    float sum = 0.0f;
    const bool aligned = reinterpret_cast<std::uintptr_t>(adapter.grad) % 16 == 0;
    if (aligned && end - begin == kAdamwBlock) {
        float4 vectors[kVectors];
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
            vectors[i] = *reinterpret_cast<const float4*>(adapter.grad + begin + i * kStride + threadIdx.x * 4);
#pragma unroll
        for (const float4& g : vectors) {
            const float x = g.x * scale, y = g.y * scale, z = g.z * scale, w = g.w * scale;
            sum += x * x + y * y + z * z + w * w;
        }
    } else {
        for (std::int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
            const float g = adapter.grad[i] * scale;
            sum += g * g;
        }
    }
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
struct Vectors {
    float4 param;
    float4 exp_avg;
    float4 exp_avg_sq;
    float4 grad;
};

__device__ __forceinline__ Vectors load_vectors(const AdamwAdapter& adapter, std::int64_t at) {
    return {__ldcs(reinterpret_cast<const float4*>(adapter.param + at)),
            __ldcs(reinterpret_cast<const float4*>(adapter.exp_avg + at)),
            __ldcs(reinterpret_cast<const float4*>(adapter.exp_avg_sq + at)),
            __ldcs(reinterpret_cast<const float4*>(adapter.grad + at))};
}

__device__ __forceinline__ void store_vectors(const AdamwAdapter& adapter, std::int64_t at, const Vectors& vectors) {
    __stcs(reinterpret_cast<float4*>(adapter.param + at), vectors.param);
    __stcs(reinterpret_cast<float4*>(adapter.exp_avg + at), vectors.exp_avg);
    __stcs(reinterpret_cast<float4*>(adapter.exp_avg_sq + at), vectors.exp_avg_sq);
}

__device__ __forceinline__ void update(Vectors& v, const AdamwAdapter& adapter, float factor, std::int64_t at) {
    Element e[4] = {{v.param.x, v.exp_avg.x, v.exp_avg_sq.x},
                    {v.param.y, v.exp_avg.y, v.exp_avg_sq.y},
                    {v.param.z, v.exp_avg.z, v.exp_avg_sq.z},
                    {v.param.w, v.exp_avg.w, v.exp_avg_sq.w}};
    update(e[0], v.grad.x, adapter, factor, at >= adapter.b_start);
    update(e[1], v.grad.y, adapter, factor, at + 1 >= adapter.b_start);
    update(e[2], v.grad.z, adapter, factor, at + 2 >= adapter.b_start);
    update(e[3], v.grad.w, adapter, factor, at + 3 >= adapter.b_start);
    v.param = {e[0].param, e[1].param, e[2].param, e[3].param};
    v.exp_avg = {e[0].exp_avg, e[1].exp_avg, e[2].exp_avg, e[3].exp_avg};
    v.exp_avg_sq = {e[0].exp_avg_sq, e[1].exp_avg_sq, e[2].exp_avg_sq, e[3].exp_avg_sq};
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
    const std::uintptr_t addresses =
        reinterpret_cast<std::uintptr_t>(adapter.param) | reinterpret_cast<std::uintptr_t>(adapter.grad) |
        reinterpret_cast<std::uintptr_t>(adapter.exp_avg) | reinterpret_cast<std::uintptr_t>(adapter.exp_avg_sq);
    if (finite && addresses % 16 == 0 && end - begin == kAdamwBlock) {
        // All loads before the first store, which could alias them for all that the compiler knows.
        const std::int64_t first = begin + threadIdx.x * 4;
        Vectors vectors[kVectors];
#pragma unroll
        for (int i = 0; i < kVectors; ++i) vectors[i] = load_vectors(adapter, first + i * kStride);
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            update(vectors[i], adapter, factor, first + i * kStride);
            store_vectors(adapter, first + i * kStride, vectors[i]);
            if (arguments.zero_grad)
                __stcs(reinterpret_cast<float4*>(adapter.grad + first + i * kStride), float4{0.0f, 0.0f, 0.0f, 0.0f});
        }
        return;
    }
    for (std::int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
        if (finite) {
            Element e{adapter.param[at], adapter.exp_avg[at], adapter.exp_avg_sq[at]};
            update(e, adapter.grad[at], adapter, factor, at >= adapter.b_start);
            adapter.param[at] = e.param;
            adapter.exp_avg[at] = e.exp_avg;
            adapter.exp_avg_sq[at] = e.exp_avg_sq;
        }
        if (arguments.zero_grad) adapter.grad[at] = 0.0f;
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
