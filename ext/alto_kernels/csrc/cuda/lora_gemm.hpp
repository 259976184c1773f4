// One launch: a frozen product with the low-rank parts of all adapters (forward), or its whole backward pass.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "work.hpp"

namespace alto::cuda {

// Maps are of bf16 matrices in boxes of 64 x 64. T tokens, K in_features, N out_features, P pool columns, R saved rows.
//
//              forward                        backward
// operand      X [T, K]                       dY [T, N]
// weight       W [N, K]                       W [N, K]
// down_pool    A [P, K]                       B [N, P]
// up_pool      B [N, P]                       A [P, K]
// blocks       S [R, 64]                      dS [R, 64]
// output       Y [T, N]                       dX [T, K]
// saved        unused                         S [R, 64]
// input        unused                         X [T, K]
struct LoraGemmArguments {
    CUtensorMap operand;
    CUtensorMap weight;
    CUtensorMap down_pool;
    CUtensorMap up_pool;
    CUtensorMap blocks;
    CUtensorMap output;
    CUtensorMap saved;
    CUtensorMap input;
    const Item* items;        // [2 * pairs], the two blocks of a cluster side by side
    const int* item_offsets;  // [clusters + 1], in pairs
    const Extra* extras;
    const int* ready_target;         // [tiles + 1]; the last is their sum
    int* ready;                      // [tiles + 2], zero between launches; the last two: their sum, and finished blocks
    __nv_bfloat16* block_data;       // what `blocks` maps
    const __nv_bfloat16* bias;       // [N] or null, forward only
    const SlotPointers* slots;       // of this module
    const int* slot_is_bad;          // 1: the adapter's weights are not finite; its own tokens shall become NaN
    const std::uint32_t* row_keys;   // [T], null where nothing drops
    const std::int32_t* thresholds;  // [T] of dropout, by token
    const float* keep_factors;       // [T]
    int tokens;
    int tiles;
    int in_features;
    int out_features;
    std::uint32_t module;
    bool adds_to_output;  // backward: dX is added to, by bf16 rounding, and not written
};

// Launch on `stream` with `clusters` clusters of two blocks. Return the launch's error code.
cudaError_t launch_forward(const LoraGemmArguments& arguments, int clusters, cudaStream_t stream);
cudaError_t launch_backward(const LoraGemmArguments& arguments, int clusters, cudaStream_t stream);

// The number of clusters that run at once on the current device.
cudaError_t resident_clusters(int* clusters);

}  // namespace alto::cuda
