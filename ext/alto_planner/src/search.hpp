// Local search over the order of the list, each order judged by dispatching it. Works for every problem.
#pragma once

#include <vector>

#include "clock.hpp"
#include "evaluate.hpp"
#include "model.hpp"

namespace alto {

struct Candidate {
    Schedule schedule;
    Score score;
    std::vector<int> order;
    const char* source = "";
};

// Improve `best` in place; one round is one dispatch. Stops early when the objective cannot get better.
void search_orders(const Problem& problem, const Bounds& bounds, const std::vector<double>& weights, Candidate& best,
                   Effort& effort, Random& random);

}  // namespace alto
