// Which choice each task takes, and in which order tasks stand in line.
#pragma once

#include <vector>

#include "model.hpp"

namespace alto {

enum class Allot { kBalanced, kLeastArea, kShortest };

// Pick one choice per task. kBalanced takes the least area among the choices no longer than a common length, and the
// length that makes max(total area / GPUs, longest task) least.
Allotment allot(const Problem& problem, Allot rule);

enum class Rule { kSmallestArea, kLongest, kShortest, kLargestArea, kArrival };

// All tasks that have a choice; higher priority first, then by the rule, then by arrival and index.
std::vector<int> list_order(const Problem& problem, const Allotment& allotment, Rule rule);

// `order` with the tasks that last at least `share` of the least conceivable makespan (area over GPUs, or the longest
// task) before all others of their priority: they decide the makespan, the others the mean completion.
std::vector<int> long_first(const Problem& problem, const Allotment& allotment, const std::vector<int>& order,
                            double share);

// Tasks in the order of their starts in `schedule`, within each priority.
std::vector<int> start_order(const Problem& problem, const Schedule& schedule);

// `order` rearranged so that tenants take turns by weighted usage, as far as objective.fairness asks.
std::vector<int> fair_order(const Problem& problem, const Allotment& allotment, const std::vector<int>& order);

// Place largest area first on empty nodes with time running backwards, and turn the result round: `order` is by the
// forward starts, `placed` holds the nodes and GPUs with those starts counted from now.
struct Mirrored {
    std::vector<int> order;
    Schedule placed;
};
Mirrored mirror(const Problem& problem, const Allotment& allotment, Rule rule);

// Keep each task's GPUs and the order of `schedule`'s starts, and start every task as soon as its GPUs are free.
// Only for plain problems (see Problem::plain).
Schedule shift_left(const Problem& problem, const Schedule& schedule);

}  // namespace alto
