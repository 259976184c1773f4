// A plan made of a node for each task and an order on each node, as CP-SAT gives it: who gets which GPUs when.
#pragma once

#include <utility>
#include <vector>

#include "model.hpp"

namespace alto {

// Place rigid tasks of one part: `rows` are (task, node), first is first on its node. Each starts as soon as enough
// GPUs are free there. Then the order on each node is improved by moving single tasks: mean completion, weighted by
// `weights`, as low as that finds without any end after the latest one of the order given.
Schedule settle(const Problem& problem, const std::vector<std::pair<int, int>>& rows,
                const std::vector<double>& weights);

}  // namespace alto
