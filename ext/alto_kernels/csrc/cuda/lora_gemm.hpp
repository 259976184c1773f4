// One launch: up to four frozen products of one input with the low-rank parts of all adapters (forward), or the whole
// backward pass of them.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "work.hpp"

namespace alto::cuda {

// One of the linear layers. Maps are of 16-bit matrices in boxes of 64 x 64, but of kWarpRows x 64 for the output,
// which a warp writes by itself. T tokens, K in_features, N out_features, P pool columns, R saved rows.
//
//              forward                        backward
// weight       W [N, K]                       W [N, K]
// rows         Y [T, N], written              dY [T, N]
// down_pool    A [P, K]                       B [N, P]
// up_pool      B [N, P]                       A [P, K]
// blocks       S [R, 64]                      dS [R, 64]
// saved        unused                         S [R, 64]
struct ModuleArguments {
    CUtensorMap weight;
    CUtensorMap rows;
    CUtensorMap down_pool;
    CUtensorMap up_pool;
    CUtensorMap blocks;
    CUtensorMap saved;
    void* block_data;           // what `blocks` maps
    const void* row_data;       // what `rows` maps, backward
    const void* saved_data;     // what `saved` maps, backward
    const void* bias;           // [N] or null, forward only
    const SlotPointers* slots;  // of this module
    std::uint32_t module;       // its number in the table, which dropout mixes in
    int out_features;
};

// Backward with dropout takes one module: each has its own mask on what it adds to dX.
struct LoraGemmArguments {
    CUtensorMap input;        // X [T, K]
    CUtensorMap input_grads;  // dX [T, K], backward
    ModuleArguments modules[kMaxModules];
    const void* input_data;  // what `input` maps
    int module_count;
    int in_features;
    int tokens;
    int tiles;
    const Item* items;        // [2 * pairs], the two blocks of a cluster side by side
    const int* item_offsets;  // [clusters + 1], in pairs
    const Extra* extras;
    const Owner* owners;             // [windows * kGranules]
    const int* ready_target;         // [tiles + 1], for one module; the last is their sum
    int* ready;                      // [tiles + 2], zero between launches; the last two: their sum, and finished blocks
    const int* slot_is_bad;          // 1: the adapter's weights are not finite; its own tokens shall become NaN
    const std::uint32_t* row_keys;   // [T], null where nothing drops
    const std::int32_t* thresholds;  // [T] of dropout, by token
    const float* keep_factors;       // [T]
    bool adds_to_output;             // backward: dX is added to, rounding in its format, and not written
    bool gradients_are_bfloat16;     // backward: else fp32
};
static_assert(sizeof(LoraGemmArguments) <= 4096);

enum class Format { kBfloat16, kFloat16 };

// Launches on `stream` with `clusters` clusters of two blocks; returns the launch's error code. Each instantiation is
// in a file of its own, lora_gemm_*.cu.
template <Format format, bool backward>
cudaError_t launch(const LoraGemmArguments& arguments, int clusters, cudaStream_t stream);

// Counts the clusters that run at once on the current device.
template <Format format, bool backward>
cudaError_t resident_clusters(int* clusters);

}  // namespace alto::cuda
