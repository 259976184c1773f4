#include "packing.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>
#include <numeric>

namespace alto {
namespace {

constexpr long kMovesPerRound = 4000;
constexpr long kLeastRounds = 5, kMostRounds = 60;  // of one annealing
constexpr std::size_t kFewTasks = 120;              // so few that a move may look at all of them
constexpr int kPatience = 10;                       // annealings of the largest tasks without a better packing

bool power_of_two(int value) { return value > 0 && std::has_single_bit(static_cast<unsigned>(value)); }

double excess(double load, double target) {
    const double over = load - target;
    return over > 0 ? over * over : 0;
}

}  // namespace

std::optional<Packing> Packing::make(const Problem& problem, const Allotment& allotment) {
    if (!problem.plain(allotment)) return std::nullopt;
    Packing packing;
    int widest = 1;
    std::map<int, int> group_of_shape;
    for (std::size_t i = 0; i < problem.tasks.size(); ++i) {
        if (allotment[i] < 0) continue;
        const Shape& shape = problem.shapes[problem.choices[allotment[i]].shape];
        if (shape.parts.empty()) continue;
        if (!power_of_two(shape.gpus)) return std::nullopt;
        widest = std::max(widest, shape.gpus);
        const auto [found, added] =
            group_of_shape.try_emplace(problem.choices[allotment[i]].shape, static_cast<int>(group_of_shape.size()));
        if (added) packing.eligible_.push_back(shape.eligible);
        packing.tasks_.push_back(static_cast<int>(i));
        packing.seconds_.push_back(problem.choices[allotment[i]].seconds);
        packing.group_.push_back(found->second);
    }
    if (packing.tasks_.empty() || !packing.build_units(problem, widest)) return std::nullopt;
    packing.candidates_.resize(group_of_shape.size());
    for (const auto& [shape_index, group] : group_of_shape) {
        const Shape& shape = problem.shapes[shape_index];
        for (std::size_t u = 0; u < packing.units_.size(); ++u)
            if (packing.units_[u].width == shape.gpus && shape.eligible[packing.units_[u].node_class])
                packing.candidates_[group].push_back(static_cast<int>(u));
        if (packing.candidates_[group].empty()) return std::nullopt;
    }
    packing.by_area_.resize(packing.tasks_.size());
    std::iota(packing.by_area_.begin(), packing.by_area_.end(), 0);
    const auto area = [&](int p) { return packing.width(p) * packing.seconds_[p]; };
    std::stable_sort(packing.by_area_.begin(), packing.by_area_.end(), [&](int a, int b) { return area(a) > area(b); });
    packing.activate(packing.tasks_.size());
    return packing;
}

// Leaves are laid out node by node, nodes of one class together; wider units are runs of whole nodes.
bool Packing::build_units(const Problem& problem, int widest) {
    for (std::size_t c = 0; c < problem.classes.size(); ++c) {
        const int gpus = problem.classes[c].gpus;
        std::vector<int> nodes;
        for (std::size_t n = 0; n < problem.nodes.size(); ++n)
            if (problem.nodes[n].ready && problem.nodes[n].node_class == static_cast<int>(c))
                nodes.push_back(static_cast<int>(n));
        if (widest > gpus && !power_of_two(gpus)) return false;
        const int run = std::max(1, widest / gpus);  // nodes under one root
        for (std::size_t i = 0; i < nodes.size(); ++i) {
            const int first = static_cast<int>(leaf_.size());
            for (int gpu = 0; gpu < gpus; ++gpu) leaf_.push_back({nodes[i], gpu});
            if (i % run == 0) ++roots_;
            int done = 0;
            for (int block = static_cast<int>(std::bit_floor(static_cast<unsigned>(gpus))); block > 0; block /= 2) {
                if (!(gpus & block)) continue;
                for (int width = block; width > 0; width /= 2)
                    for (int at = 0; at < block; at += width)
                        units_.push_back({first + done + at, width, roots_ - 1, static_cast<int>(c)});
                done += block;
            }
            // Runs of 2, 4, ... whole nodes that end with this node.
            for (int size = 2; size <= run; size *= 2)
                if ((i + 1) % size == 0)
                    units_.push_back({first - (size - 1) * gpus, size * gpus, roots_ - 1, static_cast<int>(c)});
        }
    }
    unit_at_.assign(leaf_.size() * kLevels, -1);
    for (std::size_t u = 0; u < units_.size(); ++u)
        unit_at_[units_[u].first_leaf * kLevels + std::countr_zero(static_cast<unsigned>(units_[u].width))] =
            static_cast<int>(u);
    std::vector<int> leaf_of(problem.nodes.size() * kMaxGpus, -1);
    for (std::size_t l = 0; l < leaf_.size(); ++l)
        leaf_of[leaf_[l].node * kMaxGpus + leaf_[l].gpu] = static_cast<int>(l);
    offset_.assign(leaf_.size(), 0);
    for (const Pinned& pinned : problem.pinned)
        for (Mask left = pinned.gpus; left; left &= left - 1) {
            const int leaf = leaf_of[pinned.node * kMaxGpus + std::countr_zero(left)];
            if (leaf >= 0) offset_[leaf] = pinned.end_s - problem.now_s;
        }
    return true;
}

void Packing::add(int unit, double seconds) {
    double* load = &load_[units_[unit].first_leaf];
    for (int i = 0; i < units_[unit].width; ++i) load[i] += seconds;
}

double Packing::change(int unit, double seconds, double target) const {
    const double* load = &load_[units_[unit].first_leaf];
    double sum = 0;
    for (int i = 0; i < units_[unit].width; ++i) sum += excess(load[i] + seconds, target) - excess(load[i], target);
    return sum;
}

void Packing::activate(std::size_t largest) {
    active_.assign(by_area_.begin(), by_area_.begin() + static_cast<std::ptrdiff_t>(largest));
    same_width_.assign(32, {});
    for (int p : active_) same_width_[std::countr_zero(static_cast<unsigned>(width(p)))].push_back(p);
}

// Exact loads: sums drift by rounding while tasks move.
void Packing::reload() {
    load_ = offset_;
    for (int p : active_) add(unit_of_[p], seconds_[p]);
}

void Packing::place_least_loaded(int position) {
    int best = -1;
    double best_load = kNever;
    for (int unit : candidates_[group_[position]]) {
        const double* load = &load_[units_[unit].first_leaf];
        const double highest = *std::max_element(load, load + units_[unit].width);
        if (highest < best_load) {
            best_load = highest;
            best = unit;
        }
    }
    unit_of_[position] = best;
    add(best, seconds_[position]);
}

void Packing::fill() {
    load_ = offset_;
    unit_of_.assign(tasks_.size(), -1);
    std::vector<int> order(tasks_.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
        return width(a) != width(b) ? width(a) > width(b) : seconds_[a] > seconds_[b];
    });
    for (int p : order) place_least_loaded(p);
}

double Packing::largest_load() const { return *std::max_element(load_.begin(), load_.end()); }

// Where many tasks are small and few are large, the large ones decide: pack them alone, and let the small ones fill
// what is left, largest first.
bool Packing::improve_largest(double lower, Effort& effort, Random& random) {
    std::vector<int> best_units = unit_of_;
    double best = largest_load();
    double share = 0.5;
    long rounds = kLeastRounds;
    bool more = true;
    activate(kFewTasks);
    for (int failed = 0; more && failed < kPatience && best > lower * (1 + 1e-4);) {
        reload();
        const double target = best - std::max(1e-4 * lower, share * (best - lower));
        more = anneal(target, 0.05 * std::pow(2e-3, random.unit()), rounds, effort, random);
        for (std::size_t i = kFewTasks; i < by_area_.size(); ++i) place_least_loaded(by_area_[i]);
        const double reached = largest_load();
        if (reached < best) {
            best = reached;
            best_units = unit_of_;
            share = std::min(1.0, share * 1.5);
            failed = 0;
        } else {
            share = std::max(0.1, share * 0.8);
            rounds = std::min(kMostRounds, rounds + rounds / 2);
            ++failed;
            if (random.below(2)) unit_of_ = best_units;
        }
    }
    activate(tasks_.size());
    unit_of_ = best_units;
    reload();
    return more;
}

void Packing::improve(double lower, Effort& effort, Random& random) {
    if (tasks_.size() > kFewTasks && !improve_largest(lower, effort, random)) return;
    std::vector<int> best_units = unit_of_;
    std::vector<double> best_load = load_;
    double best = largest_load();
    double share = 0.5;  // how far towards the lower bound to aim
    long rounds = kLeastRounds;
    bool more = true;
    while (more && best > lower * (1 + 1e-4)) {
        const double target = best - std::max(1e-4 * lower, share * (best - lower));
        // How hot is best depends on tasks per GPU; trying all scales costs little.
        const double hot = (active_.size() <= kFewTasks ? 1.0 : 0.05) * std::pow(2e-3, random.unit());
        more = anneal(target, hot, rounds, effort, random);
        const double reached = largest_load();
        if (reached < best) {
            best = reached;
            best_units = unit_of_;
            best_load = load_;
            share = std::min(1.0, share * 1.5);
        } else {
            share = std::max(0.02, share * 0.8);
            rounds = std::min(kMostRounds, rounds + rounds / 2);
            if (random.below(2)) {
                unit_of_ = best_units;
                load_ = best_load;
            }
        }
    }
    unit_of_ = best_units;
    load_ = best_load;
}

bool Packing::anneal(double target, double hot_share, long rounds, Effort& effort, Random& random) {
    double mean = 0;
    for (int p : active_) mean += seconds_[p] / static_cast<double>(active_.size());
    const double hot = hot_share * mean * mean, cold = 1e-6 * mean * mean;
    const double cooling = std::pow(cold / hot, 1.0 / static_cast<double>(rounds * kMovesPerRound));
    double temperature = hot;
    double energy = 0;
    for (double load : load_) energy += excess(load, target);
    const bool few = active_.size() <= kFewTasks;
    bool more = true;
    for (long round = 0; round < rounds && energy > 1e-9 * mean * mean && (more = effort.another()); ++round) {
        for (long move = 0; move < kMovesPerRound && energy > 1e-9 * mean * mean; ++move, temperature *= cooling)
            switch (random.below(few ? 8 : 6)) {
                case 0:
                case 1:
                    energy += relocate(target, temperature, random);
                    break;
                case 6:
                case 7:
                    energy += exchange_contents(target, temperature, random);
                    break;
                default:
                    energy += exchange(target, temperature, random);
            }
    }
    reload();
    return more;
}

// One task to another unit. Returns the change of the energy, 0 when refused.
double Packing::relocate(double target, double temperature, Random& random) {
    const int a = active_[random.below(static_cast<int>(active_.size()))];
    const int from = unit_of_[a];
    const std::vector<int>& units = candidates_[group_[a]];
    const int to = units[random.below(static_cast<int>(units.size()))];
    if (to == from) return 0;
    double delta = change(from, -seconds_[a], target);
    add(from, -seconds_[a]);
    delta += change(to, seconds_[a], target);
    if (delta > 0 && random.unit() >= std::exp(-delta / temperature)) {
        add(from, seconds_[a]);
        return 0;
    }
    add(to, seconds_[a]);
    unit_of_[a] = to;
    return delta;
}

// Two tasks of the same width change places. Returns the change of the energy, 0 when refused.
double Packing::exchange(double target, double temperature, Random& random) {
    const int a = active_[random.below(static_cast<int>(active_.size()))];
    const int from = unit_of_[a];
    const std::vector<int>& peers = same_width_[std::countr_zero(static_cast<unsigned>(units_[from].width))];
    const int b = peers[random.below(static_cast<int>(peers.size()))];
    const int to = unit_of_[b];
    const double more = seconds_[b] - seconds_[a];
    if (to == from || more == 0) return 0;
    if (!eligible_[group_[a]][units_[to].node_class] || !eligible_[group_[b]][units_[from].node_class]) return 0;
    const double delta = change(from, more, target) + change(to, -more, target);
    if (delta > 0 && random.unit() >= std::exp(-delta / temperature)) return 0;
    add(from, more);
    add(to, -more);
    std::swap(unit_of_[a], unit_of_[b]);
    return delta;
}

// All that lies inside two units of one width, narrower tasks included, changes places.
double Packing::exchange_contents(double target, double temperature, Random& random) {
    const int a = active_[random.below(static_cast<int>(active_.size()))];
    const std::vector<int>& units = candidates_[group_[a]];
    const Unit& u = units_[unit_of_[a]];
    const Unit& v = units_[units[random.below(static_cast<int>(units.size()))]];
    if (u.first_leaf == v.first_leaf || u.node_class != v.node_class) return 0;
    double above_u = 0, above_v = 0;
    inside_.clear();
    for (int p : active_) {
        const Unit& unit = units_[unit_of_[p]];
        const bool wider = unit.width > u.width;
        const int end = unit.first_leaf + unit.width;
        if (unit.first_leaf <= u.first_leaf && end > u.first_leaf) above_u += wider ? seconds_[p] : 0;
        if (unit.first_leaf <= v.first_leaf && end > v.first_leaf) above_v += wider ? seconds_[p] : 0;
        if (wider) continue;
        if (unit.first_leaf >= u.first_leaf && unit.first_leaf < u.first_leaf + u.width) inside_.push_back(p);
        if (unit.first_leaf >= v.first_leaf && unit.first_leaf < v.first_leaf + v.width) inside_.push_back(p);
    }
    double delta = 0;
    double* load_u = &load_[u.first_leaf];
    double* load_v = &load_[v.first_leaf];
    const double* offset_u = &offset_[u.first_leaf];
    const double* offset_v = &offset_[v.first_leaf];
    for (int i = 0; i < u.width; ++i) {
        const double inside_u = load_u[i] - above_u - offset_u[i], inside_v = load_v[i] - above_v - offset_v[i];
        delta += excess(above_u + offset_u[i] + inside_v, target) - excess(load_u[i], target);
        delta += excess(above_v + offset_v[i] + inside_u, target) - excess(load_v[i], target);
    }
    if (delta > 0 && random.unit() >= std::exp(-delta / temperature)) return 0;
    for (int i = 0; i < u.width; ++i) {
        const double inside_u = load_u[i] - above_u - offset_u[i], inside_v = load_v[i] - above_v - offset_v[i];
        load_u[i] = above_u + offset_u[i] + inside_v;
        load_v[i] = above_v + offset_v[i] + inside_u;
    }
    for (int p : inside_) unit_of_[p] = moved_unit(unit_of_[p], u, v);
    return delta;
}

// The unit at the same place inside `v` as `unit` has inside `u`, or the other way round.
int Packing::moved_unit(int unit, const Unit& u, const Unit& v) const {
    const int leaf = units_[unit].first_leaf;
    const bool in_u = leaf >= u.first_leaf && leaf < u.first_leaf + u.width;
    const int wanted = in_u ? leaf - u.first_leaf + v.first_leaf : leaf - v.first_leaf + u.first_leaf;
    return unit_at_[wanted * kLevels + std::countr_zero(static_cast<unsigned>(units_[unit].width))];
}

Schedule Packing::schedule(const Problem& problem, const Allotment& allotment, const std::vector<double>& starts,
                           const std::vector<int>& unit_of) const {
    Schedule out(problem.tasks.size());
    out.choice = allotment;
    for (std::size_t p = 0; p < tasks_.size(); ++p) {
        const int task = tasks_[p];
        const Unit& unit = units_[unit_of[p]];
        out.start_s[task] = problem.now_s + starts[p];
        out.first_part[task] = static_cast<int>(out.parts.size());
        for (int i = 0; i < unit.width; ++i) {
            const Leaf& leaf = leaf_[unit.first_leaf + i];
            if (i == 0 || leaf.node != out.parts.back().node) {
                out.parts.push_back({leaf.node, 0});
                out.part_count[task] += 1;
            }
            out.parts.back().gpus |= Mask{1} << leaf.gpu;
        }
    }
    return out;
}

}  // namespace alto
