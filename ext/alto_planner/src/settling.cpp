#include "settling.hpp"

#include <algorithm>
#include <array>
#include <bit>

namespace alto {
namespace {

constexpr int kSweeps = 8;

struct OnNode {
    int task;
    double start_s;
    Mask gpus;
};

class NodeOrder {
  public:
    NodeOrder(const Problem& problem, const std::vector<double>& weights, int node)
        : problem_(problem), weights_(weights), gpus_(problem.nodes[node].gpus) {
        free_now_.fill(problem.now_s);
        for (const Pinned& pinned : problem.pinned)
            for (Mask left = pinned.node == node ? pinned.gpus : 0; left; left &= left - 1)
                free_now_[std::countr_zero(left)] = pinned.end_s;
    }

    std::vector<int> order;
    double latest_s = 0;
    double weighted = 0;

    // Sets the latest end and the weighted sum of ends.
    std::vector<OnNode> carry_out() {
        std::vector<OnNode> placed;
        std::array<double, kMaxGpus> free = free_now_;
        std::array<double, kMaxGpus> sorted;
        latest_s = weighted = 0;
        for (int task : order) {
            const Choice& choice = problem_.choices[problem_.tasks[task].first_choice];
            const int width = problem_.shapes[choice.shape].gpus;
            std::copy_n(free.begin(), gpus_, sorted.begin());
            std::nth_element(sorted.begin(), sorted.begin() + width - 1, sorted.begin() + gpus_);
            const double start = sorted[width - 1], end = start + choice.seconds;
            // Of the GPUs that are free by then, those that became so last: the others may serve someone earlier.
            Mask taken = 0;
            for (int i = 0; i < width; ++i) {
                int best = -1;
                for (int gpu = 0; gpu < gpus_; ++gpu)
                    if (!(taken >> gpu & 1) && free[gpu] <= start && (best < 0 || free[gpu] > free[best])) best = gpu;
                taken |= Mask{1} << best;
            }
            for (Mask left = taken; left; left &= left - 1) free[std::countr_zero(left)] = end;
            placed.push_back({task, start, taken});
            latest_s = std::max(latest_s, end);
            weighted += weights_[task] * (end - problem_.now_s);
        }
        return placed;
    }

    void improve(double limit_s) {
        const int count = static_cast<int>(order.size());
        bool better = true;
        for (int sweep = 0; better && sweep < kSweeps; ++sweep) {
            better = false;
            for (int from = 0; from < count; ++from)
                for (int to = 0; to < count; ++to) {
                    const std::vector<int> kept = order;
                    const double before = weighted;
                    const int task = order[from];
                    order.erase(order.begin() + from);
                    order.insert(order.begin() + to, task);
                    carry_out();
                    if (latest_s <= limit_s && weighted < before * (1 - kSameTime)) {
                        better = true;
                    } else {
                        order = kept;
                        weighted = before;
                    }
                }
        }
    }

  private:
    const Problem& problem_;
    const std::vector<double>& weights_;
    int gpus_;
    std::array<double, kMaxGpus> free_now_{};
};

}  // namespace

Schedule settle(const Problem& problem, const std::vector<std::pair<int, int>>& rows,
                const std::vector<double>& weights) {
    std::vector<NodeOrder> nodes;
    for (std::size_t n = 0; n < problem.nodes.size(); ++n) nodes.emplace_back(problem, weights, static_cast<int>(n));
    for (const auto& [task, node] : rows) nodes[node].order.push_back(task);
    double limit_s = 0;
    for (NodeOrder& node : nodes) {
        node.carry_out();
        limit_s = std::max(limit_s, node.latest_s);
    }
    Schedule schedule(problem.tasks.size());
    for (std::size_t n = 0; n < nodes.size(); ++n) {
        nodes[n].improve(limit_s);
        for (const OnNode& placed : nodes[n].carry_out()) {
            schedule.choice[placed.task] = problem.tasks[placed.task].first_choice;
            schedule.start_s[placed.task] = placed.start_s;
            schedule.first_part[placed.task] = static_cast<int>(schedule.parts.size());
            schedule.part_count[placed.task] = 1;
            schedule.parts.push_back({static_cast<int>(n), placed.gpus});
        }
    }
    return schedule;
}

}  // namespace alto
