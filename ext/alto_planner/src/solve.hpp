// From problem to the best schedule found, with its bounds and the work that found it.
#pragma once

#include <array>
#include <string>

#include "evaluate.hpp"
#include "model.hpp"

namespace alto {

struct Request {
    double budget_s = 0;  // time for improvement beyond the fast lists
    unsigned long long seed = 0;
    // Rounds of packing, sequencing and order search; negative: as the budget allows. An answer's `effort` given back
    // here repeats that answer exactly.
    std::array<long, 3> effort{-1, -1, -1};
    std::string only;  // one list alone: "fifo", "longest", "shortest", "smallest_area", "mirrored"; empty: all
};

struct Answer {
    Schedule schedule;
    Score score;
    Bounds bounds;
    std::string source;
    std::array<long, 3> effort{0, 0, 0};  // all -1: no search was made
};

Answer solve(const Problem& problem, const Request& request);

}  // namespace alto
