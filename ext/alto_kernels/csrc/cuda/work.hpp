// What the persistent kernel of lora_gemm.cuh is told to do: plain data, built on the host once a tick.
#pragma once

#include <cstdint>

namespace alto::cuda {

constexpr int kTileRows = 128;     // tokens of a tile; one S block has as many rows
constexpr int kTileColumns = 256;  // output features of a tile
constexpr int kStepDepth = 64;     // contraction depth of one step; columns of an S block
constexpr int kDownDepth = 128;    // contraction depth of one step of a down item
constexpr int kGradColumns = 256;  // features of one gradient item
constexpr int kClusterSize = 2;

enum class Kind : std::int32_t {
    kEnd = -1,   // no more items
    kDown = 0,   // one S block: 128 tokens x 64 rank columns
    kBase = 1,   // one output tile, with the rank as extra depth
    kGradB = 2,  // 256 rows of a gradient of B: dY^T S over a segment's tokens
    kGradA = 3,  // 256 columns of a gradient of A: dS^T X over a segment's tokens
};

// One item of one block. Both blocks of a cluster walk through their items in step: same kind, same number of steps.
// Everything about the segment is in the item, so that no load waits for another.
struct alignas(16) Item {
    Kind kind;
    std::int32_t row;          // first token: of the tile (down, base), of the segment's first half tile (gradients)
    std::int32_t column;       // first output feature (base, gradients); pool column (down)
    std::int32_t steps;        // of 64 features (base), 128 features (down), 64 tokens (gradients)
    std::int32_t extra_begin;  // base: into the extras of this tile
    std::int32_t extra_count;
    std::int32_t extra_steps;  // base: the larger extra_count of the cluster; the shorter block idles
    std::int32_t s_row;        // down: where the S block is written; gradients: its row for the first step
    std::int32_t valid;        // 0: this block only keeps step with its peer
    std::int32_t slot;         // the rest: down, gradients
    std::int32_t chunk;        // first rank column in the segment's own count
    std::int32_t start;
    std::int32_t stop;
    std::int32_t rank;
    std::int32_t threshold;  // of dropout; the smallest integer drops nothing
    float scale;
    float keep_factor;  // 1 / (1 - p)
    std::int32_t unused[3];
};
static_assert(sizeof(Item) == 80);

// One step of extra depth of a base tile: an S block times a piece of a pool.
struct alignas(16) Extra {
    std::int32_t s_row;
    std::int32_t pool_column;
    std::int32_t unused[2];
};

struct Segment {
    std::int32_t start;
    std::int32_t stop;
    std::int32_t rank;
    std::int32_t pool_column;
    std::int32_t slot;
    std::int32_t threshold;  // of dropout; the smallest integer drops nothing
    float scale;
    float keep_factor;  // 1 / (1 - p)
};

// One (module, slot): fp32 masters and gradients, null where the adapter does not adapt the module.
struct alignas(32) SlotPointers {
    const float* a;
    const float* b;
    float* grad_a;
    float* grad_b;
};

}  // namespace alto::cuda
