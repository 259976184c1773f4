// The problem and the schedule, as columns. Times are seconds on the snapshot's clock.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace alto {

inline constexpr double kNever = std::numeric_limits<double>::infinity();
inline constexpr int kMaxGpus = 64;
inline constexpr double kSameTime = 1e-9;
using Mask = std::uint64_t;

// Nodes of one class are interchangeable: same kind, memory and number of GPUs.
struct NodeClass {
    int kind = 0;
    std::int64_t memory_bytes = 0;
    int gpus = 0;
    int ready_nodes = 0;
};

struct Node {
    int node_class = 0;
    int gpus = 0;
    bool ready = true;
};

// What a choice asks for, without its duration: the widths of its parts (descending) and the classes that may hold
// them.
struct Shape {
    int gpus = 0;
    int kind = -1;  // -1: any
    std::int64_t memory_bytes = 0;
    bool one_node = false;
    std::vector<int> parts;      // empty: no ready nodes can hold it
    std::vector<char> eligible;  // per node class
};

struct Choice {
    int shape = 0;
    double seconds = 0;
};

struct Task {
    int first_choice = 0;
    int choices = 0;
    int tenant = 0;
    int priority = 0;
    double arrived_s = 0;
    double not_before_s = -kNever;
    bool begun = false;  // it held GPUs before: it keeps its turn
};

// GPUs that are taken until `end_s` by something that runs (tenant >= 0) and then become free.
struct Pinned {
    int node = 0;
    Mask gpus = 0;
    double end_s = 0;
    int tenant = -1;
};

// GPUs kept free during [start_s, end_s).
struct Window {
    int node = 0;
    Mask gpus = 0;
    double start_s = 0;
    double end_s = 0;
};

struct Tenant {
    double weight = 1;
    double usage_gpu_s = 0;
    double quota_gpus = kNever;
    double borrow_gpus = kNever;
    int cohort = -1;
};

struct Objective {
    double makespan = 1;
    double completion = 1;
    double lateness = 1;
    double patience = 10;
    double min_patience_s = 3600;
    double fairness = 1;
    double longest_wait_s = kNever;
};

struct Problem {
    double now_s = 0;
    std::vector<NodeClass> classes;
    std::vector<Node> nodes;
    std::vector<Shape> shapes;
    std::vector<Choice> choices;
    std::vector<Task> tasks;  // by area, smallest first: most lists then read memory from front to back
    std::vector<int> row;     // per task: its place in the snapshot's queue
    std::vector<Pinned> pinned;
    std::vector<Window> windows;
    std::vector<Tenant> tenants;
    Objective objective;
    bool has_quotas = false;

    // How long any task may wait before GPUs are kept for it ahead of those that are overdue for less.
    [[nodiscard]] double longest_patience_s() const {
        return std::max(objective.longest_wait_s, objective.min_patience_s);
    }
    // How long a task may wait before GPUs are kept for it.
    [[nodiscard]] double patience_of(double seconds) const {
        return std::min(std::max(objective.patience * seconds, objective.min_patience_s), longest_patience_s());
    }
    [[nodiscard]] double patience_s(int choice) const { return patience_of(choices[choice].seconds); }

    // Whether tasks are equal but for their sizes: nothing overdue, reserved, limited, held back, begun
    // before or of raised priority.
    [[nodiscard]] bool plain(const std::vector<int>& allotment) const {
        if (!windows.empty() || has_quotas) return false;
        for (std::size_t i = 0; i < tasks.size(); ++i) {
            if (allotment[i] < 0) continue;
            if (tasks[i].priority != tasks[0].priority || tasks[i].not_before_s > now_s || tasks[i].begun) return false;
            if (tasks[i].arrived_s + patience_s(allotment[i]) <= now_s) return false;
        }
        return true;
    }

    [[nodiscard]] int ready_gpus() const {
        int total = 0;
        for (const Node& node : nodes) total += node.ready ? node.gpus : 0;
        return total;
    }
};

// One choice per task, chosen before scheduling; -1 for a task that no ready node can hold.
using Allotment = std::vector<int>;

struct PartOut {
    int node = 0;
    Mask gpus = 0;
};

struct Schedule {
    Allotment choice;             // index into Problem::choices, or -1
    std::vector<double> start_s;  // kNever for a task without a place
    std::vector<int> first_part;
    std::vector<int> part_count;
    std::vector<PartOut> parts;

    explicit Schedule(std::size_t tasks = 0)
        : choice(tasks, -1), start_s(tasks, kNever), first_part(tasks, 0), part_count(tasks, 0) {}

    [[nodiscard]] bool placed(std::size_t task) const { return start_s[task] < kNever; }
    [[nodiscard]] double end_s(const Problem& problem, std::size_t task) const {
        return start_s[task] + problem.choices[choice[task]].seconds;
    }
};

}  // namespace alto
