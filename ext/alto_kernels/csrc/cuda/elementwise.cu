#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "elementwise.hpp"
#include "lines.cuh"

namespace alto::cuda {
namespace {

constexpr int kThreads = 256;

// A thread rotates 8 elements of the first half of a head with the 8 of the second that belong to them.
template <typename Element>
__global__ void rotate_kernel(RotaryArguments arguments) {
    const int half = arguments.width / 2;
    const int lines = half / kLine;
    const int all_heads = arguments.queries.heads + arguments.keys.heads;
    const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const std::int64_t row = number / lines;  // of [T, queries' and then keys' heads]
    const std::int64_t token = row / all_heads;
    if (token >= arguments.tokens) return;
    const int any_head = static_cast<int>(row % all_heads);
    const bool is_query = any_head < arguments.queries.heads;
    const Heads heads = is_query ? arguments.queries : arguments.keys;
    const int head = is_query ? any_head : any_head - arguments.queries.heads;
    const int column = static_cast<int>(number % lines) * kLine;

    const std::int64_t from = token * heads.token_stride + head * heads.head_stride + column;
    const std::int64_t angle = token * arguments.width + column;
    float first[kLine], second[kLine], cos_first[kLine], cos_second[kLine], sin_first[kLine], sin_second[kLine];
    load<Element>(first, heads.from, from);
    load<Element>(second, heads.from, from + half);
    load<Element>(cos_first, arguments.cos, angle);
    load<Element>(cos_second, arguments.cos, angle + half);
    load<Element>(sin_first, arguments.sin, angle);
    load<Element>(sin_second, arguments.sin, angle + half);
    float out_first[kLine], out_second[kLine];
#pragma unroll
    for (int i = 0; i < kLine; ++i) {
        const float to_first = arguments.backwards ? sin_second[i] : -sin_first[i];
        const float to_second = arguments.backwards ? -sin_first[i] : sin_second[i];
        out_first[i] = first[i] * cos_first[i] + second[i] * to_first;
        out_second[i] = second[i] * cos_second[i] + first[i] * to_second;
    }
    const std::int64_t to = (token * heads.heads + head) * arguments.width + column;
    store<Element>(heads.to, to, out_first);
    store<Element>(heads.to, to + half, out_second);
}

__device__ __forceinline__ float sigmoid(float value) { return 1.0f / (1.0f + __expf(-value)); }

template <typename Element>
__global__ void gated_silu_kernel(const void* gates, const void* ups, void* out, std::int64_t count) {
    const std::int64_t at = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kLine;
    if (at >= count) return;
    float gate[kLine], up[kLine];
    load<Element>(gate, gates, at);
    load<Element>(up, ups, at);
#pragma unroll
    for (int i = 0; i < kLine; ++i) up[i] *= gate[i] * sigmoid(gate[i]);
    store<Element>(out, at, up);
}

template <typename Element>
__global__ void gated_silu_backward_kernel(const void* gradients, const void* gates, const void* ups,
                                           void* gate_gradients, void* up_gradients, std::int64_t count) {
    const std::int64_t at = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kLine;
    if (at >= count) return;
    float gradient[kLine], gate[kLine], up[kLine];
    load<Element>(gradient, gradients, at);
    load<Element>(gate, gates, at);
    load<Element>(up, ups, at);
#pragma unroll
    for (int i = 0; i < kLine; ++i) {
        const float open = sigmoid(gate[i]);
        const float slope = open * (1.0f + gate[i] * (1.0f - open));  // of silu at the gate
        up[i] *= gradient[i] * slope;
        gradient[i] *= gate[i] * open;
    }
    store<Element>(gate_gradients, at, up);
    store<Element>(up_gradients, at, gradient);
}

template <typename Element>
__global__ void add_kernel(void* sum, const void* other, std::int64_t count) {
    const std::int64_t at = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kLine;
    if (at >= count) return;
    float values[kLine], added[kLine];
    load<Element>(values, sum, at);
    load<Element>(added, other, at);
#pragma unroll
    for (int i = 0; i < kLine; ++i) values[i] += added[i];
    store<Element>(sum, at, values);
}

unsigned blocks(std::int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

}  // namespace

cudaError_t rotate(const RotaryArguments& arguments, bool is_float16, cudaStream_t stream) {
    const std::int64_t lines = static_cast<std::int64_t>(arguments.tokens) *
                               (arguments.queries.heads + arguments.keys.heads) * (arguments.width / 2 / kLine);
    if (lines == 0) return cudaSuccess;
    const auto kernel = is_float16 ? rotate_kernel<__half> : rotate_kernel<__nv_bfloat16>;
    kernel<<<blocks(lines), kThreads, 0, stream>>>(arguments);
    return cudaGetLastError();
}

cudaError_t gated_silu(const void* gate, const void* up, void* out, std::int64_t count, bool is_float16,
                       cudaStream_t stream) {
    if (count == 0) return cudaSuccess;
    const auto kernel = is_float16 ? gated_silu_kernel<__half> : gated_silu_kernel<__nv_bfloat16>;
    kernel<<<blocks(count / kLine), kThreads, 0, stream>>>(gate, up, out, count);
    return cudaGetLastError();
}

cudaError_t gated_silu_backward(const void* gradient, const void* gate, const void* up, void* gate_gradient,
                                void* up_gradient, std::int64_t count, bool is_float16, cudaStream_t stream) {
    if (count == 0) return cudaSuccess;
    const auto kernel = is_float16 ? gated_silu_backward_kernel<__half> : gated_silu_backward_kernel<__nv_bfloat16>;
    kernel<<<blocks(count / kLine), kThreads, 0, stream>>>(gradient, gate, up, gate_gradient, up_gradient, count);
    return cudaGetLastError();
}

cudaError_t add(void* sum, const void* other, std::int64_t count, bool is_float16, cudaStream_t stream) {
    if (count == 0) return cudaSuccess;
    const auto kernel = is_float16 ? add_kernel<__half> : add_kernel<__nv_bfloat16>;
    kernel<<<blocks(count / kLine), kThreads, 0, stream>>>(sum, other, count);
    return cudaGetLastError();
}

}  // namespace alto::cuda
