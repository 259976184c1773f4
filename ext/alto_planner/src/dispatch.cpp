#include "dispatch.hpp"

#include <algorithm>
#include <bit>
#include <queue>

namespace alto {
namespace {

constexpr int kMaxHolds = 16;       // tasks that are given GPUs ahead of the list at the same time
constexpr int kBackfillDepth = 64;  // how far into a queue to look for a task short enough for a held node
constexpr double kSameTime = 1e-9;
constexpr int kNone = std::numeric_limits<int>::max();

struct Event {
    double time;
    int node;  // -1: a task may start from now on
    Mask gpus;
    int tenant;
    int task;
    bool operator>(const Event& other) const {
        return time != other.time ? time > other.time : (node != other.node ? node > other.node : task > other.task);
    }
};

// Tasks of one shape (and of one tenant, where quotas apply), in list order.
struct Line {
    int shape;
    int tenant;
    std::vector<int> ranks;
    std::size_t head = 0;
    std::priority_queue<int, std::vector<int>, std::greater<>> late;  // released after the start
};

struct Hold {
    int task;
    std::vector<PartOut> parts;
};

class Dispatcher {
  public:
    Dispatcher(const Problem& problem, const Allotment& allotment, const std::vector<int>& order,
               const DispatchOptions& options)
        : problem_(problem), order_(order), options_(options), out_(problem.tasks.size()), now_(problem.now_s) {
        out_.choice = allotment;
        out_.parts.reserve(order.size());
        set_up_nodes();
        set_up_lines();
        if (options_.bounded_wait && !options_.empty_cluster) set_up_overdue();
    }

    Schedule run() {
        while (true) {
            start_all();
            if (events_.empty()) break;
            advance();
        }
        return std::move(out_);
    }

  private:
    const Choice& chosen(int task) const { return problem_.choices[out_.choice[task]]; }
    const Shape& shape_of(int task) const { return problem_.shapes[chosen(task).shape]; }

    void set_up_nodes() {
        const std::size_t count = problem_.nodes.size();
        free_.assign(count, 0);
        special_.assign(count, -1);
        next_.assign(count, -1);
        previous_.assign(count, -1);
        heads_.assign(problem_.classes.size() * (kMaxGpus + 1), -1);
        filled_.assign(problem_.classes.size(), 0);
        tenant_gpus_.assign(problem_.tenants.size(), 0);
        cohort_gpus_.assign(problem_.tenants.size() + 1, 0);
        cohort_quota_.assign(problem_.tenants.size() + 1, 0);
        for (const Tenant& tenant : problem_.tenants)
            if (tenant.cohort >= 0) cohort_quota_[tenant.cohort] += tenant.quota_gpus;
        for (std::size_t n = 0; n < count; ++n) {
            const Node& node = problem_.nodes[n];
            if (node.ready) free_[n] = node.gpus == kMaxGpus ? ~Mask{0} : (Mask{1} << node.gpus) - 1;
        }
        if (!options_.empty_cluster) {
            for (const Pinned& pinned : problem_.pinned) {
                if (pinned.tenant >= 0) take_quota(pinned.tenant, std::popcount(pinned.gpus));
                free_[pinned.node] &= ~pinned.gpus;
                events_.push({pinned.end_s, pinned.node, pinned.gpus, pinned.tenant, -1});
            }
            for (const Window& window : problem_.windows) add_window(window);
        }
        for (std::size_t n = count; n-- > 0;)
            if (problem_.nodes[n].ready && special_[n] < 0) link(static_cast<int>(n));
    }

    void set_up_lines() {
        std::vector<int> line_of(problem_.shapes.size() * (problem_.tenants.size() + 1), -1);
        for (std::size_t rank = 0; rank < order_.size(); ++rank) {
            const int task = order_[rank];
            if (out_.choice[task] < 0 || shape_of(task).parts.empty()) continue;
            const int tenant = limited(problem_.tasks[task].tenant) ? problem_.tasks[task].tenant : -1;
            int& line = line_of[chosen(task).shape * (problem_.tenants.size() + 1) + tenant + 1];
            if (line < 0) {
                line = static_cast<int>(lines_.size());
                lines_.push_back({chosen(task).shape, tenant, {}, 0, {}});
            }
            const double release = options_.empty_cluster ? -kNever : problem_.tasks[task].not_before_s;
            if (release > now_) {
                released_to_.resize(problem_.tasks.size(), {-1, -1});
                released_to_[task] = {line, static_cast<int>(rank)};
                events_.push({release, -1, 0, -1, task});
            } else {
                lines_[line].ranks.push_back(static_cast<int>(rank));
            }
        }
    }

    // Tasks that are given GPUs ahead of the list: past their deadline now, or of raised priority. What becomes overdue
    // later is left to the plan of that time.
    void set_up_overdue() {
        int lowest = std::numeric_limits<int>::max();
        for (int task : order_) lowest = std::min(lowest, problem_.tasks[task].priority);
        for (int task : order_) {
            const Task& row = problem_.tasks[task];
            if (out_.choice[task] < 0 || shape_of(task).parts.empty() || row.not_before_s > now_) continue;
            const double due = row.priority > lowest ? now_ : row.arrived_s + problem_.patience_s(out_.choice[task]);
            if (due <= now_) overdue_.push_back({row.priority, due, task});
        }
        // Higher priority first, then longest overdue, then by the list.
        std::stable_sort(overdue_.begin(), overdue_.end(), [](const Overdue& a, const Overdue& b) {
            return a.priority != b.priority ? a.priority > b.priority : a.due_s < b.due_s;
        });
        if (overdue_.empty()) return;
        gpu_end_.assign(problem_.nodes.size() * kMaxGpus, now_);
        for (const Pinned& pinned : problem_.pinned) set_ends({pinned.node, pinned.gpus}, pinned.end_s);
    }

    // ---- nodes -----------------------------------------------------------------------------------------------------

    void set_ends(const PartOut& part, double end_s) {
        for (Mask left = part.gpus; left; left &= left - 1)
            gpu_end_[part.node * kMaxGpus + std::countr_zero(left)] = end_s;
    }

    void link(int node) {
        const int count = std::popcount(free_[node]);
        if (count == 0) return;
        const int node_class = problem_.nodes[node].node_class;
        int& head = heads_[node_class * (kMaxGpus + 1) + count];
        next_[node] = head;
        previous_[node] = -1;
        if (head >= 0) previous_[head] = node;
        head = node;
        filled_[node_class] |= Mask{1} << (count - 1);
    }

    void unlink(int node) {
        const int count = std::popcount(free_[node]);
        if (count == 0) return;
        const int node_class = problem_.nodes[node].node_class;
        int& head = heads_[node_class * (kMaxGpus + 1) + count];
        if (previous_[node] >= 0) next_[previous_[node]] = next_[node];
        if (next_[node] >= 0) previous_[next_[node]] = previous_[node];
        if (head == node) head = next_[node];
        if (head < 0) filled_[node_class] &= ~(Mask{1} << (count - 1));
    }

    void change_free(int node, Mask free) {
        if (special_[node] < 0 && problem_.nodes[node].ready) {
            unlink(node);
            free_[node] = free;
            link(node);
        } else {
            free_[node] = free;
        }
    }

    // The fullest ordinary node with `width` free GPUs, of a class that `shape` may use; -1 for none.
    int best_fit(const Shape& shape, int width) const {
        int best = -1;
        int best_count = kMaxGpus + 1;
        for (std::size_t c = 0; c < filled_.size(); ++c) {
            const Mask enough = shape.eligible[c] ? filled_[c] >> (width - 1) << (width - 1) : 0;
            if (!enough) continue;
            const int count = std::countr_zero(enough) + 1;
            if (count < best_count) {
                best_count = count;
                best = heads_[c * (kMaxGpus + 1) + count];
            }
        }
        return best;
    }

    // A node with windows or held GPUs: each GPU may be used only by what ends before `blocked_from`.
    struct Special {
        int node;
        std::vector<double> blocked_from;
        std::vector<int> held_by;  // task, -1
        std::vector<Window> windows;
    };

    Special& make_special(int node) {
        if (special_[node] < 0) {
            if (problem_.nodes[node].ready && nodes_linked_) unlink(node);
            special_[node] = static_cast<int>(specials_.size());
            specials_.push_back({node, std::vector<double>(kMaxGpus, kNever), std::vector<int>(kMaxGpus, -1), {}});
        }
        return specials_[special_[node]];
    }

    void add_window(const Window& window) {
        if (!problem_.nodes[window.node].ready || window.end_s <= now_) return;
        nodes_linked_ = false;
        make_special(window.node).windows.push_back(window);
        nodes_linked_ = true;
        events_.push({window.end_s, window.node, 0, -1, -1});
    }

    double blocked_from(const Special& special, int gpu, int task) const {
        double from = special.held_by[gpu] >= 0 && special.held_by[gpu] != task ? special.blocked_from[gpu] : kNever;
        for (const Window& window : special.windows)
            if ((window.gpus >> gpu & 1) && window.end_s > now_) from = std::min(from, std::max(window.start_s, now_));
        return from;
    }

    // GPUs of a special node that `task` may use now, at most `width` of them; 0 when too few.
    Mask usable(const Special& special, int task, int width, double seconds) const {
        Mask found = 0;
        int count = 0;
        for (Mask left = free_[special.node]; left && count < width; left &= left - 1) {
            const int gpu = std::countr_zero(left);
            if (blocked_from(special, gpu, task) >= now_ + seconds - kSameTime) {
                found |= Mask{1} << gpu;
                ++count;
            }
        }
        return count == width ? found : 0;
    }

    static Mask lowest_bits(Mask free, int width) {
        Mask found = 0;
        for (; width > 0; --width, free &= free - 1) found |= free & -free;
        return found;
    }

    // ---- starting --------------------------------------------------------------------------------------------------

    bool limited(int tenant) const {
        return problem_.has_quotas && !options_.empty_cluster && problem_.tenants[tenant].quota_gpus < kNever;
    }

    bool quota_allows(int tenant, int gpus) const {
        const Tenant& row = problem_.tenants[tenant];
        const double used = tenant_gpus_[tenant] + gpus;
        if (used <= row.quota_gpus) return true;
        if (row.cohort < 0 || used > row.quota_gpus + row.borrow_gpus) return false;
        return cohort_gpus_[row.cohort] + gpus <= cohort_quota_[row.cohort];
    }

    bool borrows(int tenant, int gpus) const {
        return tenant >= 0 && tenant_gpus_[tenant] + gpus > problem_.tenants[tenant].quota_gpus;
    }

    void take_quota(int tenant, int gpus) {
        tenant_gpus_[tenant] += gpus;
        if (problem_.tenants[tenant].cohort >= 0) cohort_gpus_[problem_.tenants[tenant].cohort] += gpus;
    }

    // Find GPUs for all parts of `task` now, each on a node of its own.
    bool find(int task, std::vector<PartOut>& found) {
        const Shape& shape = shape_of(task);
        found.clear();
        for (int width : shape.parts) {
            const int node = best_fit(shape, width);
            if (node >= 0) {
                found.push_back({node, lowest_bits(free_[node], width)});
                if (shape.parts.size() > 1) unlink(node);
            } else if (const PartOut part = on_special(task, shape, width, found); part.node >= 0) {
                found.push_back(part);
            } else {
                break;
            }
        }
        if (shape.parts.size() > 1)
            for (std::size_t i = found.size(); i-- > 0;)
                if (special_[found[i].node] < 0) link(found[i].node);
        return found.size() == shape.parts.size();
    }

    // GPUs on a special node that is not among `used`; node -1 for none.
    PartOut on_special(int task, const Shape& shape, int width, const std::vector<PartOut>& used) const {
        for (const Special& special : specials_) {
            if (!shape.eligible[problem_.nodes[special.node].node_class]) continue;
            if (std::any_of(used.begin(), used.end(), [&](const PartOut& part) { return part.node == special.node; }))
                continue;
            const Mask gpus = usable(special, task, width, chosen(task).seconds);
            if (gpus) return {special.node, gpus};
        }
        return {-1, 0};
    }

    void start(int task, const std::vector<PartOut>& parts) {
        const double end = now_ + chosen(task).seconds;
        const int tenant = problem_.tasks[task].tenant;
        out_.start_s[task] = now_;
        out_.first_part[task] = static_cast<int>(out_.parts.size());
        out_.part_count[task] = static_cast<int>(parts.size());
        for (const PartOut& part : parts) {
            out_.parts.push_back(part);
            change_free(part.node, free_[part.node] & ~part.gpus);
            if (!gpu_end_.empty()) set_ends(part, end);
            if (limited(tenant)) take_quota(tenant, std::popcount(part.gpus));
            events_.push({end, part.node, part.gpus, tenant, task});
        }
    }

    bool waiting(int task) const { return out_.start_s[task] == kNever; }

    int head_of(Line& line) {
        while (line.head < line.ranks.size() && !waiting(order_[line.ranks[line.head]])) ++line.head;
        while (!line.late.empty() && !waiting(order_[line.late.top()])) line.late.pop();
        const int usual = line.head < line.ranks.size() ? line.ranks[line.head] : kNone;
        const int late = line.late.empty() ? kNone : line.late.top();
        return std::min(usual, late);
    }

    void start_all() {
        start_overdue();
        while (true) {
            // What a tenant may hold as its own goes before what it would borrow.
            const int own = first_fitting(false);
            const int best = own < kNone || !problem_.has_quotas ? own : first_fitting(true);
            if (best == kNone || !find(order_[best], found_)) return;
            start(order_[best], found_);
        }
    }

    // The first rank in line that fits now; kNone for none.
    int first_fitting(bool borrowed) {
        int best = kNone;
        for (Line& line : lines_) {
            const int rank = head_of(line);
            if (rank >= best) continue;
            const Shape& shape = problem_.shapes[line.shape];
            if (line.tenant >= 0 && !quota_allows(line.tenant, shape.gpus)) continue;
            if (problem_.has_quotas && borrowed != borrows(line.tenant, shape.gpus)) continue;
            if (shape.parts.size() == 1 ? best_fit(shape, shape.parts[0]) >= 0 : find(order_[rank], found_)) {
                best = rank;
            } else if (!specials_.empty()) {
                best = std::min(best, backfill_rank(line, best));
            }
        }
        return best;
    }

    // The first task of a line that is short enough for what the special nodes have left.
    int backfill_rank(Line& line, int below) {
        int looked = 0;
        for (std::size_t i = line.head; i < line.ranks.size() && looked < kBackfillDepth; ++i) {
            if (line.ranks[i] >= below) break;
            if (!waiting(order_[line.ranks[i]])) continue;
            ++looked;
            if (find(order_[line.ranks[i]], found_)) return line.ranks[i];
        }
        return kNone;
    }

    // ---- tasks ahead of the list -----------------------------------------------------------------------------------

    void start_overdue() {
        std::erase_if(served_, [&](int task) { return !waiting(task); });
        while (served_.size() < kMaxHolds && next_overdue_ < overdue_.size()) {
            const int task = overdue_[next_overdue_++].task;
            if (waiting(task)) served_.push_back(task);
        }
        for (int task : served_) {
            const int tenant = problem_.tasks[task].tenant;
            if (limited(tenant) && !quota_allows(tenant, shape_of(task).gpus)) continue;
            const Shape& shape = shape_of(task);
            const Hold* kept = hold_of(task);
            const bool may_fit = shape.parts.size() > 1 || best_fit(shape, shape.parts[0]) >= 0 ||
                                 (kept ? is_free(*kept) : !specials_.empty());
            if (may_fit && find(task, found_)) {
                start(task, found_);
                release_hold(task);
            } else if (!kept) {
                hold(task);
            }
        }
    }

    [[nodiscard]] const Hold* hold_of(int task) const {
        const auto found = std::find_if(holds_.begin(), holds_.end(), [&](const Hold& h) { return h.task == task; });
        return found == holds_.end() ? nullptr : &*found;
    }

    [[nodiscard]] bool is_free(const Hold& kept) const {
        return std::all_of(kept.parts.begin(), kept.parts.end(),
                           [&](const PartOut& part) { return (free_[part.node] & part.gpus) == part.gpus; });
    }

    void hold(int task) {
        const Shape& shape = shape_of(task);
        Hold made{task, {}};
        double shadow = now_;
        for (int width : shape.parts) {
            double best_time = kNever;
            PartOut best{-1, 0};
            for (std::size_t n = 0; n < problem_.nodes.size(); ++n) {
                if (!problem_.nodes[n].ready || !shape.eligible[problem_.nodes[n].node_class]) continue;
                if (std::any_of(made.parts.begin(), made.parts.end(),
                                [&](const PartOut& part) { return part.node == static_cast<int>(n); }))
                    continue;
                consider_hold(static_cast<int>(n), width, chosen(task).seconds, best_time, best);
            }
            if (best.node < 0) return;
            made.parts.push_back(best);
            shadow = std::max(shadow, best_time);
        }
        for (const PartOut& part : made.parts) {
            Special& special = make_special(part.node);
            for (Mask left = part.gpus; left; left &= left - 1) {
                special.held_by[std::countr_zero(left)] = task;
                special.blocked_from[std::countr_zero(left)] = shadow;
            }
        }
        holds_.push_back(std::move(made));
    }

    void consider_hold(int node, int width, double seconds, double& best_time, PartOut& best) {
        std::pair<double, int> ends[kMaxGpus];
        int count = 0;
        const Special* special = special_[node] >= 0 ? &specials_[special_[node]] : nullptr;
        for (int gpu = 0; gpu < problem_.nodes[node].gpus; ++gpu) {
            double end = std::max(now_, gpu_end_[node * kMaxGpus + gpu]);
            if (special && special->held_by[gpu] >= 0) continue;
            if (special)
                for (const Window& window : special->windows)
                    if ((window.gpus >> gpu & 1) && end + seconds > window.start_s) end = std::max(end, window.end_s);
            ends[count++] = {end, gpu};
        }
        if (count < width) return;
        std::partial_sort(ends, ends + width, ends + count);
        if (ends[width - 1].first >= best_time) return;
        best_time = ends[width - 1].first;
        best = {node, 0};
        for (int i = 0; i < width; ++i) best.gpus |= Mask{1} << ends[i].second;
    }

    void release_hold(int task) {
        for (std::size_t i = 0; i < holds_.size(); ++i) {
            if (holds_[i].task != task) continue;
            for (const PartOut& part : holds_[i].parts) {
                Special& special = specials_[special_[part.node]];
                for (int& holder : special.held_by)
                    if (holder == task) holder = -1;
                make_ordinary_again(part.node);
            }
            holds_.erase(holds_.begin() + static_cast<std::ptrdiff_t>(i));
            return;
        }
    }

    void make_ordinary_again(int node) {
        Special& special = specials_[special_[node]];
        std::erase_if(special.windows, [&](const Window& window) { return window.end_s <= now_; });
        const bool held = std::any_of(special.held_by.begin(), special.held_by.end(), [](int t) { return t >= 0; });
        if (held || !special.windows.empty()) return;
        const int index = special_[node];
        special_[node] = -1;
        if (index + 1 != static_cast<int>(specials_.size())) {
            specials_[index] = std::move(specials_.back());
            special_[specials_[index].node] = index;
        }
        specials_.pop_back();
        if (problem_.nodes[node].ready) link(node);
    }

    void advance() {
        now_ = std::max(now_, events_.top().time);
        while (!events_.empty() && events_.top().time <= now_ + kSameTime) {
            const Event event = events_.top();
            events_.pop();
            if (event.node < 0) {
                lines_[released_to_[event.task].line].late.push(released_to_[event.task].rank);
            } else if (event.gpus) {
                if (problem_.nodes[event.node].ready) change_free(event.node, free_[event.node] | event.gpus);
                if (event.tenant >= 0 && (event.task < 0 || limited(event.tenant)))
                    take_quota(event.tenant, -std::popcount(event.gpus));
            } else if (special_[event.node] >= 0) {
                make_ordinary_again(event.node);
            }
        }
    }

    const Problem& problem_;
    const std::vector<int>& order_;
    DispatchOptions options_;
    Schedule out_;
    double now_;

    std::vector<Mask> free_;
    std::vector<int> special_, next_, previous_, heads_;
    std::vector<Mask> filled_;
    std::vector<double> gpu_end_;  // when each GPU becomes free; kept only while tasks are overdue
    std::vector<Special> specials_;
    bool nodes_linked_ = true;

    std::vector<double> tenant_gpus_, cohort_gpus_, cohort_quota_;
    std::vector<Line> lines_;
    struct Release {
        int line, rank;
    };
    std::vector<Release> released_to_;
    std::priority_queue<Event, std::vector<Event>, std::greater<>> events_;
    struct Overdue {
        int priority;
        double due_s;
        int task;
    };
    std::vector<Overdue> overdue_;
    std::size_t next_overdue_ = 0;
    std::vector<int> served_;  // of the overdue, those that holds are kept for
    std::vector<Hold> holds_;
    std::vector<PartOut> found_;
};

}  // namespace

Schedule dispatch(const Problem& problem, const Allotment& allotment, const std::vector<int>& order,
                  const DispatchOptions& options) {
    return Dispatcher(problem, allotment, order, options).run();
}

}  // namespace alto
