#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "pools.hpp"

namespace alto::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 64;

template <typename Element>
__device__ __forceinline__ Element finite_or_zero(float value, bool& bad) {
    const auto rounded = static_cast<Element>(value);
    if (isfinite(static_cast<float>(rounded))) return rounded;
    bad = true;
    return static_cast<Element>(0.0f);
}

// Grid: (blocks along a matrix, modules, slots).
template <typename Element>
__global__ void refresh_kernel(const ModulePool* modules, const SlotColumns* slots, const SlotPointers* pointers,
                               int max_slots, std::int64_t pool_columns, int* slot_is_bad) {
    const ModulePool pool = modules[blockIdx.y];
    const SlotColumns columns = slots[blockIdx.z];
    const SlotPointers masters = pointers[static_cast<std::int64_t>(blockIdx.y) * max_slots + columns.slot];
    const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    auto* const a = static_cast<Element*>(pool.a);
    auto* const b = static_cast<Element*>(pool.b);
    bool bad = false;
    const std::int64_t a_size = columns.padded * pool.in_features;
    for (std::int64_t i = first; i < a_size; i += stride) {
        const bool real = masters.a != nullptr && i < columns.rank * pool.in_features;
        a[columns.first * pool.in_features + i] = finite_or_zero<Element>(real ? masters.a[i] : 0.0f, bad);
    }
    const std::int64_t b_size = pool.out_features * columns.padded;
    for (std::int64_t i = first; i < b_size; i += stride) {
        const std::int64_t row = i / columns.padded;
        const std::int64_t column = i % columns.padded;
        const bool real = masters.b != nullptr && column < columns.rank;
        b[row * pool_columns + columns.first + column] =
            finite_or_zero<Element>(real ? masters.b[row * columns.rank + column] : 0.0f, bad);
    }
    if (bad) slot_is_bad[columns.slot] = 1;
}

}  // namespace

cudaError_t refresh_pools(const ModulePool* modules, int module_count, const SlotColumns* slots, int slot_count,
                          const SlotPointers* pointers, int max_slots, std::int64_t pool_columns, int* slot_is_bad,
                          bool is_float16, cudaStream_t stream) {
    const auto kernel = is_float16 ? refresh_kernel<__half> : refresh_kernel<__nv_bfloat16>;
    const dim3 grid(kBlocks, static_cast<unsigned>(module_count), static_cast<unsigned>(slot_count));
    kernel<<<grid, kThreads, 0, stream>>>(modules, slots, pointers, max_slots, pool_columns, slot_is_bad);
    return cudaGetLastError();
}

}  // namespace alto::cuda
