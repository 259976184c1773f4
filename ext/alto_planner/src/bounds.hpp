// Proven lower bounds, whatever the plan.
#pragma once

#include "evaluate.hpp"
#include "model.hpp"

namespace alto {

// Makespan: the largest of total area over GPUs, the longest task, and, for every set of node classes and every width,
// the bin-packing bounds of Martello-Toth and Fekete-Schepers (dual feasible functions) with slots of that width as
// bins. Mean completion: the tasks as fluid on one machine, least area first (Eastman, Even, Isaacs).
// The dual feasible functions are left out above `dff_tasks` tasks, where area decides and time matters.
Bounds lower_bounds(const Problem& problem, double known_makespan_s, std::size_t dff_tasks = 6000);

}  // namespace alto
