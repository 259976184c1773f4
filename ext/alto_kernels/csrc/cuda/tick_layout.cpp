#include <algorithm>
#include <limits>
#include <map>
#include <utility>

#include "schedule.hpp"

namespace alto::cuda {
namespace {

// Half tiles of gradients that are joined.
constexpr int kMostJoint = 16;

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A piece before windows are known.
struct Range {
    int segment;
    int chunk;
    int pool_column;
    int granules;
};

}  // namespace

TickLayout::TickLayout(std::int64_t token_count, std::vector<Segment> given) : segments(std::move(given)) {
    tokens = static_cast<int>(token_count);
    tiles = ceil_div(tokens, kTileRows);
    blocks.resize(static_cast<std::size_t>(tiles));
    drops.resize(static_cast<std::size_t>(tiles));

    std::vector<Range> ranges;
    for (std::size_t i = 0; i < segments.size(); ++i) {
        const Segment& segment = segments[i];
        if (segment.start >= segment.stop) continue;
        for (int chunk = 0; chunk < segment.rank; chunk += kStepDepth)
            ranges.push_back({static_cast<int>(i), chunk, segment.pool_column + chunk,
                              ceil_div(std::min(segment.rank - chunk, kStepDepth), kGranule)});
    }
    std::stable_sort(ranges.begin(), ranges.end(),
                     [](const Range& a, const Range& b) { return a.pool_column < b.pool_column; });

    // Windows in the order of pool columns, each as full as its neighbours allow.
    std::vector<std::pair<int, int>> window_ranges;  // [first, last) of `ranges`
    for (std::size_t i = 0; i < ranges.size(); ++i) {
        const Range& range = ranges[i];
        const int index = static_cast<int>(i);
        if (window_columns.empty() ||
            range.pool_column + range.granules * kGranule > window_columns.back() + kStepDepth) {
            window_columns.push_back(range.pool_column);
            window_ranges.emplace_back(index, index);
        }
        window_ranges.back().second = index + 1;
    }

    // S blocks: a window's tiles get them one after another, so those of a segment are neighbours.
    std::vector<std::vector<Piece>> pieces(segments.size());
    owners.resize(window_columns.size() * kGranules);
    int block_count = 0;
    for (std::size_t window = 0; window < window_columns.size(); ++window) {
        std::map<int, int> block_of_tile;
        for (int i = window_ranges[window].first; i < window_ranges[window].second; ++i) {
            const Range& range = ranges[static_cast<std::size_t>(i)];
            const Segment& segment = segments[static_cast<std::size_t>(range.segment)];
            for (int tile = segment.start / kTileRows; tile <= (segment.stop - 1) / kTileRows; ++tile)
                block_of_tile[tile] = 0;
            for (int granule = 0; granule < range.granules; ++granule) {
                const int column = range.pool_column - window_columns[window] + granule * kGranule;
                owners[window * kGranules + static_cast<std::size_t>(column / kGranule)] = {
                    segment.start, segment.stop,  std::min(segment.rank - range.chunk - granule * kGranule, kGranule),
                    segment.slot,  segment.scale, segment.keep_factor,
                    {0, 0}};
            }
        }
        for (auto& [tile, block] : block_of_tile) {
            block = block_count++;
            blocks[static_cast<std::size_t>(tile)].push_back({static_cast<int>(window), block * kTileRows});
        }
        for (int i = window_ranges[window].first; i < window_ranges[window].second; ++i) {
            const Range& range = ranges[static_cast<std::size_t>(i)];
            const int start = segments[static_cast<std::size_t>(range.segment)].start;
            const int first_row = start / kStepDepth * kStepDepth;
            pieces[static_cast<std::size_t>(range.segment)].push_back(
                {range.segment, range.chunk, range.pool_column - window_columns[window], static_cast<int>(window),
                 block_of_tile[start / kTileRows] * kTileRows + first_row % kTileRows});
        }
    }
    saved_rows = block_count * kTileRows;

    for (std::size_t i = 0; i < segments.size(); ++i) {
        const Segment& segment = segments[i];
        if (segment.start >= segment.stop) continue;
        const int first_row = segment.start / kStepDepth * kStepDepth;
        auto& own = pieces[i];
        const bool one_block = own.size() == 1;
        runs.push_back({first_row, ceil_div(segment.stop - first_row, kStepDepth), std::move(own), one_block});
        if (segment.threshold != std::numeric_limits<std::int32_t>::min())
            for (int tile = segment.start / kTileRows; tile <= (segment.stop - 1) / kTileRows; ++tile)
                drops[static_cast<std::size_t>(tile)] = true;
    }
    join_runs();
    extra_begin.push_back(0);
    for (const auto& list : blocks) {
        for (const Block& block : list)
            extras.push_back({block.s_row, window_columns[static_cast<std::size_t>(block.window)], {0, 0}});
        extra_begin.push_back(static_cast<int>(extras.size()));
        ready_target.push_back(kConsumerWarps * static_cast<int>(list.size()));
    }
    ready_target.push_back(kConsumerWarps * block_count);
}

// Neighbours in a window whose tokens follow each other: fewer gradients, with fuller columns. Not beyond a length that
// still fills the end of a launch.
void TickLayout::join_runs() {
    const auto segment_of = [&](const Run& run) -> const Segment& {
        return segments[static_cast<std::size_t>(run.pieces.front().segment)];
    };
    std::map<int, std::vector<const Run*>> by_window;
    for (const Run& run : runs) {
        if (run.one_block) {
            by_window[run.pieces.front().window].push_back(&run);
        } else {
            joint_runs.push_back(run);
        }
    }
    for (auto& [window, found] : by_window) {
        std::stable_sort(found.begin(), found.end(),
                         [](const Run* a, const Run* b) { return a->first_row < b->first_row; });
        Run* joint = nullptr;
        for (const Run* run : found) {
            if (joint != nullptr) {
                const Segment& one = segment_of(*joint);
                const Segment& two = segment_of(*run);
                Piece piece = run->pieces.front();
                const int rows = run->first_row - joint->first_row;
                const int half_tiles = std::max(joint->half_tiles, rows / kStepDepth + run->half_tiles);
                if (piece.s_row == joint->pieces.front().s_row + rows && one.threshold == two.threshold &&
                    one.fresh == two.fresh && joint->pieces.size() < kMaxParts && half_tiles <= kMostJoint) {
                    piece.s_row -= rows;
                    joint->pieces.push_back(piece);
                    joint->half_tiles = half_tiles;
                    continue;
                }
            }
            joint_runs.push_back(*run);
            joint = &joint_runs.back();
        }
    }
    std::stable_sort(joint_runs.begin(), joint_runs.end(),
                     [](const Run& a, const Run& b) { return a.first_row < b.first_row; });
}

}  // namespace alto::cuda
