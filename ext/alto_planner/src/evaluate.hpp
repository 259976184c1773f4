// What a schedule is worth.
#pragma once

#include <vector>

#include "model.hpp"

namespace alto {

struct Bounds {
    double makespan_s = 0;         // from now
    double mean_completion_s = 0;  // from now, unweighted, over the tasks that can be placed
};

struct Score {
    double makespan_s = 0;         // from now, with what runs
    double mean_completion_s = 0;  // from now, unweighted, over placed tasks
    int unplaced = 0;
    double value = 0;  // the objective; lower is better
};

// Weight of each task in the completion term: four times for each level of priority, and up to four times more or less
// for tenants below or above their weighted share of usage, as far as objective.fairness asks. Mean 1.
std::vector<double> completion_weights(const Problem& problem);

Score evaluate(const Problem& problem, const Schedule& schedule, const Bounds& bounds,
               const std::vector<double>& weights);

}  // namespace alto
