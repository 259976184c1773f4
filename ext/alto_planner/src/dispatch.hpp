// List scheduling by events: whenever GPUs become free, start the tasks that fit, first of the list first.
#pragma once

#include <vector>

#include "model.hpp"

namespace alto {

struct DispatchOptions {
    bool bounded_wait = true;    // tasks past their deadline, or of raised priority, are given GPUs ahead of the list
    bool empty_cluster = false;  // ignore what runs, windows, quotas and release times: a packing on empty nodes
};

// Place every task of `order` (task indices, first is first in line) with the choices of `allotment`.
// Feasible for any input; tasks that cannot be placed (no eligible node, quota too small) keep start_s = kNever.
Schedule dispatch(const Problem& problem, const Allotment& allotment, const std::vector<int>& order,
                  const DispatchOptions& options = {});

}  // namespace alto
