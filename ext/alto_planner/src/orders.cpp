#include "orders.hpp"

#include <algorithm>
#include <bit>
#include <numeric>
#include <queue>
#include <tuple>

#include "dispatch.hpp"

namespace alto {
namespace {

double area(const Problem& problem, int choice) {
    return problem.choices[choice].seconds * problem.shapes[problem.choices[choice].shape].gpus;
}

bool possible(const Problem& problem, int choice) {
    return !problem.shapes[problem.choices[choice].shape].parts.empty();
}

// Least area among choices no longer than `longest`; the shortest when none is that short.
int pick(const Problem& problem, const Task& task, double longest) {
    int best = -1;
    for (int c = task.first_choice; c < task.first_choice + task.choices; ++c) {
        if (!possible(problem, c)) continue;
        if (best < 0) {
            best = c;
            continue;
        }
        const double seconds = problem.choices[c].seconds, best_seconds = problem.choices[best].seconds;
        const bool fits = seconds <= longest, best_fits = best_seconds <= longest;
        const auto key = std::tuple(!fits, fits ? area(problem, c) : seconds, fits ? seconds : area(problem, c));
        const auto best_key = std::tuple(!best_fits, best_fits ? area(problem, best) : best_seconds,
                                         best_fits ? best_seconds : area(problem, best));
        if (key < best_key) best = c;
    }
    return best;
}

Allotment allot_within(const Problem& problem, double longest) {
    Allotment allotment(problem.tasks.size(), -1);
    for (std::size_t i = 0; i < problem.tasks.size(); ++i) allotment[i] = pick(problem, problem.tasks[i], longest);
    return allotment;
}

double load_of(const Problem& problem, const Allotment& allotment, double gpus) {
    double total = 0, longest = 0;
    for (int choice : allotment) {
        if (choice < 0) continue;
        total += area(problem, choice);
        longest = std::max(longest, problem.choices[choice].seconds);
    }
    return std::max(total / gpus, longest);
}

}  // namespace

Allotment allot(const Problem& problem, Allot rule) {
    if (rule == Allot::kLeastArea) return allot_within(problem, kNever);
    if (rule == Allot::kShortest) return allot_within(problem, 0);
    Allotment best = allot_within(problem, kNever);
    const bool rigid =
        std::all_of(problem.tasks.begin(), problem.tasks.end(), [](const Task& t) { return t.choices < 2; });
    if (rigid) return best;
    const double gpus = std::max(1, problem.ready_gpus());
    double best_load = load_of(problem, best, gpus);
    double high = best_load, low = 0;
    for (int step = 0; step < 40; ++step) {
        const double longest = 0.5 * (low + high);
        Allotment tried = allot_within(problem, longest);
        const double load = load_of(problem, tried, gpus);
        if (load < best_load) {
            best_load = load;
            best = std::move(tried);
        }
        (load > longest ? low : high) = longest;
    }
    return best;
}

std::vector<int> list_order(const Problem& problem, const Allotment& allotment, Rule rule) {
    struct Key {
        double first, arrived_s;
        int priority, row, task;
    };
    std::vector<Key> keys;
    keys.reserve(problem.tasks.size());
    for (std::size_t i = 0; i < problem.tasks.size(); ++i) {
        if (allotment[i] < 0) continue;
        const Task& task = problem.tasks[i];
        double first = task.arrived_s;
        if (rule == Rule::kSmallestArea) first = area(problem, allotment[i]);
        if (rule == Rule::kLargestArea) first = -area(problem, allotment[i]);
        if (rule == Rule::kLongest) first = -problem.choices[allotment[i]].seconds;
        if (rule == Rule::kShortest) first = problem.choices[allotment[i]].seconds;
        keys.push_back({first, task.arrived_s, task.priority, problem.row[i], static_cast<int>(i)});
    }
    const auto before = [](const Key& a, const Key& b) {
        if (a.priority != b.priority) return a.priority > b.priority;
        if (a.first != b.first) return a.first < b.first;
        return a.arrived_s != b.arrived_s ? a.arrived_s < b.arrived_s : a.row < b.row;
    };
    // Tasks stand by area already.
    if (!std::is_sorted(keys.begin(), keys.end(), before)) std::sort(keys.begin(), keys.end(), before);
    std::vector<int> order(keys.size());
    std::transform(keys.begin(), keys.end(), order.begin(), [](const Key& key) { return key.task; });
    return order;
}

std::vector<int> long_first(const Problem& problem, const Allotment& allotment, const std::vector<int>& order,
                            double share) {
    const double least = share * load_of(problem, allotment, std::max(1, problem.ready_gpus()));
    const auto is_long = [&](int task) { return problem.choices[allotment[task]].seconds >= least; };
    std::vector<int> sorted = order;
    std::stable_sort(sorted.begin(), sorted.end(), [&](int a, int b) {
        if (problem.tasks[a].priority != problem.tasks[b].priority)
            return problem.tasks[a].priority > problem.tasks[b].priority;
        return is_long(a) && !is_long(b);
    });
    return sorted;
}

std::vector<int> start_order(const Problem& problem, const Schedule& schedule) {
    std::vector<int> order;
    for (std::size_t i = 0; i < problem.tasks.size(); ++i)
        if (schedule.choice[i] >= 0) order.push_back(static_cast<int>(i));
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
        const int left = problem.tasks[a].priority, right = problem.tasks[b].priority;
        return left != right ? left > right : schedule.start_s[a] < schedule.start_s[b];
    });
    return order;
}

std::vector<int> fair_order(const Problem& problem, const Allotment& allotment, const std::vector<int>& order) {
    const double fairness = problem.objective.fairness;
    if (fairness <= 0 || problem.tenants.size() < 2 || order.empty()) return order;
    std::vector<double> attained(problem.tenants.size());
    for (std::size_t t = 0; t < attained.size(); ++t)
        attained[t] = problem.tenants[t].usage_gpu_s / problem.tenants[t].weight;
    std::vector<int> fair;
    fair.reserve(order.size());
    std::vector<std::vector<int>> lines(problem.tenants.size());
    std::size_t begin = 0;
    while (begin < order.size()) {
        const int priority = problem.tasks[order[begin]].priority;
        std::size_t end = begin;
        for (; end < order.size() && problem.tasks[order[end]].priority == priority; ++end)
            lines[problem.tasks[order[end]].tenant].push_back(order[end]);
        using Turn = std::pair<double, int>;
        std::priority_queue<Turn, std::vector<Turn>, std::greater<>> turns;
        std::vector<std::size_t> next(lines.size(), 0);
        for (std::size_t t = 0; t < lines.size(); ++t)
            if (!lines[t].empty()) turns.emplace(attained[t], static_cast<int>(t));
        while (!turns.empty()) {
            const int tenant = turns.top().second;
            turns.pop();
            // It goes on while it is still the one that has had least.
            const Turn other = turns.empty() ? Turn{kNever, 0} : turns.top();
            const double weight = problem.tenants[tenant].weight;
            do {
                const int task = lines[tenant][next[tenant]++];
                fair.push_back(task);
                attained[tenant] += area(problem, allotment[task]) / weight;
            } while (next[tenant] < lines[tenant].size() && Turn{attained[tenant], tenant} < other);
            if (next[tenant] < lines[tenant].size()) turns.emplace(attained[tenant], tenant);
        }
        for (auto& line : lines) line.clear();
        begin = end;
    }
    if (fairness >= 1) return fair;
    std::vector<double> place(problem.tasks.size(), 0);
    for (std::size_t i = 0; i < order.size(); ++i) place[order[i]] += (1 - fairness) * static_cast<double>(i);
    for (std::size_t i = 0; i < fair.size(); ++i) place[fair[i]] += fairness * static_cast<double>(i);
    std::vector<int> blended = order;
    std::stable_sort(blended.begin(), blended.end(), [&](int a, int b) {
        const int left = problem.tasks[a].priority, right = problem.tasks[b].priority;
        return left != right ? left > right : place[a] < place[b];
    });
    return blended;
}

Mirrored mirror(const Problem& problem, const Allotment& allotment, Rule rule) {
    std::vector<int> order = list_order(problem, allotment, rule);
    // Backwards, what matters most goes last.
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return problem.tasks[a].priority < problem.tasks[b].priority; });
    Mirrored result{{}, dispatch(problem, allotment, order, {.bounded_wait = false, .empty_cluster = true})};
    Schedule& placed = result.placed;
    double end = problem.now_s;
    for (int task : order)
        if (placed.placed(task)) end = std::max(end, placed.end_s(problem, task));
    for (int task : order)
        if (placed.placed(task)) placed.start_s[task] = problem.now_s + end - placed.end_s(problem, task);
    result.order = start_order(problem, placed);
    return result;
}

Schedule shift_left(const Problem& problem, const Schedule& schedule) {
    Schedule shifted = schedule;
    std::vector<double> free_at(problem.nodes.size() * kMaxGpus, problem.now_s);
    for (const Pinned& pinned : problem.pinned)
        for (Mask left = pinned.gpus; left; left &= left - 1)
            free_at[pinned.node * kMaxGpus + std::countr_zero(left)] = pinned.end_s;
    std::vector<int> order;
    for (std::size_t i = 0; i < problem.tasks.size(); ++i)
        if (schedule.placed(i)) order.push_back(static_cast<int>(i));
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return schedule.start_s[a] < schedule.start_s[b]; });
    for (int task : order) {
        double start = std::max(problem.now_s, problem.tasks[task].not_before_s);
        const PartOut* parts = &shifted.parts[shifted.first_part[task]];
        for (int p = 0; p < shifted.part_count[task]; ++p)
            for (Mask left = parts[p].gpus; left; left &= left - 1)
                start = std::max(start, free_at[parts[p].node * kMaxGpus + std::countr_zero(left)]);
        shifted.start_s[task] = start;
        const double end = shifted.end_s(problem, task);
        for (int p = 0; p < shifted.part_count[task]; ++p)
            for (Mask left = parts[p].gpus; left; left &= left - 1)
                free_at[parts[p].node * kMaxGpus + std::countr_zero(left)] = end;
    }
    return shifted;
}

}  // namespace alto
