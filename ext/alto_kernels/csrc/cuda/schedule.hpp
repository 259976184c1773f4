// The host's side of a tick: how tokens fall into tiles and S blocks, and which cluster does what in which order.
#pragma once

#include <cstdint>
#include <vector>

#include "work.hpp"

namespace alto::cuda {

// How the segments of a tick lie on tiles of 128 tokens and windows of 64 pool columns. The same for all layers.
//
// Adapters of small rank whose pool columns are neighbours share a window. Where a window's adapters have tokens in a
// tile there is one S block, whoever of them it is; rows and columns that do not belong together are zero in it.
class TickLayout {
  public:
    TickLayout(std::int64_t tokens, std::vector<Segment> segments);

    struct Block {
        int window;
        int s_row;
    };
    // At most 64 of a segment's rank columns, which lie in one window.
    struct Piece {
        int segment;
        int chunk;   // the first of them
        int column;  // where in the window
        int window;
        int s_row;  // of the run's first half tile of tokens
    };
    // Half tiles of 64 tokens whose gradients are made together: of one segment, or of neighbours in one window.
    struct Run {
        int first_row;
        int half_tiles;
        std::vector<Piece> pieces;
        bool one_block;  // all pieces are in the same S blocks
    };

    int tokens = 0;
    int tiles = 0;
    int saved_rows = 0;
    std::vector<Segment> segments;
    std::vector<int> window_columns;         // [windows] the first pool column of each
    std::vector<Owner> owners;               // [windows * kGranules]
    std::vector<std::vector<Block>> blocks;  // by tile
    std::vector<bool> drops;                 // by tile: whether any of its segments has dropout
    std::vector<Extra> extras;
    std::vector<int> extra_begin;   // [tiles + 1]
    std::vector<int> ready_target;  // [tiles + 1]; the last is their sum
    std::vector<Run> runs;          // one for each segment that has tokens
    std::vector<Run> joint_runs;    // the same, neighbours joined

  private:
    void join_runs();
};

// The items of one launch in the order of clusters; `offsets` [clusters + 1] counts pairs of items.
struct Schedule {
    std::vector<Item> items;
    std::vector<int> offsets;
};

struct LaunchShape {
    bool backward = false;
    bool wants_output = true;  // backward: whether dX is
    int in_features = 0;
    std::vector<int> out_features;  // of each module
    bool drops = false;             // then backward is of one module
    int pairs_in_group = 8;         // pairs of tiles that share a stretch of the weight in the L2 cache
};

// Lists the work of a launch and deals it to clusters: S blocks come first, few clusters make gradients while others
// make tiles, and the longest chain of a simulated run is kept short. The result depends on nothing but its arguments,
// and no item's arithmetic depends on the schedule.
Schedule make_schedule(const TickLayout& layout, const LaunchShape& shape, int clusters);

}  // namespace alto::cuda
