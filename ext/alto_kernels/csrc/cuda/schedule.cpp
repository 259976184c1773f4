#include "schedule.hpp"

#include <algorithm>
#include <limits>
#include <utility>

namespace alto::cuda {
namespace {

// Simulated costs in base steps (128 x 256 x 64 on one multiprocessor).
constexpr double kLightStep = 0.65;  // a down or gradient step: bound by its loads
constexpr double kMaskedStep = 2.0;  // the same with dropout
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
    pair.cost = steps * (masked ? kMaskedStep : kLightStep) + kItemCost;
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
      pair.cost = run.half_tiles * (drops ? kMaskedStep : kLightStep) + kItemCost;
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

// Both lists in their own order, advanced in proportion to their cost.
std::vector<Pair> interleave(const std::vector<Pair>& base, const std::vector<Pair>& gradients) {
  double base_total = 0.0;
  double gradient_total = 0.0;
  for (const auto& pair : base) base_total += pair.cost;
  for (const auto& pair : gradients) gradient_total += pair.cost;
  std::vector<Pair> merged;
  double base_done = 0.0;
  double gradient_done = 0.0;
  std::size_t next = 0;
  for (const auto& pair : base) {
    merged.push_back(pair);
    base_done += pair.cost;
    while (next < gradients.size() && gradient_done * base_total < gradient_total * base_done) {
      gradient_done += gradients[next].cost;
      merged.push_back(gradients[next++]);
    }
  }
  merged.insert(merged.end(), gradients.begin() + static_cast<std::ptrdiff_t>(next), gradients.end());
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
  const std::size_t used = (downs.size() + static_cast<std::size_t>(downs_each) - 1) / static_cast<std::size_t>(downs_each);
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
  const std::vector<Pair> rest = interleave(base, gradients);
  const bool extra_first = backward && shape.drops;

  Dealt best;
  best.makespan = std::numeric_limits<double>::max();
  for (int downs_each = 1; downs_each <= 4; ++downs_each) {
    Dealt dealt = deal(downs, rest, downs_each, extra_first, clusters);
    if (dealt.makespan < best.makespan) best = std::move(dealt);
    if (extra_first) break;
  }

  Schedule schedule;
  schedule.offsets.push_back(0);
  for (const auto& list : best.lists) {
    for (const Pair* pair : list) schedule.items.insert(schedule.items.end(), pair->items, pair->items + kClusterSize);
    schedule.offsets.push_back(static_cast<int>(schedule.items.size()) / kClusterSize);
  }
  return schedule;
}

}  // namespace alto::cuda
