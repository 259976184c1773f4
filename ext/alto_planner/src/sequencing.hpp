// The order of tasks on the units of a packing: mean completion as low as the makespan allows.
#pragma once

#include <vector>

#include "clock.hpp"
#include "packing.hpp"

namespace alto {

// Per task position of a packing.
struct Sequence {
    std::vector<double> start_s;  // from now
    std::vector<int> unit_of;     // tasks may have left the units that the packing gave them
};

// None ends after `limit_s`, which must be at least the packing's largest load. `weights` are per task position. Local
// search: a task moves in the order of its tree, goes to another unit, or two that are alike change places.
Sequence sequence(const Packing& packing, const std::vector<double>& weights, double limit_s, Effort& effort,
                  Random& random);

}  // namespace alto
