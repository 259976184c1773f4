#include "pools.hpp"

namespace alto::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 64;

__device__ __forceinline__ __nv_bfloat16 finite_or_zero(float value, bool& bad) {
    if (!isfinite(value) || isinf(__bfloat162float(__float2bfloat16(value)))) {
        bad = true;
        value = 0.0f;
    }
    return __float2bfloat16(value);
}

// Grid: (blocks along a matrix, modules, slots).
__global__ void refresh_kernel(const ModulePool* modules, const SlotColumns* slots, const SlotPointers* pointers,
                               int max_slots, std::int64_t pool_columns, int* slot_is_bad) {
    const ModulePool pool = modules[blockIdx.y];
    const SlotColumns columns = slots[blockIdx.z];
    const SlotPointers masters = pointers[static_cast<std::int64_t>(blockIdx.y) * max_slots + columns.slot];
    const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    bool bad = false;
    const std::int64_t a_size = columns.padded * pool.in_features;
    for (std::int64_t i = first; i < a_size; i += stride) {
        const bool real = masters.a != nullptr && i < columns.rank * pool.in_features;
        pool.a[columns.first * pool.in_features + i] = finite_or_zero(real ? masters.a[i] : 0.0f, bad);
    }
    const std::int64_t b_size = pool.out_features * columns.padded;
    for (std::int64_t i = first; i < b_size; i += stride) {
        const std::int64_t row = i / columns.padded;
        const std::int64_t column = i % columns.padded;
        const bool real = masters.b != nullptr && column < columns.rank;
        pool.b[row * pool_columns + columns.first + column] =
            finite_or_zero(real ? masters.b[row * columns.rank + column] : 0.0f, bad);
    }
    if (bad) slot_is_bad[columns.slot] = 1;
}

}  // namespace

cudaError_t refresh_pools(const ModulePool* modules, int module_count, const SlotColumns* slots, int slot_count,
                          const SlotPointers* pointers, int max_slots, std::int64_t pool_columns, int* slot_is_bad,
                          cudaStream_t stream) {
    const dim3 grid(kBlocks, static_cast<unsigned>(module_count), static_cast<unsigned>(slot_count));
    refresh_kernel<<<grid, kThreads, 0, stream>>>(modules, slots, pointers, max_slots, pool_columns, slot_is_bad);
    return cudaGetLastError();
}

}  // namespace alto::cuda
