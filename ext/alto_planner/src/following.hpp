// Shows the virtual schedule every snapshot in turn. A row object seen in the last snapshot is not read again.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "first_come.hpp"

namespace alto {

class Following {
  public:
    // Carry the schedule on to the time of a snapshot (see alto_placement.planner.model.Snapshot) and take in what it
    // says. Throws ReadError, and then has not followed.
    void follow(pybind11::handle snapshot);

    [[nodiscard]] const FirstCome& schedule() const { return schedule_; }

  private:
    // Rows of a snapshot, and which task of the schedule each one is; -1 for one that is not known yet.
    struct Rows {
        pybind11::tuple objects;
        std::vector<int> tasks;
    };
    static Rows recognised(pybind11::handle rows, const Rows& before);
    void note_gone(const Rows& before);
    void see(int task);

    FirstCome schedule_;
    pybind11::tuple nodes_;
    Rows waiting_, running_;
    long generation_ = 0;
    std::vector<long> seen_;  // per task: in which snapshot it was there last
};

}  // namespace alto
