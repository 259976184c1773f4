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

    // Who is served now: higher priority first, then longest overdue, then by the list; 16 at a time, and one of those
    // that are merely overdue: keeping GPUs for more shortens the longest wait little and costs the others much.
    // `started` is per task.
    const std::vector<int>& served(const std::vector<char>& started);

    // Keep for `task` the GPUs that become free for it first.
    void hold(int task, const Shape& shape, double seconds, double now_s, const FreeNodes& nodes, KeptNodes& kept);

  private:
    const Problem& problem_;
    std::vector<double> free_s_;  // per node and GPU
    struct Member {
        int task;
        bool overdue;  // and neither of raised priority nor begun
    };
    std::vector<Member> row_;  // all who go ahead, first in line first
    std::size_t next_ = 0;
    std::vector<int> served_;
    int overdue_served_ = -1;
};

}  // namespace alto
