#include "ahead.hpp"

#include <algorithm>
#include <bit>

namespace alto {
namespace {

constexpr std::size_t kMostServed = 16;  // at the same time
constexpr int kOverdueServed = 3;        // of them, merely overdue
constexpr std::size_t kBlock = 16;       // nodes looked at together

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
    int widest = 0;
    for (const Node& node : problem.nodes) widest = std::max(widest, node.gpus);
    stride_ = (problem.nodes.size() + kBlock - 1) / kBlock * kBlock;
    ends_s_.assign(stride_ * widest, kNever);
    for (const Pinned& pinned : problem.pinned)
        for (Mask left = pinned.gpus; left; left &= left - 1)
            free_s_[pinned.node * kMaxGpus + std::countr_zero(left)] = pinned.end_s;
    for (std::size_t n = 0; n < problem.nodes.size(); ++n) sort_ends(static_cast<int>(n));
}

void AheadOfList::taken(const PartOut& part, double end_s) {
    for (Mask left = part.gpus; left; left &= left - 1) free_s_[part.node * kMaxGpus + std::countr_zero(left)] = end_s;
    sort_ends(part.node);
}

void AheadOfList::sort_ends(int node) {
    if (!problem_.nodes[node].ready) return;
    double sorted[kMaxGpus];
    const int gpus = problem_.nodes[node].gpus;
    for (int gpu = 0; gpu < gpus; ++gpu) {
        const double end_s = free_s_[node * kMaxGpus + gpu];
        int at = gpu;
        for (; at > 0 && sorted[at - 1] > end_s; --at) sorted[at] = sorted[at - 1];
        sorted[at] = end_s;
    }
    for (int gpu = 0; gpu < gpus; ++gpu) ends_s_[gpu * stride_ + node] = sorted[gpu];
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
        const double* ends_s = &ends_s_[(width - 1) * stride_];
        for (std::size_t first = 0; first < stride_ && best_s > now_s; first += kBlock) {
            bool is_earlier = false;  // any of the block, whatever is kept there: that can only make it later
            for (std::size_t n = first; n < first + kBlock; ++n) is_earlier |= ends_s[n] < best_s;
            for (std::size_t n = first; is_earlier && n < first + kBlock; ++n) {
                const int node = static_cast<int>(n);
                if (std::max(now_s, ends_s[n]) >= best_s || !shape.eligible[nodes.node_class(node)]) continue;
                if (std::any_of(parts.begin(), parts.end(), [&](const PartOut& part) { return part.node == node; }))
                    continue;
                if (kept.has(node)) {
                    kept.earliest(node, width, seconds, &free_s_[n * kMaxGpus], now_s, best_s, best);
                } else {
                    best_s = std::max(now_s, ends_s[n]);
                    best = {node, 0};
                }
            }
        }
        if (best.node < 0) return;
        if (!best.gpus) {
            double again_s = kNever;
            kept.earliest(best.node, width, seconds, &free_s_[best.node * kMaxGpus], now_s, again_s, best);
        }
        parts.push_back(best);
        from_s = std::max(from_s, best_s);
    }
    kept.hold(task, std::move(parts), from_s);
}

}  // namespace alto
