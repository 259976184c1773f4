// The copies of the adapters' weights, in bf16 or fp16, that the tensor cores read.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "work.hpp"

namespace alto::cuda {

// One module's pools: A [columns, in_features] and B [out_features, columns]; an adapter owns a range of columns.
struct alignas(16) ModulePool {
    void* a;
    void* b;
    std::int64_t in_features;
    std::int64_t out_features;
};

// One slot to renew: its columns [first, first + padded), of which `rank` are the adapter's and the rest zero.
struct alignas(16) SlotColumns {
    std::int32_t slot;
    std::int32_t first;
    std::int32_t rank;
    std::int32_t padded;
};

// Copies the masters of `slot_count` slots into the pools of all modules. A weight that is not finite becomes zero and
// marks its slot in `slot_is_bad` (which the caller has cleared), so that it cannot leak into tokens of a neighbour;
// the same for one that is too large for the pools' format, which is fp16 where `is_float16` and else bf16.
cudaError_t refresh_pools(const ModulePool* modules, int module_count, const SlotColumns* slots, int slot_count,
                          const SlotPointers* pointers, int max_slots, std::int64_t pool_columns, int* slot_is_bad,
                          bool is_float16, cudaStream_t stream);

}  // namespace alto::cuda
