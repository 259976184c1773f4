#include "ahead.hpp"

#include <algorithm>
#include <bit>

namespace alto {
namespace {

constexpr std::size_t kMostServed = 16;  // at the same time

}  // namespace

AheadOfList::AheadOfList(const Problem& problem, const Allotment& allotment, const std::vector<int>& order)
    : problem_(problem) {
    struct Due {
        int priority;
        double due_s;
        int task;
    };
    std::vector<Due> due;
    int lowest = std::numeric_limits<int>::max();
    for (int task : order) lowest = std::min(lowest, problem.tasks[task].priority);
    for (int task : order) {
        const Task& row = problem.tasks[task];
        if (allotment[task] < 0 || row.not_before_s > problem.now_s) continue;
        const double due_s = row.arrived_s + problem.patience_s(allotment[task]);
        if (row.priority == lowest && !row.begun && due_s > problem.now_s) continue;
        if (problem.shapes[problem.choices[allotment[task]].shape].parts.empty()) continue;
        due.push_back({row.priority, row.begun ? row.arrived_s : std::min(due_s, problem.now_s), task});
    }
    std::stable_sort(due.begin(), due.end(), [](const Due& a, const Due& b) {
        return a.priority != b.priority ? a.priority > b.priority : a.due_s < b.due_s;
    });
    for (const Due& one : due) row_.push_back({one.task, one.priority == lowest && !problem.tasks[one.task].begun});
    if (row_.empty()) return;
    free_s_.assign(problem.nodes.size() * kMaxGpus, problem.now_s);
    for (const Pinned& pinned : problem.pinned) taken({pinned.node, pinned.gpus}, pinned.end_s);
}

void AheadOfList::taken(const PartOut& part, double end_s) {
    for (Mask left = part.gpus; left; left &= left - 1) free_s_[part.node * kMaxGpus + std::countr_zero(left)] = end_s;
}

const std::vector<int>& AheadOfList::served(const std::vector<char>& started) {
    std::erase_if(served_, [&](int task) { return started[task] != 0; });
    if (overdue_served_ >= 0 && started[overdue_served_]) overdue_served_ = -1;
    while (served_.size() < kMostServed && next_ < row_.size()) {
        const auto [task, overdue] = row_[next_];
        if (overdue && overdue_served_ >= 0 && !started[task]) break;
        ++next_;
        if (started[task]) continue;
        served_.push_back(task);
        if (overdue) overdue_served_ = task;
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
