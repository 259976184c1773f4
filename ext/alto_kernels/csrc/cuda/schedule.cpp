#include "schedule.hpp"

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>
#include <queue>
#include <utility>

namespace alto::cuda {
namespace {

// Simulated costs in base steps (128 x 256 x 64 on one multiprocessor, 0.7 us), from timelines of an H100. What is not
// bounded by arithmetic costs a round trip of its stage, a quarter of the latency of the ring, however little it loads.
constexpr double kTileCost = 3.0;        // around the steps of an output tile
constexpr double kDownStageCost = 0.95;  // of S blocks, and for each part
constexpr double kDownPartCost = 0.06;
constexpr double kDownCost = 7.0;  // around them
constexpr double kGradientStepCost = 1.1;
constexpr double kGradientCost = 2.0;       // around a gradient's steps,
constexpr double kGradientBlockCost = 0.6;  // and of each 64 features: for each S block,
constexpr double kGradientPartCost = 0.2;   // for each part,
constexpr double kGradientColumnCost =
    0.03;                              // of each rank column that is written, and as much again if it is added to
constexpr double kCrowdedCost = 1.15;  // by which a gradient takes longer where all clusters make gradients
constexpr double kUnsharedCost = 1.2;  // of an extra step whose pool columns each block loads for itself
constexpr double kMaskCost = 0.75;     // of dropout, for each 64 x 64 that a warpgroup masks
constexpr double kMaskTileCost = 4.0;  // the same for the low-rank part of a tile of dX

// So many clusters may make gradients while others make tiles; each one more slows all by this part of the run, with
// what it reads and writes.
constexpr int kGradientClusters = 4;
constexpr double kSlowedBy = 0.003;

int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct Pair {
    Item items[kClusterSize];
    double cost;
};

// The size of groups of at most `limit` parts, as even as can be.
int group_size(int parts, int limit) { return parts == 0 ? 1 : ceil_div(parts, ceil_div(parts, limit)); }

std::vector<Part> down_parts(const TickLayout& layout, int tile, int first_module, int last_module) {
    std::vector<Part> parts;
    if (tile >= layout.tiles) return parts;
    for (const auto& block : layout.blocks[static_cast<std::size_t>(tile)])
        for (int module = first_module; module < last_module; ++module)
            parts.push_back(
                {block.s_row, layout.window_columns[static_cast<std::size_t>(block.window)], module, block.window});
    return parts;
}

// The S blocks of two tiles for modules [first_module, last_module), which are read from the same operand.
void add_down_pairs(const TickLayout& layout, const LaunchShape& shape, int limit, int row_pair, int first_module,
                    int last_module, std::vector<Pair>& pairs) {
    const int contraction =
        shape.backward ? shape.out_features[static_cast<std::size_t>(first_module)] : shape.in_features;
    std::vector<Part> lists[kClusterSize];
    bool masked = false;
    int longest = 0;
    for (int block = 0; block < kClusterSize; ++block) {
        const int tile = row_pair * kClusterSize + block;
        lists[block] = down_parts(layout, tile, first_module, last_module);
        longest = std::max(longest, static_cast<int>(lists[block].size()));
        masked |= !shape.backward && tile < layout.tiles && layout.drops[static_cast<std::size_t>(tile)];
    }
    const int size = group_size(longest, limit);
    for (int first = 0; first < longest; first += size) {
        const int count = std::min(size, longest - first);
        bool shared = true;
        for (int i = first; i < first + count; ++i) {
            const auto at = static_cast<std::size_t>(i);
            shared &= at < lists[0].size() && at < lists[1].size() && lists[0][at].detail == lists[1][at].detail;
        }
        Pair pair{};
        for (int block = 0; block < kClusterSize; ++block) {
            Item& item = pair.items[block];
            item.kind = Kind::kDown;
            item.flags = (shared ? kShared : 0) | (masked ? kMasked : 0);
            item.row = (row_pair * kClusterSize + block) * kTileRows;
            item.block_count = item.part_count = count;
            item.steps = ceil_div(contraction, down_depth(count));
            for (int i = 0; i < count; ++i) {
                const auto at = static_cast<std::size_t>(first + i);
                item.parts[i] = at < lists[block].size() ? lists[block][at] : Part{0, 0, first_module, -1};
            }
        }
        const int stages = pair.items[0].steps * down_stages(count);
        pair.cost = stages * (kDownStageCost + kDownPartCost * count) + kDownCost +
                    (masked ? ceil_div(contraction, kStepDepth) * kMaskCost : 0.0);
        pairs.push_back(pair);
    }
}

// `limit` parts at most in an item: more read the operand less often, fewer are done sooner.
std::vector<Pair> down_pairs(const TickLayout& layout, const LaunchShape& shape, int limit) {
    std::vector<Pair> pairs;
    const int modules = static_cast<int>(shape.out_features.size());
    // Each module has its own dY, and its own mask on X.
    const bool together = !shape.backward && !shape.drops;
    for (int row_pair = 0; row_pair < ceil_div(layout.tiles, kClusterSize); ++row_pair) {
        if (together) {
            add_down_pairs(layout, shape, limit, row_pair, 0, modules, pairs);
        } else {
            for (int module = 0; module < modules; ++module)
                add_down_pairs(layout, shape, limit, row_pair, module, module + 1, pairs);
        }
    }
    return pairs;
}

// Whether the two tiles have the same windows, in the same order.
bool same_windows(const TickLayout& layout, int row_pair) {
    const int tile = row_pair * kClusterSize;
    if (tile + 1 >= layout.tiles) return false;
    const auto& one = layout.blocks[static_cast<std::size_t>(tile)];
    const auto& two = layout.blocks[static_cast<std::size_t>(tile) + 1];
    return std::equal(one.begin(), one.end(), two.begin(), two.end(),
                      [](const auto& a, const auto& b) { return a.window == b.window; });
}

Pair base_pair(const TickLayout& layout, const LaunchShape& shape, int row_pair, int column, int module) {
    int steps = 0;
    int modules = 1;
    if (shape.backward) {
        for (const int features : shape.out_features) steps += ceil_div(features, kStepDepth);
        modules = static_cast<int>(shape.out_features.size());
    } else {
        steps = ceil_div(shape.in_features, kStepDepth);
    }
    Pair pair{};
    int extra_steps = 0;
    const bool shared = same_windows(layout, row_pair);
    for (int block = 0; block < kClusterSize; ++block) {
        const int tile = row_pair * kClusterSize + block;
        Item& item = pair.items[block];
        item.kind = Kind::kBase;
        item.flags = shared ? kShared : 0;
        item.row = tile * kTileRows;
        item.column = column;
        item.steps = steps;
        item.module = module;
        if (tile < layout.tiles) {
            const auto at = static_cast<std::size_t>(tile);
            item.extra_begin = layout.extra_begin[at];
            item.extra_count = layout.extra_begin[at + 1] - item.extra_begin;
        }
        extra_steps = std::max(extra_steps, item.extra_count);
    }
    for (Item& item : pair.items) item.extra_steps = extra_steps;
    pair.cost = steps + modules * extra_steps * (shared ? 1.0 : kUnsharedCost) + kTileCost +
                (shape.drops && shape.backward ? kMaskTileCost : 0.0);
    return pair;
}

std::vector<Pair> base_pairs(const TickLayout& layout, const LaunchShape& shape) {
    std::vector<Pair> pairs;
    if (shape.backward && !shape.wants_output) return pairs;
    const int row_pairs = ceil_div(layout.tiles, kClusterSize);
    const int modules = shape.backward ? 1 : static_cast<int>(shape.out_features.size());
    for (int group = 0; group < row_pairs; group += shape.pairs_in_group) {
        for (int module = 0; module < modules; ++module) {
            const int outputs =
                shape.backward ? shape.in_features : shape.out_features[static_cast<std::size_t>(module)];
            for (int column = 0; column < outputs; column += kTileColumns)
                for (int row_pair = group; row_pair < std::min(group + shape.pairs_in_group, row_pairs); ++row_pair)
                    pairs.push_back(base_pair(layout, shape, row_pair, column, module));
        }
    }
    return pairs;
}

// The gradients of one run for parts that are read with the same rows: those of dY (B) or of X (A).
void add_gradient_pairs(const TickLayout& layout, const TickLayout::Run& run, Kind kind, int features,
                        const std::vector<Part>& parts, bool one_block, std::vector<Pair>& pairs) {
    const Segment& segment = layout.segments[static_cast<std::size_t>(run.pieces.front().segment)];
    const bool masked = kind == Kind::kGradA && segment.threshold != std::numeric_limits<std::int32_t>::min();
    const int size = group_size(static_cast<int>(parts.size()), kMaxParts);
    for (int first = 0; first < static_cast<int>(parts.size()); first += size) {
        const int count = std::min(size, static_cast<int>(parts.size()) - first);
        Item item{};
        item.kind = kind;
        item.flags = segment.fresh ? kFresh : 0;
        item.row = run.first_row;
        item.steps = run.half_tiles;
        item.block_count = one_block ? 1 : count;
        item.part_count = count;
        item.start = std::numeric_limits<int>::max();
        item.threshold = segment.threshold;
        item.keep_factor = segment.keep_factor;
        int rank_columns = 0;
        for (int i = 0; i < count; ++i) {
            const Part& part = item.parts[i] = parts[static_cast<std::size_t>(first + i)];
            item.start = std::min(item.start, part.start);
            item.stop = std::max(item.stop, part.stop);
            const int columns = std::min(part.rank - part.detail, kStepDepth);
            rank_columns += columns;
            for (int at = part.column / 8; at < ceil_div(part.column + columns, 8); ++at)
                item.eighths |= 1u << ((one_block ? 0 : i * 8) + at);
        }
        const int boxes = item.block_count == 1 ? 4 : 2;
        const double step = kGradientStepCost + (masked ? kMaskCost * boxes / 2 : 0.0);
        const double cost = item.steps * step + kGradientCost +
                            boxes / 2 *
                                (item.block_count * kGradientBlockCost + count * kGradientPartCost +
                                 rank_columns * kGradientColumnCost * (segment.fresh ? 1.0 : 2.0));
        for (int column = 0; column < features; column += boxes * 64 * kClusterSize) {
            Pair pair{{item, item}, cost};
            for (int block = 0; block < kClusterSize; ++block) pair.items[block].column = column + block * boxes * 64;
            pairs.push_back(pair);
        }
    }
}

std::vector<Part> gradient_parts(const TickLayout& layout, const TickLayout::Run& run, int first_module,
                                 int last_module) {
    std::vector<Part> parts;
    for (const auto& piece : run.pieces) {
        const Segment& segment = layout.segments[static_cast<std::size_t>(piece.segment)];
        for (int module = first_module; module < last_module; ++module)
            parts.push_back({piece.s_row, piece.column, module, piece.chunk, segment.slot, segment.rank, segment.start,
                             segment.stop});
    }
    return parts;
}

std::vector<Pair> gradient_pairs(const TickLayout& layout, const LaunchShape& shape) {
    std::vector<Pair> pairs;
    if (!shape.backward) return pairs;
    const int modules = static_cast<int>(shape.out_features.size());
    for (const auto& run : layout.joint_runs)
        for (int module = 0; module < modules; ++module)
            add_gradient_pairs(layout, run, Kind::kGradB, shape.out_features[static_cast<std::size_t>(module)],
                               gradient_parts(layout, run, module, module + 1), run.one_block, pairs);
    // One pass over X for all modules: each has an S block there.
    for (const auto& run : modules == 1 ? layout.joint_runs : layout.runs)
        add_gradient_pairs(layout, run, Kind::kGradA, shape.in_features, gradient_parts(layout, run, 0, modules),
                           run.one_block && modules == 1, pairs);
    return pairs;
}

using Order = std::vector<const Pair*>;

// How a launch's work is dealt.
struct Deal {
    const std::vector<Pair>* downs = nullptr;
    int down_clusters = 1;      // so many, from the first on, make the S blocks
    int gradient_clusters = 0;  // so many, from the last on, make gradients before tiles
};

struct Work {
    std::vector<std::vector<Pair>> downs;  // the same S blocks, from few passes over the operand or from many
    std::vector<Pair> tiles;
    std::vector<Pair> gradients;
    int row_pairs;
    int clusters;
    bool extra_first;
};

// Deals S blocks, then tiles and gradients, each to the cluster that is free first.
//
// Tiles come one after another, without anything between them: they sweep weight and operand together, and what tears
// that apart costs up to 25 % beside contractions of 14336. So gradients have clusters of their own, all the time that
// there are tiles: what they read and write hides behind products there. What is left of them fills the wave that the
// tiles leave unfinished.
//
// Returns when the simulated run ends; what each cluster does is added to `lists` where these are given.
double deal(const Work& work, const Deal& how, std::vector<Order>* lists) {
    const std::vector<Pair>& downs = *how.downs;
    double makespan = 0.0;
    std::vector<double> busy(static_cast<std::size_t>(work.clusters), 0.0);
    std::vector<double> written(static_cast<std::size_t>(work.row_pairs), 0.0);  // when two tiles have their S blocks
    // In rounds of one for each cluster, so that tiles have their S blocks in the order in which they need them; the
    // longest of a round goes to the cluster that has least.
    const auto size = static_cast<std::size_t>(how.down_clusters);
    for (std::size_t first = 0; first < downs.size(); first += size) {
        Order round;
        for (std::size_t i = first; i < std::min(first + size, downs.size()); ++i) round.push_back(&downs[i]);
        std::stable_sort(round.begin(), round.end(), [](const Pair* a, const Pair* b) { return a->cost > b->cost; });
        std::vector<std::size_t> order(size);
        std::iota(order.begin(), order.end(), std::size_t{0});
        std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return busy[a] < busy[b]; });
        for (std::size_t i = 0; i < round.size(); ++i) {
            if (lists != nullptr) (*lists)[order[i]].push_back(round[i]);
            busy[order[i]] += round[i]->cost;
            double& at = written[static_cast<std::size_t>(round[i]->items[0].row / kTileRows / kClusterSize)];
            at = std::max(at, busy[order[i]]);
        }
    }
    const double all_written = *std::max_element(busy.begin(), busy.end());
    using Free = std::pair<double, std::size_t>;
    std::priority_queue<Free, std::vector<Free>, std::greater<>> free;
    for (std::size_t cluster = 0; cluster < busy.size(); ++cluster) free.emplace(busy[cluster], cluster);
    const auto first_of_gradients = static_cast<std::size_t>(work.clusters - how.gradient_clusters);
    auto tile = work.tiles.begin();
    auto gradient = work.gradients.begin();
    while (tile != work.tiles.end() || gradient != work.gradients.end()) {
        const auto [start, cluster] = free.top();
        free.pop();
        const bool crowded = tile == work.tiles.end();
        const bool takes_tile = gradient == work.gradients.end() || (!crowded && cluster < first_of_gradients);
        const Pair& pair = takes_tile ? *tile++ : *gradient++;
        const Item& item = pair.items[0];
        double end = start + pair.cost * (crowded ? kCrowdedCost : 1.0);
        if (item.kind == Kind::kBase) {
            const double ready = written[static_cast<std::size_t>(item.row / kTileRows / kClusterSize)];
            end = work.extra_first ? std::max(start, ready) + pair.cost : std::max(end, ready + kTileCost);
        } else if (item.kind == Kind::kGradA) {
            end += std::max(0.0, all_written - start);
        }
        makespan = std::max(makespan, end);
        if (lists != nullptr) (*lists)[cluster].push_back(&pair);
        free.emplace(end, cluster);
    }
    makespan = std::max(makespan, all_written);
    return makespan * (1.0 + kSlowedBy * std::max(0, how.gradient_clusters - kGradientClusters));
}

// Of some ways to deal, the one with the shortest simulated run; of equals the first: S blocks from as few passes as
// can be. First how many clusters are for gradients, then how S blocks are made.
Deal best_deal(const Work& work) {
    Deal best;
    double shortest = std::numeric_limits<double>::max();
    const auto consider = [&](const Deal& how) {
        const double makespan = deal(work, how, nullptr);
        if (makespan >= shortest) return;
        shortest = makespan;
        best = how;
    };
    const int down_clusters = std::clamp(static_cast<int>(work.downs.front().size()), 1, work.clusters);
    const int most = work.tiles.empty() || work.gradients.empty() ? 0 : work.clusters / 2;
    for (int count = 0; count <= most; count += count < kGradientClusters ? 1 : count)
        consider({&work.downs.front(), down_clusters, count});
    const int gradient_clusters = best.gradient_clusters;
    for (const auto& downs : work.downs) {
        for (const int each : {1, 2, 3, 4}) {
            const int wanted = ceil_div(static_cast<int>(downs.size()), each);
            if (each > 1 && wanted >= work.clusters) continue;
            consider({&downs, std::clamp(wanted, 1, work.clusters), gradient_clusters});
        }
    }
    return best;
}

}  // namespace

Schedule make_schedule(const TickLayout& layout, const LaunchShape& shape, int clusters) {
    Work work{
        {},       base_pairs(layout, shape),    gradient_pairs(layout, shape), ceil_div(layout.tiles, kClusterSize),
        clusters, shape.backward && shape.drops};
    for (const int limit : {kMaxParts, 2, 1}) {
        std::vector<Pair> downs = down_pairs(layout, shape, limit);
        if (work.downs.empty() || downs.size() != work.downs.back().size()) work.downs.push_back(std::move(downs));
    }
    std::vector<Order> lists(static_cast<std::size_t>(clusters));
    deal(work, best_deal(work), &lists);

    Schedule schedule;
    schedule.offsets.push_back(0);
    for (const auto& list : lists) {
        for (const Pair* pair : list)
            schedule.items.insert(schedule.items.end(), pair->items, pair->items + kClusterSize);
        schedule.offsets.push_back(static_cast<int>(schedule.items.size()) / kClusterSize);
    }
    return schedule;
}

}  // namespace alto::cuda
