// The low-rank part of a layer beside a frozen product made elsewhere: grouped products for GPUs from Ampere on.
//
// Three kernels serve all adapters of a tick, whatever their number, ranks and token counts. T tokens, K in_features,
// N out_features, R columns of S; a token belongs to one adapter, so its row of S holds that adapter's columns alone.
//
//           forward                               backward
// down      S = scale drop(X) A^T                 dS = scale dY B
// up        Y += S B^T                            dX += drop(dS A)
// gradients                                       dB += dY^T S, dA += dS^T drop(X)
//
// Both scales carry the 1 / (1 - p) of dropout, so that drop() only selects. Arithmetic is fp32 over bf16 or fp16.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "work.hpp"

namespace alto::cuda {

constexpr int kBoxRows = 64;     // tokens of a tile; rows of a box in shared memory
constexpr int kBoxColumns = 64;  // elements of a box's row, 128 bytes

// One adapter's tokens [start, stop) and its columns of the pools, `rank` of which are real and the rest zero.
struct alignas(16) Group {
    std::int32_t start;
    std::int32_t stop;
    std::int32_t rank;
    std::int32_t columns;
    std::int32_t pool_column;
    std::int32_t slot;
    std::int32_t threshold;  // of dropout; the smallest integer drops nothing
    float scale;             // alpha / r, times 1 / (1 - p)
};
static_assert(sizeof(Group) == 32);

// Up to kBoxRows tokens of one group, from `row` on.
struct TokenTile {
    std::int32_t group;
    std::int32_t row;
};

// One module in one tick: all but the activations. Pointers are to device memory.
struct GroupedModule {
    const Group* groups;
    const TokenTile* tiles;
    const std::uint32_t* row_keys;  // [T], null where nothing drops
    const SlotPointers* slots;      // of this module
    const int* slot_is_bad;         // 1: the adapter's weights are not finite; its own tokens shall become NaN
    const void* a_pool;             // A [pool_columns, K]
    const void* b_pool;             // B [N, pool_columns]
    std::int64_t pool_columns;
    int group_count;
    int tile_count;
    int saved_columns;  // R
    int in_features;
    int out_features;
    std::uint32_t module;
    bool gradients_are_bfloat16;  // else fp32
};

// X [T, K] -> S [T, R], or dY [T, N] -> dS [T, R] where `backward`. Element is __nv_bfloat16 or __half.
template <typename Element>
cudaError_t launch_grouped_down(const GroupedModule& module, bool backward, const Element* operand, Element* saved,
                                cudaStream_t stream);

// S [T, R] into Y [T, N], or dS into dX [T, K] where `backward`; the output is read and written in place.
template <typename Element>
cudaError_t launch_grouped_up(const GroupedModule& module, bool backward, const Element* saved, Element* output,
                              cudaStream_t stream);

// Adds to the gradients of A and B of every group; where they are bf16, the sum is made in fp32 and rounded once.
template <typename Element>
cudaError_t launch_grouped_gradients(const GroupedModule& module, const Element* x, const Element* dy, const Element* s,
                                     const Element* ds, cudaStream_t stream);

}  // namespace alto::cuda
