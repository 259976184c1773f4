// What the persistent kernel of lora_gemm.cuh is told to do: plain data, built on the host once a tick.
#pragma once

#include <cstdint>

namespace alto::cuda {

constexpr int kTileRows = 128;     // tokens of a tile; one S block has as many rows
constexpr int kTileColumns = 256;  // output features of a tile
constexpr int kStepDepth = 64;     // contraction depth of one step; columns of an S block
constexpr int kGradColumns = 128;  // features of one gradient item
constexpr int kClusterSize = 2;

enum class Kind : std::int32_t {
  kDown = 0,   // one S block: 128 tokens x 64 rank columns
  kBase = 1,   // one output tile, with the rank as extra depth
  kGradB = 2,  // 128 rows of a gradient of B: dY^T S over a segment's tokens
  kGradA = 3,  // 128 columns of a gradient of A: dS^T X over a segment's tokens
};

// One item of one block. Both blocks of a cluster walk through their items in step: same kind, same number of steps.
struct alignas(16) Item {
  Kind kind;
  std::int32_t row;          // first token: of the tile (down, base), of the segment's first half tile (gradients)
  std::int32_t column;       // first output feature (base, gradients); first rank column of the segment (down)
  std::int32_t steps;        // of kStepDepth: contraction features (down, base), tokens (gradients)
  std::int32_t extra_begin;  // base: into the extras of this tile
  std::int32_t extra_count;
  std::int32_t extra_steps;  // base: the larger extra_count of the cluster; the shorter block idles
  std::int32_t s_row;        // down: where the S block is written; gradients: its row for the first step
  std::int32_t segment;      // down, gradients
  std::int32_t chunk;        // down, gradients: first rank column in the segment's own count
  std::int32_t valid;        // 0: this block only keeps step with its peer
  std::int32_t unused;
};
static_assert(sizeof(Item) == 48);

// One step of extra depth of a base tile: an S block times a piece of a pool.
struct alignas(16) Extra {
  std::int32_t s_row;
  std::int32_t pool_column;
  std::int32_t unused[2];
};

struct alignas(16) Segment {
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
