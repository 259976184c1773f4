// Tasks that are given GPUs ahead of the list: past their deadline, of raised priority, or begun before.
#pragma once

#include <vector>

#include "kept.hpp"
#include "model.hpp"

namespace alto {

class AheadOfList {
  public:
    // What becomes overdue later than now is left to the plan of that time.
    AheadOfList(const Problem& problem, const Allotment& allotment, const std::vector<int>& order);

    [[nodiscard]] bool empty() const { return row_.empty(); }

    // GPUs are taken until `end_s`.
    void taken(const PartOut& part, double end_s);

    // Who is served now: higher priority first, then those that waited beyond the longest patience and longest, then
    // the other overdue ones by the list (longest overdue first where there is no longest patience); 16 at a time, and
    // three of those that are merely overdue: keeping GPUs for more costs the others much.
    // `started` is per task.
    const std::vector<int>& served(const std::vector<char>& started);

    // Keep for `task` the GPUs that become free for it first.
    void hold(int task, const Shape& shape, double seconds, double now_s, const FreeNodes& nodes, KeptNodes& kept);

  private:
    const Problem& problem_;
    void sort_ends(int node);

    std::vector<double> free_s_;    // per node and GPU
    std::vector<double> ends_s_;    // per width and node: when so many of its GPUs are free, whatever is kept of them
    std::size_t stride_ = 0;        // of a width in it
    std::vector<int> row_;          // all who go ahead, first in line first
    std::vector<char> is_overdue_;  // per task: in the row, and neither of raised priority nor begun
    std::size_t next_ = 0;
    std::vector<int> served_;
};

}  // namespace alto
