#include "search.hpp"

#include <algorithm>

#include "dispatch.hpp"

namespace alto {
namespace {

// The task that decides the makespan.
int last_task(const Problem& problem, const Candidate& candidate) {
    int last = -1;
    double end = -kNever;
    for (int task : candidate.order)
        if (candidate.schedule.placed(task) && candidate.schedule.end_s(problem, task) > end) {
            end = candidate.schedule.end_s(problem, task);
            last = task;
        }
    return last;
}

void move_within(std::vector<int>& order, int from, int to) {
    if (from < to)
        std::rotate(order.begin() + from, order.begin() + from + 1, order.begin() + to + 1);
    else
        std::rotate(order.begin() + to, order.begin() + from, order.begin() + from + 1);
}

}  // namespace

void search_orders(const Problem& problem, const Bounds& bounds, const std::vector<double>& weights, Candidate& best,
                   Effort& effort, Random& random) {
    const int count = static_cast<int>(best.order.size());
    if (count < 2) return;
    const double ideal = problem.objective.makespan + problem.objective.completion;
    Allotment allotment = best.schedule.choice;
    std::vector<int> order = best.order;
    while (best.score.value > ideal * (1 + 1e-6) && effort.another()) {
        const std::vector<int> kept = order;
        int changed_task = -1, changed_choice = -1;
        const int kind = random.below(8);
        if (kind == 0) {
            // Bring the task that ends last forward.
            const int last = last_task(problem, best);
            const int from = static_cast<int>(std::find(order.begin(), order.end(), last) - order.begin());
            if (from > 0 && from < count) move_within(order, from, random.below(from));
        } else if (kind == 1) {
            const int task = order[random.below(count)];
            const Task& row = problem.tasks[task];
            const int choice = row.first_choice + random.below(row.choices);
            if (row.choices > 1 && !problem.shapes[problem.choices[choice].shape].parts.empty()) {
                changed_task = task;
                changed_choice = allotment[task];
                allotment[task] = choice;
            }
        }
        if (kind > 1 || changed_task < 0) {
            const int moves = 1 + random.below(3);
            for (int i = 0; i < moves; ++i) {
                const int a = random.below(count), b = random.below(count);
                if (kind % 2)
                    std::swap(order[a], order[b]);
                else
                    move_within(order, a, b);
            }
            std::stable_sort(order.begin(), order.end(),
                             [&](int a, int b) { return problem.tasks[a].priority > problem.tasks[b].priority; });
        }
        Candidate tried{dispatch(problem, allotment, order), {}, order, "searched order"};
        tried.score = evaluate(problem, tried.schedule, bounds, weights);
        if (tried.score.value <= best.score.value) {
            best = std::move(tried);
        } else {
            order = kept;
            if (changed_task >= 0) allotment[changed_task] = changed_choice;
        }
    }
}

}  // namespace alto
