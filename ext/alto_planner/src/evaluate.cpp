#include "evaluate.hpp"

#include <algorithm>
#include <cmath>

namespace alto {

std::vector<double> completion_weights(const Problem& problem) {
    std::vector<double> weights(problem.tasks.size(), 1.0);
    if (problem.tasks.empty()) return weights;
    int lowest = problem.tasks[0].priority;
    for (const Task& task : problem.tasks) lowest = std::min(lowest, task.priority);
    double total_weight = 0, total_usage = 0;
    for (const Tenant& tenant : problem.tenants) {
        total_weight += tenant.weight;
        total_usage += tenant.usage_gpu_s;
    }
    std::vector<double> factor(problem.tenants.size(), 1.0);
    for (std::size_t t = 0; t < factor.size() && total_usage > 0; ++t) {
        const Tenant& tenant = problem.tenants[t];
        const double due = tenant.weight / total_weight, had = tenant.usage_gpu_s / total_usage;
        factor[t] = std::pow(std::clamp(due / std::max(had, 1e-9), 0.25, 4.0), problem.objective.fairness);
    }
    double sum = 0;
    for (std::size_t i = 0; i < weights.size(); ++i) {
        const int level = std::min(problem.tasks[i].priority - lowest, 8);
        weights[i] = static_cast<double>(1 << 2 * level) * factor[problem.tasks[i].tenant];
        sum += weights[i];
    }
    for (double& weight : weights) weight *= static_cast<double>(weights.size()) / sum;
    return weights;
}

Score evaluate(const Problem& problem, const Schedule& schedule, const Bounds& bounds,
               const std::vector<double>& weights) {
    Score score;
    double weighted = 0, lateness = 0, seconds = 0;
    int placed = 0;
    for (const Pinned& pinned : problem.pinned)
        score.makespan_s = std::max(score.makespan_s, pinned.end_s - problem.now_s);
    for (std::size_t i = 0; i < problem.tasks.size(); ++i) {
        if (!schedule.placed(i)) {
            score.unplaced += 1;
            continue;
        }
        const double length = problem.choices[schedule.choice[i]].seconds;
        const double end = schedule.start_s[i] + length - problem.now_s;
        score.makespan_s = std::max(score.makespan_s, end);
        score.mean_completion_s += end;
        weighted += weights[i] * end;
        const double patience = problem.patience_s(schedule.choice[i]);
        lateness += std::max(0.0, schedule.start_s[i] - problem.tasks[i].arrived_s - patience);
        seconds += length;
        ++placed;
    }
    if (placed > 0) score.mean_completion_s /= placed;
    const Objective& wanted = problem.objective;
    if (bounds.makespan_s > 0) score.value += wanted.makespan * score.makespan_s / bounds.makespan_s;
    if (placed > 0 && bounds.mean_completion_s > 0)
        score.value += wanted.completion * weighted / placed / bounds.mean_completion_s;
    if (seconds > 0 && lateness > 0) score.value += wanted.lateness * lateness / seconds;
    score.value += 1e6 * score.unplaced;
    return score;
}

}  // namespace alto
