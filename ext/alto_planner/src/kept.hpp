// Nodes on which some GPUs are kept: during a reservation's window, or for a task that goes ahead of the list. Each of
// their GPUs may be used only by what ends before it is needed.
#pragma once

#include <vector>

#include "model.hpp"
#include "nodes.hpp"

namespace alto {

class KeptNodes {
  public:
    KeptNodes(const Problem& problem, FreeNodes& nodes)
        : problem_(problem), nodes_(nodes), index_(problem.nodes.size(), -1), is_held_for_(problem.tasks.size(), 0) {}

    [[nodiscard]] bool empty() const { return kept_.empty(); }
    [[nodiscard]] bool has(int node) const { return index_[node] >= 0; }

    void add_window(const Window& window);
    // Keep `parts` for `task`, for others to use until `from_s`.
    void hold(int task, std::vector<PartOut> parts, double from_s);
    [[nodiscard]] bool is_held_for(int task) const { return is_held_for_[task] != 0; }
    [[nodiscard]] bool held_gpus_are_free(int task) const;
    void release(int task, double now_s);
    // Forget windows that are over; the node is an ordinary one again when nothing is kept there.
    void tidy(int node, double now_s);

    // GPUs on a kept node, not one of `used`, that `task` may have from now for `seconds`; node -1 for none.
    [[nodiscard]] PartOut find(int task, const Shape& shape, int width, double seconds, double now_s,
                               const std::vector<PartOut>& used) const;

    // Until when a task for which nothing is held may have `width` GPUs of a kept node from now on.
    [[nodiscard]] double until_s(const Shape& shape, int width, double now_s) const;

    // GPUs of `node` (at least `width` that no other task is kept) that are free earliest, given when each becomes
    // free: sets `best` and `best_s` if they are so before `best_s`.
    void earliest(int node, int width, double seconds, const double* free_s, double now_s, double& best_s,
                  PartOut& best) const;

  private:
    struct Kept {
        int node;
        std::vector<double> needed_from_s;  // per GPU that is held
        std::vector<int> held_for;          // task, or -1
        std::vector<Window> windows;
    };
    struct Hold {
        int task;
        std::vector<PartOut> parts;
    };
    Kept& keep(int node);
    [[nodiscard]] const Hold* hold_of(int task) const;
    [[nodiscard]] double needed_from_s(const Kept& kept, int gpu, int task, double now_s) const;

    const Problem& problem_;
    FreeNodes& nodes_;
    std::vector<int> index_;  // per node, into kept_
    std::vector<Kept> kept_;
    std::vector<Hold> holds_;
    std::vector<char> is_held_for_;  // per task
};

}  // namespace alto
