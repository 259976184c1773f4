#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "lines.cuh"
#include "norm.hpp"

namespace alto::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kLinesOfThread = 4;  // at most
constexpr int kThreads = 256;      // of a block whose rows have a warp or less each

// Threads along x share a row; along y are rows of their own, where a row has no more than a warp.
struct Place {
    std::int64_t row;
    bool there;  // else the last row once more, and nothing is written
    int lines;

    __device__ explicit Place(const NormShape& shape)
        : row(static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y), lines(shape.width / kLine) {
        there = row < shape.rows;
        if (!there) row = shape.rows - 1;
    }
    __device__ int line(int number) const { return static_cast<int>(threadIdx.x + number * blockDim.x); }
};

// The sums over the threads of a row, in all of them.
__device__ float2 sums_of_row(float2 value) {
    const int together = min(blockDim.x, kWarp);  // a power of two
    for (int step = together / 2; step > 0; step /= 2) {
        value.x += __shfl_xor_sync(0xffffffffu, value.x, step);
        value.y += __shfl_xor_sync(0xffffffffu, value.y, step);
    }
    if (blockDim.x <= kWarp) return value;
    __shared__ float2 of_warps[kWarp];
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
    __syncthreads();
    float2 total{};
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
        total.x += of_warps[warp].x;
        total.y += of_warps[warp].y;
    }
    return total;
}

__device__ float scale_of(float squares, int width, float epsilon) { return rsqrtf(squares / width + epsilon); }

template <typename Element>
__global__ void rms_norm_kernel(NormArguments arguments) {
    const Place place(arguments.shape);
    const std::int64_t start = place.row * arguments.shape.width;
    float sums[kLinesOfThread][kLine];
    float squares = 0.0f;
#pragma unroll
    for (int number = 0; number < kLinesOfThread; ++number) {
        if (place.line(number) >= place.lines) continue;
        const std::int64_t at = start + place.line(number) * kLine;
        load<Element>(sums[number], arguments.x, at);
        if (arguments.y != nullptr) {
            float other[kLine];
            load<Element>(other, arguments.y, at);
#pragma unroll
            for (int i = 0; i < kLine; ++i)
                sums[number][i] = static_cast<float>(static_cast<Element>(sums[number][i] + other[i]));
            if (place.there) store<Element>(arguments.sum, at, sums[number]);
        }
#pragma unroll
        for (int i = 0; i < kLine; ++i) squares += sums[number][i] * sums[number][i];
    }
    const float scale = scale_of(sums_of_row({squares, 0.0f}).x, arguments.shape.width, arguments.epsilon);
    if (!place.there) return;
#pragma unroll
    for (int number = 0; number < kLinesOfThread; ++number) {
        if (place.line(number) >= place.lines) continue;
        float weight[kLine];
        load<Element>(weight, arguments.weight, place.line(number) * kLine);
#pragma unroll
        for (int i = 0; i < kLine; ++i) weight[i] *= sums[number][i] * scale;
        store<Element>(arguments.out, start + place.line(number) * kLine, weight);
    }
}

// With g = gradient * weight and s = 1 / rms: s (g - sum s^2 mean(g sum)).
template <typename Element>
__global__ void rms_norm_backward_kernel(NormGradientArguments arguments) {
    const Place place(arguments.shape);
    const std::int64_t start = place.row * arguments.shape.width;
    float gradients[kLinesOfThread][kLine], sums[kLinesOfThread][kLine];
    float squares = 0.0f, products = 0.0f;
#pragma unroll
    for (int number = 0; number < kLinesOfThread; ++number) {
        if (place.line(number) >= place.lines) continue;
        const std::int64_t at = start + place.line(number) * kLine;
        float weight[kLine];
        load<Element>(weight, arguments.weight, place.line(number) * kLine);
        load<Element>(gradients[number], arguments.gradient, at);
        load<Element>(sums[number], arguments.sum, at);
#pragma unroll
        for (int i = 0; i < kLine; ++i) {
            gradients[number][i] *= weight[i];
            squares += sums[number][i] * sums[number][i];
            products += gradients[number][i] * sums[number][i];
        }
    }
    const float2 totals = sums_of_row({squares, products});
    const float scale = scale_of(totals.x, arguments.shape.width, arguments.epsilon);
    const float along = scale * scale * totals.y / arguments.shape.width;
    if (!place.there) return;
#pragma unroll
    for (int number = 0; number < kLinesOfThread; ++number) {
        if (place.line(number) >= place.lines) continue;
        const std::int64_t at = start + place.line(number) * kLine;
        float out[kLine] = {};
        if (arguments.beside != nullptr) load<Element>(out, arguments.beside, at);
#pragma unroll
        for (int i = 0; i < kLine; ++i) out[i] += scale * (gradients[number][i] - along * sums[number][i]);
        store<Element>(arguments.sum_gradient, at, out);
    }
}

// As few threads for a row as hold it: within a warp, where no barrier is needed, as long as possible.
dim3 threads_of(const NormShape& shape) {
    const int lines = shape.width / kLine;
    if (lines > kWarp * kLinesOfThread) {
        const int warps = (lines + kWarp * kLinesOfThread - 1) / (kWarp * kLinesOfThread);
        return dim3(static_cast<unsigned>(warps * kWarp), 1);
    }
    unsigned along = 1;
    while (along < kWarp && static_cast<int>(along) < lines) along *= 2;
    return dim3(along, kThreads / along);
}

template <typename Arguments>
cudaError_t launch(void (*kernel)(Arguments), const Arguments& arguments, cudaStream_t stream) {
    if (arguments.shape.rows == 0) return cudaSuccess;
    const dim3 threads = threads_of(arguments.shape);
    const auto blocks = static_cast<unsigned>((arguments.shape.rows + threads.y - 1) / threads.y);
    kernel<<<blocks, threads, 0, stream>>>(arguments);
    return cudaGetLastError();
}

}  // namespace

cudaError_t rms_norm(const NormArguments& arguments, bool is_float16, cudaStream_t stream) {
    return launch(is_float16 ? rms_norm_kernel<__half> : rms_norm_kernel<__nv_bfloat16>, arguments, stream);
}

cudaError_t rms_norm_backward(const NormGradientArguments& arguments, bool is_float16, cudaStream_t stream) {
    return launch(is_float16 ? rms_norm_backward_kernel<__half> : rms_norm_backward_kernel<__nv_bfloat16>, arguments,
                  stream);
}

}  // namespace alto::cuda
