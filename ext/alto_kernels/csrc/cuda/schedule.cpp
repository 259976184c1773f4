#include "schedule.hpp"

#include <algorithm>
#include <limits>
#include <list>
#include <utility>

namespace alto::cuda {
namespace {

// Simulated costs in base steps (128 x 256 x 64 on one multiprocessor), from runs on an H100: there the L2 cache's
// bandwidth is the common limit, so a step costs what it loads.
constexpr double kDownStep = 1.25;
constexpr double kGradStep = 1.05;
constexpr double kMaskCost = 1.5;  // of dropout, for each step
constexpr double kItemCost = 2.0;

int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct Pair {
    Item items[kClusterSize];
    double cost;
};

void fill_segment(Item& item, const Segment& segment, int chunk) {
    item.slot = segment.slot;
    item.chunk = chunk;
    item.start = segment.start;
    item.stop = segment.stop;
    item.rank = segment.rank;
    item.threshold = segment.threshold;
    item.scale = segment.scale;
    item.keep_factor = segment.keep_factor;
}

std::vector<Pair> down_pairs(const TickLayout& layout, const LaunchShape& shape) {
    std::vector<Pair> pairs;
    const int steps = ceil_div(shape.contraction, kDownDepth);
    const bool masked = shape.drops && shape.grad_b_features == 0;
    for (std::size_t first = 0; first < layout.downs.size(); first += kClusterSize) {
        Pair pair{};
        pair.cost = steps * (kDownStep + (masked ? kMaskCost : 0.0)) + kItemCost;
        for (std::size_t block = 0; block < kClusterSize; ++block) {
            const bool valid = first + block < layout.downs.size();
            const auto& down = layout.downs[valid ? first + block : first];
            Item& item = pair.items[block];
            item.kind = Kind::kDown;
            item.row = down.tile * kTileRows;
            item.column = layout.segments[static_cast<std::size_t>(down.segment)].pool_column + down.chunk;
            item.steps = steps;
            item.s_row = down.s_row;
            item.valid = valid ? 1 : 0;
            fill_segment(item, layout.segments[static_cast<std::size_t>(down.segment)], down.chunk);
        }
        pairs.push_back(pair);
    }
    return pairs;
}

std::vector<Pair> base_pairs(const TickLayout& layout, const LaunchShape& shape) {
    std::vector<Pair> pairs;
    const int steps = ceil_div(shape.contraction, kStepDepth);
    const int row_pairs = ceil_div(layout.tiles, kClusterSize);
    const int columns = ceil_div(shape.outputs, kTileColumns);
    for (int group = 0; group < row_pairs; group += shape.pairs_in_group) {
        for (int column = 0; column < columns; ++column) {
            for (int row_pair = group; row_pair < std::min(group + shape.pairs_in_group, row_pairs); ++row_pair) {
                Pair pair{};
                int extra_steps = 0;
                for (int block = 0; block < kClusterSize; ++block) {
                    const int tile = row_pair * kClusterSize + block;
                    Item& item = pair.items[block];
                    item.kind = Kind::kBase;
                    item.row = tile * kTileRows;
                    item.column = column * kTileColumns;
                    item.steps = steps;
                    if (tile < layout.tiles) {
                        const auto at = static_cast<std::size_t>(tile);
                        item.extra_begin = layout.extra_begin[at];
                        item.extra_count = layout.extra_begin[at + 1] - item.extra_begin;
                    }
                    extra_steps = std::max(extra_steps, item.extra_count);
                }
                for (Item& item : pair.items) item.extra_steps = extra_steps;
                pair.cost = steps + extra_steps + kItemCost + (shape.drops && shape.grad_b_features > 0 ? 4.0 : 0.0);
                pairs.push_back(pair);
            }
        }
    }
    return pairs;
}

void add_gradient_pairs(const TickLayout& layout, Kind kind, int features, bool drops, std::vector<Pair>& pairs) {
    for (const auto& run : layout.runs) {
        for (int column = 0; column < features; column += kGradColumns * kClusterSize) {
            Pair pair{};
            pair.cost = run.half_tiles * (kGradStep + (drops ? kMaskCost : 0.0)) + kItemCost;
            for (int block = 0; block < kClusterSize; ++block) {
                Item& item = pair.items[block];
                item.kind = kind;
                item.row = run.first_row;
                item.column = column + block * kGradColumns;
                item.steps = run.half_tiles;
                item.s_row = run.s_row;
                fill_segment(item, layout.segments[static_cast<std::size_t>(run.segment)], run.chunk);
            }
            pairs.push_back(pair);
        }
    }
}

double total_cost(const std::vector<Pair>& pairs) {
    double total = 0.0;
    for (const auto& pair : pairs) total += pair.cost;
    return total;
}

// The order in which output tiles and gradients are dealt. First the gradients that take longer than a tile, which
// would else stick out at the end; then the tiles, `share` of the other gradients spread among them; then the remaining
// ones, which fill the wave that the tiles leave unfinished.
std::vector<Pair> interleave(const std::vector<Pair>& base, const std::vector<Pair>& gradients, double share) {
    if (base.empty()) return gradients;
    std::vector<Pair> merged;
    std::vector<Pair> shorter;
    for (const auto& pair : gradients) (pair.cost > base.front().cost ? merged : shorter).push_back(pair);
    std::stable_sort(merged.begin(), merged.end(), [](const Pair& a, const Pair& b) { return a.cost > b.cost; });
    const double base_total = total_cost(base);
    const double spread = share * total_cost(shorter);
    double base_done = 0.0;
    double shorter_done = 0.0;
    std::size_t next = 0;
    for (const auto& pair : base) {
        merged.push_back(pair);
        base_done += pair.cost;
        while (next < shorter.size() && shorter_done * base_total < spread * base_done) {
            shorter_done += shorter[next].cost;
            merged.push_back(shorter[next++]);
        }
    }
    merged.insert(merged.end(), shorter.begin() + static_cast<std::ptrdiff_t>(next), shorter.end());
    return merged;
}

struct Dealt {
    std::vector<std::vector<const Pair*>> lists;
    double makespan = 0.0;
};

// Deals `downs`, at most `downs_each` to a cluster, then each of `rest` to the cluster that is free first.
Dealt deal(const std::vector<Pair>& downs, const std::vector<Pair>& rest, int downs_each, bool extra_first,
           int clusters) {
    Dealt dealt;
    dealt.lists.resize(static_cast<std::size_t>(clusters));
    std::vector<double> busy(static_cast<std::size_t>(clusters), 0.0);
    const std::size_t used =
        (downs.size() + static_cast<std::size_t>(downs_each) - 1) / static_cast<std::size_t>(downs_each);
    for (std::size_t i = 0; i < downs.size(); ++i) {
        const std::size_t cluster = i % used % busy.size();
        dealt.lists[cluster].push_back(&downs[i]);
        busy[cluster] += downs[i].cost;
    }
    const double downs_done = *std::max_element(busy.begin(), busy.end());
    for (const auto& pair : rest) {
        const auto cluster = static_cast<std::size_t>(std::min_element(busy.begin(), busy.end()) - busy.begin());
        const bool waits = pair.items[0].kind == Kind::kGradA || (pair.items[0].kind == Kind::kBase && extra_first);
        const double start = waits ? std::max(busy[cluster], downs_done) : busy[cluster];
        busy[cluster] = std::max(start + pair.cost, downs_done);
        dealt.lists[cluster].push_back(&pair);
    }
    dealt.makespan = *std::max_element(busy.begin(), busy.end());
    return dealt;
}

}  // namespace

TickLayout::TickLayout(std::int64_t token_count, std::vector<Segment> given) : segments(std::move(given)) {
    tokens = static_cast<int>(token_count);
    tiles = ceil_div(tokens, kTileRows);
    std::vector<std::vector<Extra>> by_tile(static_cast<std::size_t>(tiles));
    int blocks = 0;
    for (std::size_t i = 0; i < segments.size(); ++i) {
        const Segment& segment = segments[i];
        if (segment.start >= segment.stop) continue;
        const int first_tile = segment.start / kTileRows;
        const int last_tile = (segment.stop - 1) / kTileRows;
        const int first_row = segment.start / kStepDepth * kStepDepth;
        for (int chunk = 0; chunk < segment.rank; chunk += kStepDepth) {
            for (int tile = first_tile; tile <= last_tile; ++tile) {
                const int s_row = (blocks + tile - first_tile) * kTileRows;
                downs.push_back({tile, static_cast<int>(i), chunk, s_row});
                by_tile[static_cast<std::size_t>(tile)].push_back({s_row, segment.pool_column + chunk, {0, 0}});
            }
            runs.push_back({static_cast<int>(i), chunk, first_row, ceil_div(segment.stop - first_row, kStepDepth),
                            blocks * kTileRows + first_row - first_tile * kTileRows});
            blocks += last_tile - first_tile + 1;
        }
    }
    saved_rows = blocks * kTileRows;
    std::stable_sort(downs.begin(), downs.end(), [](const Down& a, const Down& b) { return a.tile < b.tile; });
    extra_begin.push_back(0);
    for (const auto& list : by_tile) {
        extras.insert(extras.end(), list.begin(), list.end());
        extra_begin.push_back(static_cast<int>(extras.size()));
        ready_target.push_back(2 * static_cast<int>(list.size()));  // each block is written by two warpgroups
    }
    ready_target.push_back(2 * static_cast<int>(downs.size()));
}

Schedule make_schedule(const TickLayout& layout, const LaunchShape& shape, int clusters) {
    const bool backward = shape.grad_b_features > 0;
    const std::vector<Pair> downs = down_pairs(layout, shape);
    const std::vector<Pair> base = shape.outputs > 0 ? base_pairs(layout, shape) : std::vector<Pair>{};
    std::vector<Pair> gradients;
    if (backward) {
        add_gradient_pairs(layout, Kind::kGradB, shape.grad_b_features, false, gradients);
        add_gradient_pairs(layout, Kind::kGradA, shape.grad_a_features, shape.drops, gradients);
    }
    const bool extra_first = backward && shape.drops;

    // Of a few ways to deal, the one with the shortest simulated run; the more the gradients are spread the better,
    // else.
    Dealt best;
    best.makespan = std::numeric_limits<double>::max();
    std::list<std::vector<Pair>> orders;  // Dealt points into them
    for (const double share : {1.0, 0.5, 0.0}) {
        orders.push_back(interleave(base, gradients, share));
        for (int downs_each = 1; downs_each <= (extra_first ? 1 : 4); ++downs_each) {
            Dealt dealt = deal(downs, orders.back(), downs_each, extra_first, clusters);
            if (dealt.makespan < best.makespan) best = std::move(dealt);
        }
        if (gradients.empty()) break;
    }

    Schedule schedule;
    schedule.offsets.push_back(0);
    for (const auto& list : best.lists) {
        for (const Pair* pair : list)
            schedule.items.insert(schedule.items.end(), pair->items, pair->items + kClusterSize);
        schedule.offsets.push_back(static_cast<int>(schedule.items.size()) / kClusterSize);
    }
    return schedule;
}

}  // namespace alto::cuda
