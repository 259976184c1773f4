#include "ahead.hpp"

#include <algorithm>
#include <bit>

namespace alto {
namespace {

constexpr std::size_t kMostServed = 16;  // at the same time
constexpr int kOverdueServed = 3;        // of them, merely overdue

}  // namespace

AheadOfList::AheadOfList(const Problem& problem, const Allotment& allotment, const std::vector<int>& order)
    : problem_(problem) {
    struct Due {
        int priority;
        bool overdue;  // for less than the longest patience
        double due_s;
        int task;
    };
    std::vector<Due> due;
    const double longest_s = problem.longest_patience_s();
    int lowest = std::numeric_limits<int>::max();
    for (int task : order) lowest = std::min(lowest, problem.tasks[task].priority);
    for (int task : order) {
        const Task& row = problem.tasks[task];
        if (allotment[task] < 0 || row.not_before_s > problem.now_s) continue;
        const double due_s = row.arrived_s + problem.patience_s(allotment[task]);
        if (row.priority == lowest && !row.begun && due_s > problem.now_s) continue;
        if (problem.shapes[problem.choices[allotment[task]].shape].parts.empty()) continue;
        const double last_s = row.arrived_s + longest_s;
        const bool overdue = row.priority == lowest && !row.begun && last_s > problem.now_s;
        // With a longest patience nobody is passed over for ever, and the small ones among the overdue may go first.
        const double turn_s = overdue && longest_s < kNever ? problem.now_s : std::min(due_s, problem.now_s);
        due.push_back({row.priority, overdue, row.begun ? row.arrived_s : turn_s, task});
    }
    std::stable_sort(due.begin(), due.end(), [](const Due& a, const Due& b) {
        if (a.priority != b.priority) return a.priority > b.priority;
        return a.overdue != b.overdue ? b.overdue : a.due_s < b.due_s;
    });
    if (due.empty()) return;
    is_overdue_.assign(problem.tasks.size(), 0);
    for (const Due& one : due) {
        row_.push_back(one.task);
        is_overdue_[one.task] = one.priority == lowest && !problem.tasks[one.task].begun;
    }
    free_s_.assign(problem.nodes.size() * kMaxGpus, problem.now_s);
    for (const Pinned& pinned : problem.pinned) taken({pinned.node, pinned.gpus}, pinned.end_s);
}

void AheadOfList::taken(const PartOut& part, double end_s) {
    for (Mask left = part.gpus; left; left &= left - 1) free_s_[part.node * kMaxGpus + std::countr_zero(left)] = end_s;
}

const std::vector<int>& AheadOfList::served(const std::vector<char>& started) {
    std::erase_if(served_, [&](int task) { return started[task] != 0; });
    auto overdue_served = std::count_if(served_.begin(), served_.end(), [&](int task) { return is_overdue_[task]; });
    while (served_.size() < kMostServed && next_ < row_.size()) {
        const int task = row_[next_];
        if (is_overdue_[task] && overdue_served >= kOverdueServed && !started[task]) break;
        ++next_;
        if (started[task]) continue;
        served_.push_back(task);
        overdue_served += is_overdue_[task];
    }
    return served_;
}

void AheadOfList::hold(int task, const Shape& shape, double seconds, double now_s, const FreeNodes& nodes,
                       KeptNodes& kept) {
    std::vector<PartOut> parts;
    double from_s = now_s;
    for (int width : shape.parts) {
        double best_s = kNever;
        PartOut best{-1, 0};
        for (std::size_t n = 0; n < problem_.nodes.size(); ++n) {
            const int node = static_cast<int>(n);
            if (!nodes.ready(node) || !shape.eligible[nodes.node_class(node)]) continue;
            if (std::any_of(parts.begin(), parts.end(), [&](const PartOut& part) { return part.node == node; }))
                continue;
            kept.earliest(node, width, seconds, &free_s_[n * kMaxGpus], now_s, best_s, best);
        }
        if (best.node < 0) return;
        parts.push_back(best);
        from_s = std::max(from_s, best_s);
    }
    kept.hold(task, std::move(parts), from_s);
}

}  // namespace alto
