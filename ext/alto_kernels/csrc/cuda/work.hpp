// What the persistent kernel of lora_gemm.cuh is told to do: plain data, built on the host once a tick.
#pragma once

#include <cstdint>

namespace alto::cuda {

constexpr int kTileRows = 128;     // tokens of a tile; one S block has as many rows
constexpr int kTileColumns = 256;  // output features of a tile
constexpr int kStepDepth = 64;     // contraction depth of one step; columns of an S block and of a window
constexpr int kGranule = 16;       // pool columns that have one owner
constexpr int kGranules = kStepDepth / kGranule;
constexpr int kClusterSize = 2;
constexpr int kMaxModules = 4;  // of one launch
constexpr int kMaxParts = 4;    // of one item: S blocks, or adapters in one
constexpr int kConsumerWarps = 8;
constexpr int kWarpRows = 16;  // of a tile, in the accumulators of one warp: a quarter of a warpgroup's 64

// Features of one step of S blocks; with two parts it takes two stages of the ring.
constexpr int down_depth(int parts) { return parts == 1 ? 2 * kStepDepth : parts == 2 ? 3 * kStepDepth : kStepDepth; }
constexpr int down_stages(int parts) { return parts == 2 ? 2 : 1; }

enum class Kind : std::int32_t {
    kEnd = -1,   // no more items
    kDown = 0,   // up to four S blocks of 128 tokens, from one pass over the operand
    kBase = 1,   // one output tile, with the rank as extra depth
    kGradB = 2,  // rows of a gradient of B: dY^T S over a segment's tokens
    kGradA = 3,  // columns of gradients of A: dS^T X over a segment's tokens
};

enum Flag : std::int32_t {
    kShared = 1,  // both blocks of the cluster read the same pool columns: each loads half of them for both
    kMasked = 2,  // dropout has a part in the item
    kFresh = 4,   // gradients: what they hold is overwritten, not added to
};

// An item works on up to four S blocks side by side, each 64 columns wide. Down items and those of gradients with
// several S blocks have a part for each; a gradient of one S block has a part for each adapter in it.
struct alignas(16) Part {
    std::int32_t s_row;   // down: where the S block is written; gradients: S row of the first step
    std::int32_t column;  // down: first pool column; gradients: where the adapter's columns begin in the S block
    std::int32_t module;  // which of the launch's
    std::int32_t detail;  // down: the window, -1 where the part only fills up; gradients: first rank column
    // Gradients: whose.
    std::int32_t slot = 0;
    std::int32_t rank = 0;
    std::int32_t start = 0;  // of its tokens
    std::int32_t stop = 0;
};

// One item of one block. Both blocks of a cluster walk through their items in step: same kind, same number of S blocks
// and of steps. What a wait would be felt for is in the item itself.
struct alignas(16) Item {
    Kind kind;
    std::int32_t flags;
    std::int32_t row;          // first token: of the tile (down, base), of the first half tile (gradients)
    std::int32_t column;       // first output feature (base), first feature (gradients)
    std::int32_t steps;        // of 64 features (base), down_depth() features (down), 64 tokens (gradients)
    std::int32_t module;       // base, forward
    std::int32_t extra_begin;  // base: into the extras of this tile
    std::int32_t extra_count;
    std::int32_t extra_steps;  // base: the larger extra_count of the cluster; the shorter block idles
    std::int32_t block_count;  // S blocks: down, gradients
    std::int32_t part_count;   // as many, or, of gradients of one S block, the adapters in it
    std::int32_t start;        // the rest: gradients, all of whose tokens are in [start, stop)
    std::int32_t stop;
    std::int32_t threshold;  // of dropout; the smallest integer drops nothing
    float keep_factor;       // 1 / (1 - p)
    std::uint32_t eighths;   // a byte for each S block: which of its eighths, of 8 columns, go to a gradient
    Part parts[kMaxParts];
};
static_assert(sizeof(Item) == 192);

// One step of extra depth of a base tile: an S block times a window of a pool.
struct alignas(16) Extra {
    std::int32_t s_row;
    std::int32_t pool_column;
    std::int32_t unused[2];
};

// Whose 16 columns of a window these are, and for which tokens. A window has kGranules of them.
struct alignas(16) Owner {
    std::int32_t start;  // of its tokens; start == stop: nobody's
    std::int32_t stop;
    std::int32_t columns;  // that are the adapter's; the rest is padding
    std::int32_t slot;
    float scale;
    float keep_factor;  // 1 / (1 - p)
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
    bool fresh;         // its gradients are overwritten
};

// One (module, slot): fp32 masters and the gradients, all of them fp32 or all bf16; null where the adapter does not
// adapt the module.
struct alignas(32) SlotPointers {
    const float* a;
    const float* b;
    void* grad_a;
    void* grad_b;
};

}  // namespace alto::cuda
