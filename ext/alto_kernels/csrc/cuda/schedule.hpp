// The host's side of a tick: how tokens fall into tiles and S blocks, and which cluster does what in which order.
#pragma once

#include <cstdint>
#include <vector>

#include "work.hpp"

namespace alto::cuda {

// How the segments of a tick lie on tiles of 128 tokens. The same for all layers.
//
// For each segment and 64 of its rank columns there is a run of S blocks, one for each tile that it touches; rows that
// are not the segment's are zero in them.
class TickLayout {
  public:
    TickLayout(std::int64_t tokens, std::vector<Segment> segments);

    struct Down {
        int tile;
        int segment;
        int chunk;
        int s_row;
    };
    // The tokens of a segment in half tiles of 64, with the S rows they have.
    struct Run {
        int segment;
        int chunk;
        int first_row;
        int half_tiles;
        int s_row;
    };

    int tokens = 0;
    int tiles = 0;
    int saved_rows = 0;
    std::vector<Segment> segments;
    std::vector<Extra> extras;
    std::vector<int> extra_begin;   // [tiles + 1]
    std::vector<int> ready_target;  // [tiles + 1]; the last is their sum
    std::vector<Down> downs;
    std::vector<Run> runs;
};

// The items of one launch in the order of clusters; `offsets` [clusters + 1] counts pairs of items.
struct Schedule {
    std::vector<Item> items;
    std::vector<int> offsets;
};

struct LaunchShape {
    int contraction = 0;      // features summed over by the frozen product
    int outputs = 0;          // features of its output; 0: no frozen product is wanted
    int grad_b_features = 0;  // 0 in forward
    int grad_a_features = 0;
    bool drops = false;
    int pairs_in_group = 8;  // pairs of tiles that share a stretch of the weight in the L2 cache
};

// Lists the work of a launch and deals it to clusters: the longest chain of a simulated run is kept short, S blocks
// come first, and gradients are spread among the output tiles so that their memory traffic hides behind arithmetic. The
// result depends on nothing but its arguments, and no item's arithmetic depends on the schedule.
Schedule make_schedule(const TickLayout& layout, const LaunchShape& shape, int clusters);

}  // namespace alto::cuda
