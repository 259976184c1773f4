// Packing by halves: every width is a power of two, so GPUs form binary trees and each task sits on one tree node.
//
// A unit is a group of 2^k neighbouring GPUs, inside a node or made of whole nodes. When narrow tasks go before wide
// ones on every GPU, no GPU ever idles before its last task, so the makespan is the largest load of a GPU: the sum of
// the durations of all tasks on the units that contain it. Improving the packing then needs no scheduling at all.
#pragma once

#include <optional>
#include <vector>

#include "clock.hpp"
#include "model.hpp"

namespace alto {

struct Unit {
    int first_leaf = 0;
    int width = 0;
    int root = 0;  // units under different roots never meet
    int node_class = 0;
};

class Packing {
  public:
    // Nothing when the problem is not of this form: other widths, or anything but sizes to tell tasks apart.
    static std::optional<Packing> make(const Problem& problem, const Allotment& allotment);

    // Put every task where the load is least: widest first, longest first.
    void fill();
    // Simulated annealing towards a largest load of at most `lower` seconds; one round is a fixed number of moves.
    void improve(double lower, Effort& effort, Random& random);

    [[nodiscard]] double largest_load() const;
    [[nodiscard]] const std::vector<int>& tasks() const { return tasks_; }
    [[nodiscard]] const std::vector<int>& unit_of() const { return unit_of_; }  // per task position
    [[nodiscard]] const std::vector<Unit>& units() const { return units_; }
    [[nodiscard]] double offset(int leaf) const { return offset_[leaf]; }
    [[nodiscard]] int leaves() const { return static_cast<int>(offset_.size()); }
    [[nodiscard]] int roots() const { return roots_; }
    [[nodiscard]] double seconds(int position) const { return seconds_[position]; }
    [[nodiscard]] bool alike(int a, int b) const { return group_[a] == group_[b]; }
    // The units that may hold a task.
    [[nodiscard]] const std::vector<int>& candidates(int position) const { return candidates_[group_[position]]; }

    // A schedule from start times, relative to now, and units, one of each per task position.
    [[nodiscard]] Schedule schedule(const Problem& problem, const Allotment& allotment,
                                    const std::vector<double>& starts, const std::vector<int>& unit_of) const;

  private:
    static constexpr int kLevels = 24;  // log2 of the widest unit is below this
    struct Leaf {
        int node, gpu;
    };
    bool build_units(const Problem& problem, int widest);
    [[nodiscard]] double change(int unit, double seconds, double target) const;
    [[nodiscard]] int width(int position) const { return units_[candidates_[group_[position]][0]].width; }
    void add(int unit, double seconds);
    // Restrict what moves to the largest tasks, or let all move; loads then count what moves alone.
    void activate(std::size_t largest);
    void place_least_loaded(int position);
    void reload();
    bool improve_largest(double lower, Effort& effort, Random& random);
    bool anneal(double target, double hot_share, long rounds, Effort& effort, Random& random);
    double relocate(double target, double temperature, Random& random);
    double exchange_contents(double target, double temperature, Random& random);
    [[nodiscard]] int moved_unit(int unit, const Unit& u, const Unit& v) const;
    double exchange(double target, double temperature, Random& random);

    std::vector<Unit> units_;
    std::vector<Leaf> leaf_;
    std::vector<double> offset_;  // when each GPU becomes free, seconds from now
    std::vector<double> load_;    // offset plus everything on it
    int roots_ = 0;
    std::vector<int> tasks_;  // task indices of the problem
    std::vector<double> seconds_;
    std::vector<int> group_;                    // per task position: index into candidates_
    std::vector<std::vector<int>> candidates_;  // units that may hold a shape
    std::vector<int> by_area_;                  // task positions, largest first
    std::vector<int> active_;                   // positions of the tasks that move
    std::vector<std::vector<int>> same_width_;  // per log2 width: active positions
    std::vector<int> unit_of_;
    std::vector<int> unit_at_;                 // per leaf and log2 width: the unit that begins there
    std::vector<int> inside_;                  // scratch
    std::vector<std::vector<char>> eligible_;  // per group, per node class
};

}  // namespace alto
