// What a decoder does between its products, one launch each where torch takes several: rotation, and the gated SiLU.
// 16-bit in and out, fp32 between, rounded once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace alto::cuda {

// Queries or keys: [T, heads, D] in any strides but for D (elements; D lies together, 16 bytes aligned).
struct Heads {
    const void* from;
    std::int64_t token_stride;
    std::int64_t head_stride;
    void* to;  // [T, heads, D], contiguous
    int heads;
};

// Rotates by cos and sin, both [T, D], perhaps in place: out = x cos + (-second half of x, first half of x) sin; D a
// multiple of 16. `backwards`: the transposed map, from gradients of out to gradients of x.
struct RotaryArguments {
    Heads queries;
    Heads keys;
    const void* cos;
    const void* sin;
    int tokens;
    int width;  // D
    bool backwards;
};

cudaError_t rotate(const RotaryArguments& arguments, bool is_float16, cudaStream_t stream);

// out = silu(gate) up, all of `count` elements, a multiple of 8, 16 bytes aligned.
cudaError_t gated_silu(const void* gate, const void* up, void* out, std::int64_t count, bool is_float16,
                       cudaStream_t stream);

// The gradients of gate and up from that of out; either may take its place.
cudaError_t gated_silu_backward(const void* gradient, const void* gate, const void* up, void* gate_gradient,
                                void* up_gradient, std::int64_t count, bool is_float16, cudaStream_t stream);

// sum += other.
cudaError_t add(void* sum, const void* other, std::int64_t count, bool is_float16, cudaStream_t stream);

}  // namespace alto::cuda
