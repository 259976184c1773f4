// The order of tasks on the units of a packing: mean completion as low as the makespan allows.
#pragma once

#include <vector>

#include "clock.hpp"
#include "packing.hpp"

namespace alto {

// Start times, seconds from now, one per task position of `packing`, none ending after `limit_s` (which must be at
// least the packing's largest load). `weights` are per task position. Local search by insertions, tree by tree.
std::vector<double> sequence(const Packing& packing, const std::vector<double>& weights, double limit_s, Effort& effort,
                             Random& random);

}  // namespace alto
