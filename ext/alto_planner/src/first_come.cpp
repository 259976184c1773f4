#include "first_come.hpp"

#include <algorithm>
#include <cmath>

#include "model.hpp"

namespace alto {
namespace {

constexpr std::size_t kRemembered = 1000;    // starts whose waits count
constexpr std::size_t kBackfillDepth = 256;  // how far behind the first in line to look for who fits
constexpr double kLeast_s = 1e-3;
constexpr double kSame = 1e-6;  // a relative difference that is no correction

bool is_same(double a, double b) { return a == b || std::abs(a - b) <= kSame * std::max(std::abs(a), std::abs(b)); }

}  // namespace

// --- what really happens ---

int FirstCome::present(const std::string& id) const {
    const auto found = slot_of_.find(id);
    return found != slot_of_.end() && tasks_[found->second].present ? found->second : -1;
}

int FirstCome::add(const std::string& id, const std::vector<Need>& needs, double arrived_s, double predicted_s) {
    int slot = static_cast<int>(tasks_.size());
    if (free_slots_.empty()) {
        tasks_.emplace_back();
    } else {
        slot = free_slots_.back();
        free_slots_.pop_back();
    }
    Task& task = tasks_[slot] = Task{};
    task.id = id;
    task.needs = needs;
    task.asks = asks_of(needs);
    task.arrived_s = arrived_s;
    task.predicted_s = task.seconds = predicted_s;
    task.present = true;
    slot_of_.emplace(id, slot);
    return slot;
}

void FirstCome::release_if_gone(int slot) {
    Task& task = tasks_[slot];
    if (task.present || task.state != State::kNone) return;
    slot_of_.erase(task.id);
    task = Task{};
    free_slots_.push_back(slot);
}

int FirstCome::take_in(const Waiting& row) {
    if (const auto known = slot_of_.find(row.id); known != slot_of_.end()) {
        tasks_[known->second].present = true;
        return known->second;
    }
    const int slot = add(row.id, row.needs, row.arrived_s, row.predicted_s);
    tasks_[slot].seconds = row.predicted_s * taken_s_ / predicted_s_;
    put_in_line(slot);
    return slot;
}

int FirstCome::take_in(const Running& row) {
    if (const auto known = slot_of_.find(row.id); known != slot_of_.end()) {
        tasks_[known->second].present = true;
        return known->second;
    }
    const int slot = add(row.id, row.needs, row.started_s, std::max(kLeast_s, row.expected_end_s - row.started_s));
    if (row.is_guest) return slot;
    Parts parts;
    for (const auto& [node_id, gpus] : row.parts) {
        const auto node = node_index_.find(node_id);
        if (gpus > (node == node_index_.end() ? 0 : free_[node->second])) return slot;
        parts.emplace_back(node->second, gpus);
    }
    place(slot, std::move(parts), row.started_s);
    return slot;
}

void FirstCome::note_run(int slot, double started_s, double expected_end_s) {
    Task& task = tasks_[slot];
    task.really_began_s = started_s;
    const double seconds = expected_end_s - started_s;
    if (is_same(seconds, task.predicted_s)) return;  // else it was corrected while it runs
    last_for(slot, std::max(kLeast_s, seconds));
}

void FirstCome::last_for(int slot, double seconds) {
    Task& task = tasks_[slot];
    if (task.state == State::kRunning) ends_.erase({task.end_s(), slot});
    task.seconds = seconds;
    if (task.state == State::kRunning) ends_.emplace(task.end_s(), slot);
}

void FirstCome::note_end(int slot) {
    Task& task = tasks_[slot];
    task.present = false;
    // Who was not seen running ran between two snapshots, or was taken back: hardly at all either way.
    last_for(slot, std::max(kLeast_s, now_s_ - task.really_began_s.value_or(shown_s_)));
    if (task.really_began_s) {
        taken_s_ += task.seconds;
        predicted_s_ += task.predicted_s;
    } else if (task.state == State::kInLine && !asks_[task.asks].placeable) {
        queue_.erase(std::find(queue_.begin(), queue_.end(), slot));
        task.state = State::kNone;
    }
    release_if_gone(slot);
}

void FirstCome::settle() {
    shown_s_ = now_s_;
    carry_on(now_s_);
}

// --- nodes, and who fits there ---

void FirstCome::take_nodes(std::vector<Node> nodes) {
    const std::vector<Node> before = std::exchange(nodes_, std::move(nodes));
    node_index_.clear();
    for (std::size_t i = 0; i < nodes_.size(); ++i) node_index_[nodes_[i].id] = static_cast<int>(i);
    name_order_.resize(nodes_.size());
    std::vector<int> by_name(nodes_.size());
    for (std::size_t i = 0; i < by_name.size(); ++i) by_name[i] = static_cast<int>(i);
    std::sort(by_name.begin(), by_name.end(), [&](int a, int b) { return nodes_[a].id < nodes_[b].id; });
    for (std::size_t i = 0; i < by_name.size(); ++i) name_order_[by_name[i]] = static_cast<int>(i);
    kept_.assign(nodes_.size(), 0);
    match_all();

    std::vector<int> running;
    for (const auto& [end_s, slot] : ends_) running.push_back(slot);
    free_.clear();
    for (const Node& node : nodes_) free_.push_back(node.gpus);
    on_.assign(nodes_.size(), {});
    for (int slot : running) {
        Task& task = tasks_[slot];
        bool stays = true;
        Parts parts;
        for (const auto& [was, gpus] : task.parts) {
            const auto found = node_index_.find(before[was].id);
            stays = stays && found != node_index_.end() && !nodes_[found->second].lost &&
                    gpus <= nodes_[found->second].gpus;
            if (stays) parts.emplace_back(found->second, gpus);
        }
        if (stays) {
            task.parts = std::move(parts);
            hold(slot);
            continue;
        }
        ends_.erase({task.end_s(), slot});
        task.parts.clear();
        task.state = State::kNone;
        if (!asks_[task.asks].fittings.empty() && task.present) put_in_line(slot);
        release_if_gone(slot);
    }
}

// Match again what is asked for, and tell it apart anew where nodes have other memories than before.
void FirstCome::match_all() {
    std::set<std::int64_t> memories;
    for (const Node& node : nodes_) memories.insert(node.memory_bytes);
    const std::vector<std::int64_t> before =
        std::exchange(memories_, std::vector<std::int64_t>(memories.begin(), memories.end()));
    if (memories_ == before) {
        for (Fitting& fitting : fittings_) match(fitting);
        for (Asks& asks : asks_) match(asks);
        return;
    }
    fittings_.clear();
    asks_.clear();
    fitting_of_.clear();
    asks_of_.clear();
    for (const auto& [id, slot] : slot_of_) tasks_[slot].asks = asks_of(tasks_[slot].needs);
}

int FirstCome::asks_of(const std::vector<Need>& needs) {
    Asks asks;
    for (Need need : needs) {
        // Every task may need another memory, but nodes have few.
        const auto least = std::lower_bound(memories_.begin(), memories_.end(), need.memory_bytes);
        need.memory_bytes = least == memories_.end() ? std::numeric_limits<std::int64_t>::max() : *least;
        const auto [found, added] = fitting_of_.try_emplace(need, static_cast<int>(fittings_.size()));
        if (added) match(fittings_.emplace_back(Fitting{need, {}, {}}));
        asks.fittings.push_back(found->second);
    }
    const auto [found, added] = asks_of_.try_emplace(asks.fittings, static_cast<int>(asks_.size()));
    if (added) {
        match(asks);
        asks_.push_back(std::move(asks));
    }
    return found->second;
}

void FirstCome::match(Asks& asks) const {
    asks.placeable = std::any_of(asks.fittings.begin(), asks.fittings.end(),
                                 [&](int index) { return !fittings_[index].widths.empty(); });
}

void FirstCome::match(Fitting& fitting) const {
    const Need& need = fitting.need;
    fitting.ready.clear();
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
        const Node& node = nodes_[i];
        const bool kind = need.kind.empty() || need.kind == node.kind;
        const bool memory = !need.memory_bytes || !node.memory_bytes || need.memory_bytes <= node.memory_bytes;
        if (node.ready && kind && memory) fitting.ready.push_back(static_cast<int>(i));
    }
    std::stable_sort(fitting.ready.begin(), fitting.ready.end(),
                     [&](int a, int b) { return nodes_[a].gpus > nodes_[b].gpus; });
    fitting.widths.clear();
    int left = need.gpus;
    for (std::size_t i = 0; i < fitting.ready.size() && left > 0; ++i) {
        fitting.widths.push_back(std::min(left, nodes_[fitting.ready[i]].gpus));
        left -= fitting.widths.back();
    }
    if (left > 0 || (need.one_node && fitting.widths.size() > 1)) fitting.widths.clear();
}

FirstCome::Parts FirstCome::fit(const Task& task, bool outside_kept) const {
    for (int index : asks_[task.asks].fittings) {
        const Fitting& fitting = fittings_[index];
        Parts parts;
        for (int width : fitting.widths) {
            int best = -1;
            for (int node : fitting.ready) {
                if (free_[node] < width || (best >= 0 && free_[node] >= free_[best])) continue;
                if (outside_kept && kept_[node]) continue;
                if (std::any_of(parts.begin(), parts.end(), [&](const auto& part) { return part.first == node; }))
                    continue;
                best = node;
                if (free_[node] == width) break;
            }
            if (best < 0) break;
            parts.emplace_back(best, width);
        }
        if (!parts.empty() && parts.size() == fitting.widths.size()) return parts;
    }
    return {};
}

double FirstCome::earliest(const Task& task) {
    double best_s = kNever;
    std::vector<int> best;
    for (int index : asks_[task.asks].fittings) {
        const Fitting& fitting = fittings_[index];
        std::vector<int> kept;
        double start_s = now_s_;
        for (int width : fitting.widths) {
            std::pair<double, int> found{kNever, -1};  // from when, node
            for (int node : fitting.ready) {
                if (nodes_[node].gpus < width || std::find(kept.begin(), kept.end(), node) != kept.end()) continue;
                const double from_s = free_from(node, width);
                if (found.second < 0 || from_s < found.first ||
                    (from_s == found.first && name_order_[node] < name_order_[found.second]))
                    found = {from_s, node};
            }
            if (found.second < 0) break;
            kept.push_back(found.second);
            start_s = std::max(start_s, found.first);
        }
        if (kept.empty() || kept.size() != fitting.widths.size() || start_s >= best_s) continue;
        best_s = start_s;
        best = std::move(kept);
    }
    std::fill(kept_.begin(), kept_.end(), 0);
    for (int node : best) kept_[node] = 1;
    return best_s;
}

// When `width` GPUs of a node are free, by the predictions for what runs there.
double FirstCome::free_from(int node, int width) {
    int free = free_[node];
    if (free >= width) return now_s_;
    ends_there_.clear();
    for (int slot : on_[node]) {
        const Task& task = tasks_[slot];
        const auto part =
            std::find_if(task.parts.begin(), task.parts.end(), [&](const auto& one) { return one.first == node; });
        ends_there_.emplace_back(std::max(now_s_, task.began_s + task.predicted_s), part->second);
    }
    std::sort(ends_there_.begin(), ends_there_.end());
    for (const auto& [end_s, gpus] : ends_there_)
        if ((free += gpus) >= width) return end_s;
    return kNever;
}

// --- the virtual schedule ---

void FirstCome::carry_on(double until_s) {
    until_s = std::max(now_s_, until_s);
    while (!ends_.empty() && ends_.begin()->first <= until_s) {
        now_s_ = std::max(now_s_, ends_.begin()->first);
        while (!ends_.empty() && ends_.begin()->first <= now_s_) end(ends_.begin()->second);
        start();
    }
    now_s_ = until_s;
    start();
}

void FirstCome::put_in_line(int slot) {
    tasks_[slot].state = State::kInLine;
    const auto before = [&](int a, int b) {
        const Task &one = tasks_[a], &other = tasks_[b];
        return one.arrived_s != other.arrived_s ? one.arrived_s < other.arrived_s : one.id < other.id;
    };
    queue_.insert(std::upper_bound(queue_.begin(), queue_.end(), slot, before), slot);
}

// GPUs of the parts that the task has.
void FirstCome::hold(int slot) {
    for (const auto& [node, gpus] : tasks_[slot].parts) {
        free_[node] -= gpus;
        on_[node].push_back(slot);
    }
}

void FirstCome::place(int slot, Parts parts, double at_s) {
    Task& task = tasks_[slot];
    task.state = State::kRunning;
    task.parts = std::move(parts);
    task.began_s = at_s;
    ends_.emplace(task.end_s(), slot);
    hold(slot);
}

void FirstCome::end(int slot) {
    Task& task = tasks_[slot];
    ends_.erase({task.end_s(), slot});
    for (const auto& [node, gpus] : task.parts) {
        free_[node] += gpus;
        std::erase(on_[node], slot);
    }
    task.parts.clear();
    task.state = State::kNone;
    release_if_gone(slot);
}

void FirstCome::begin(int slot, Parts parts) {
    place(slot, std::move(parts), now_s_);
    note_wait(now_s_ - tasks_[slot].arrived_s);
}

// Start the first while they fit, then who ends before the next of them can start or leaves its nodes alone.
void FirstCome::start() {
    std::vector<int> line;  // from the first that does not fit
    std::size_t seen = 0;   // how much of the queue was looked at
    for (; seen < queue_.size() && line.size() < kBackfillDepth; ++seen) {
        const int slot = queue_[seen];
        if (!asks_[tasks_[slot].asks].placeable) continue;
        if (line.empty())
            if (Parts parts = fit(tasks_[slot], false); !parts.empty()) {
                begin(slot, std::move(parts));
                continue;
            }
        line.push_back(slot);
    }
    if (!first_.empty() && (line.empty() || tasks_[line[0]].id != first_)) {
        note_wait(first_wait_s_);
        first_.clear();
        first_wait_s_ = 0;
    }
    if (!line.empty()) {
        const Task& first = tasks_[line[0]];
        const double start_s = earliest(first);
        first_ = first.id;
        first_wait_s_ = std::max(first_wait_s_, start_s - first.arrived_s);
        backfill(line, start_s);
    }
    const auto looked_at = queue_.begin() + static_cast<std::ptrdiff_t>(seen);
    queue_.erase(
        std::remove_if(queue_.begin(), looked_at, [&](int slot) { return tasks_[slot].state != State::kInLine; }),
        looked_at);
}

// Start who fits and does not delay the first in line, for whom nodes are kept from `first_start_s` on.
void FirstCome::backfill(const std::vector<int>& line, double first_start_s) {
    std::vector<char> refused(2 * asks_.size(), 0);  // by what they ask for, and whether they are short
    for (std::size_t i = 1; i < line.size(); ++i) {
        const Task& task = tasks_[line[i]];
        const bool is_short = now_s_ + task.predicted_s <= first_start_s;
        char& is_refused = refused[2 * task.asks + is_short];
        if (is_refused) continue;
        if (Parts parts = fit(task, !is_short); parts.empty())
            is_refused = 1;
        else
            begin(line[i], std::move(parts));
    }
}

void FirstCome::note_wait(double wait_s) {
    waits_s_.push_back(wait_s);
    if (waits_s_.size() > kRemembered) waits_s_.pop_front();
}

// --- what it says ---

double FirstCome::longest_wait_s() const {
    double longest_s = first_wait_s_;
    for (double wait_s : waits_s_) longest_s = std::max(longest_s, wait_s);
    return longest_s;
}

std::vector<FirstCome::VirtualRun> FirstCome::running() const {
    std::vector<VirtualRun> runs;
    for (const auto& [end_s, slot] : ends_) {
        const Task& task = tasks_[slot];
        runs.push_back({task.id, {}, task.began_s, end_s});
        for (const auto& [node, gpus] : task.parts) runs.back().parts.emplace_back(nodes_[node].id, gpus);
    }
    return runs;
}

std::vector<std::string> FirstCome::line() const {
    std::vector<std::string> ids;
    for (int slot : queue_) ids.push_back(tasks_[slot].id);
    return ids;
}

}  // namespace alto
