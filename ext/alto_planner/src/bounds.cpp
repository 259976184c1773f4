#include "bounds.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <set>

namespace alto {
namespace {

constexpr int kSteps = 28;       // halvings of the interval in which the bound is sought
constexpr int kFractions = 12;   // Fekete-Schepers functions u(1) .. u(12)
constexpr double kSlack = 1e-9;  // relative; a sum must exceed the capacity by more than rounding

struct Item {
    double seconds;
    double slots;
};

// Items of some width over `slots` bins of length C: is C proven too short?
class SlotBound {
  public:
    SlotBound(std::vector<Item> items, double slots) : items_(std::move(items)), slots_(slots) {
        std::sort(items_.begin(), items_.end(), [](const Item& a, const Item& b) { return a.seconds < b.seconds; });
        count_.assign(items_.size() + 1, 0);
        area_.assign(items_.size() + 1, 0);
        for (std::size_t i = 0; i < items_.size(); ++i) {
            count_[i + 1] = count_[i] + items_[i].slots;
            area_[i + 1] = area_[i] + items_[i].slots * items_[i].seconds;
        }
    }

    [[nodiscard]] bool refuted(double length) const {
        const double capacity = slots_ * length * (1 + kSlack);
        // Martello-Toth: items longer than length - e count as a whole bin, items shorter than e not at all.
        for (std::size_t i = 0; i < items_.size() && items_[i].seconds <= length / 2; ++i) {
            if (i > 0 && items_[i].seconds == items_[i - 1].seconds) continue;
            const std::size_t large = first_above(length - items_[i].seconds);
            const double whole = (count_.back() - count_[large]) * length;
            if (whole + area_[large] - area_[i] > capacity) return true;
        }
        const std::size_t half = first_above(length / 2);
        if (count_.back() - count_[half] > slots_ * (1 + kSlack)) return true;
        // Fekete-Schepers u(k): x -> x if (k+1) x is whole, else floor((k+1) x) / k.
        for (int k = 1; k <= kFractions; ++k) {
            double sum = 0;
            for (const Item& item : items_) {
                const double scaled = (k + 1) * item.seconds / length;
                const double whole = std::floor(scaled + 1e-12);
                // Near a whole number both values are close; take the smaller, so that rounding proves nothing.
                const double value = std::abs(scaled - std::round(scaled)) < 1e-9
                                         ? std::min(item.seconds / length, std::floor(scaled - 1e-9) / k)
                                         : whole / k;
                sum += item.slots * std::max(0.0, value);
            }
            if (sum > slots_ * (1 + kSlack)) return true;
        }
        return false;
    }

  private:
    [[nodiscard]] std::size_t first_above(double seconds) const {
        const auto found = std::upper_bound(items_.begin(), items_.end(), seconds,
                                            [](double value, const Item& item) { return value < item.seconds; });
        return static_cast<std::size_t>(found - items_.begin());
    }

    std::vector<Item> items_;
    double slots_;
    std::vector<double> count_, area_;
};

bool within(const std::vector<char>& inner, const std::vector<char>& outer) {
    for (std::size_t i = 0; i < inner.size(); ++i)
        if (inner[i] && !outer[i]) return false;
    return true;
}

// Slots of `width` that a shape takes at least: floor(part / width) for each part, or, for slots wider than any node,
// floor(GPUs / width) of floor(all GPUs / width).
double slots_taken(const Shape& shape, int width, bool across_nodes) {
    if (across_nodes) return shape.gpus / width;
    double taken = 0;
    for (int part : shape.parts) taken += part / width;
    return taken;
}

double bound_on(const Problem& problem, const std::vector<char>& classes, int width, double low, double high,
                bool with_dff) {
    double slots = 0, gpus = 0;
    int widest = 0;
    for (const Node& node : problem.nodes) {
        if (!node.ready || !classes[node.node_class]) continue;
        slots += node.gpus / width;
        gpus += node.gpus;
        widest = std::max(widest, node.gpus);
    }
    const bool across_nodes = width > widest;
    if (across_nodes) slots = std::floor(gpus / width);
    if (slots <= 0) return 0;
    std::vector<Item> items;
    double total = 0;
    for (const Task& task : problem.tasks) {
        // A task with several choices counts with the least of each: seconds, and slots x seconds.
        double seconds = kNever, area = kNever;
        for (int c = task.first_choice; c < task.first_choice + task.choices; ++c) {
            const Shape& shape = problem.shapes[problem.choices[c].shape];
            if (shape.parts.empty()) continue;
            const bool counts = within(shape.eligible, classes);
            seconds = std::min(seconds, problem.choices[c].seconds);
            area = std::min(area, counts ? slots_taken(shape, width, across_nodes) * problem.choices[c].seconds : 0.0);
        }
        if (seconds == kNever || area <= 0) continue;
        total += area;
        if (with_dff) items.push_back({seconds, area / seconds});
    }
    const bool rigid =
        std::all_of(problem.tasks.begin(), problem.tasks.end(), [](const Task& task) { return task.choices < 2; });
    for (const Pinned& pinned : problem.pinned) {
        const Node& node = problem.nodes[pinned.node];
        const double taken = across_nodes ? 0 : std::popcount(pinned.gpus) / width;
        if (!node.ready || !classes[node.node_class] || taken == 0) continue;
        total += taken * (pinned.end_s - problem.now_s);
        if (with_dff) items.push_back({pinned.end_s - problem.now_s, taken});
    }
    low = std::max(low, total / slots);
    if (!with_dff || !rigid || low >= high) return low;
    const SlotBound bound(std::move(items), slots);
    if (!bound.refuted(low)) {
        // Refutation need not be monotone: look a little above before giving up.
        bool any = false;
        for (int i = 1; i <= 8 && !any; ++i) {
            const double tried = low + (high - low) * i / 9;
            if (bound.refuted(tried)) {
                low = tried;
                any = true;
            }
        }
        if (!any) return low;
    }
    for (int step = 0; step < kSteps; ++step) {
        const double middle = 0.5 * (low + high);
        (bound.refuted(middle) ? low : high) = middle;
    }
    return low;
}

struct Fluid {
    double area, seconds;
};

// Sum of completions. Fluid on one machine, least area first, a task ends at least at its mean busy time plus half its
// duration. A task also takes at least its duration, and leaving it out of the fluid leaves a bound for the others:
// from the largest area down, each task is counted in the way that gives the greater sum.
double fluid_bound(std::vector<Fluid>& tasks, double gpus) {
    const auto smaller = [](const Fluid& a, const Fluid& b) { return a.area < b.area; };
    if (!std::is_sorted(tasks.begin(), tasks.end(), smaller)) std::sort(tasks.begin(), tasks.end(), smaller);
    double before = 0, total = 0;
    for (const Fluid& task : tasks) before += task.area;
    double later = 0;  // tasks of the fluid with a larger area
    for (std::size_t i = tasks.size(); i-- > 0;) {
        const Fluid& task = tasks[i];
        before -= task.area;
        const double in_fluid = (before + task.area / 2 + later * task.area) / gpus + task.seconds / 2;
        if (in_fluid >= task.seconds) {
            total += (before + task.area / 2) / gpus + task.seconds / 2;
            later += 1;
        } else {
            // Larger tasks of the fluid were counted as if this one ran before them.
            total += task.seconds - later * task.area / gpus;
        }
    }
    return total;
}

}  // namespace

Bounds lower_bounds(const Problem& problem, double known_makespan_s, std::size_t dff_tasks) {
    Bounds bounds;
    for (const Pinned& pinned : problem.pinned)
        bounds.makespan_s = std::max(bounds.makespan_s, pinned.end_s - problem.now_s);
    std::vector<Fluid> fluid;
    fluid.reserve(problem.tasks.size());
    std::vector<char> any(problem.classes.size(), 0);
    for (const Task& task : problem.tasks) {
        Fluid least{kNever, kNever};
        for (int c = task.first_choice; c < task.first_choice + task.choices; ++c) {
            const Shape& shape = problem.shapes[problem.choices[c].shape];
            if (shape.parts.empty()) continue;
            least.area = std::min(least.area, shape.gpus * problem.choices[c].seconds);
            least.seconds = std::min(least.seconds, problem.choices[c].seconds);
        }
        if (least.seconds == kNever) continue;
        const double released = std::max(0.0, task.not_before_s - problem.now_s);
        bounds.makespan_s = std::max(bounds.makespan_s, released + least.seconds);
        fluid.push_back(least);
    }
    if (fluid.empty()) return bounds;
    const double gpus = problem.ready_gpus();
    bounds.mean_completion_s = fluid_bound(fluid, gpus) / static_cast<double>(fluid.size());

    std::set<std::vector<char>> groups;
    groups.insert(std::vector<char>(problem.classes.size(), 1));
    std::set<int> widths{1};
    std::vector<char> asked(problem.shapes.size(), 0);  // a reader remembers shapes that nobody asks for any more
    for (const Choice& choice : problem.choices) asked[choice.shape] = 1;
    for (std::size_t s = 0; s < problem.shapes.size(); ++s) {
        const Shape& shape = problem.shapes[s];
        if (shape.parts.empty() || !asked[s]) continue;
        groups.insert(shape.eligible);
        widths.insert(shape.parts.begin(), shape.parts.end());
        widths.insert(shape.gpus);
    }
    const bool with_dff = fluid.size() <= dff_tasks;
    for (const std::vector<char>& group : groups)
        for (int width : widths) {
            if (!with_dff && width > 1) continue;
            const double found = bound_on(problem, group, width, bounds.makespan_s, known_makespan_s, with_dff);
            bounds.makespan_s = std::max(bounds.makespan_s, std::min(found, known_makespan_s));
        }
    return bounds;
}

}  // namespace alto
