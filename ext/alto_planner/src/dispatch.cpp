#include "dispatch.hpp"

#include <algorithm>
#include <bit>
#include <optional>
#include <queue>

#include "ahead.hpp"
#include "events.hpp"
#include "kept.hpp"
#include "nodes.hpp"
#include "quotas.hpp"

namespace alto {
namespace {

constexpr int kBackfillDepth = 64;  // how far into a line to look for a task short enough for a kept node
constexpr int kNone = std::numeric_limits<int>::max();

// A task in line. What starting it needs stands here, so that the list is read from front to back.
struct Entry {
    int rank = kNone;
    int task = -1;
    double seconds = 0;
    bool operator>(const Entry& other) const { return rank > other.rank; }
};

// Tasks of one shape (and of one tenant, where quotas apply), in list order.
struct Line {
    int shape;
    int tenant;
    std::vector<Entry> entries;
    std::size_t head = 0;
    std::priority_queue<Entry, std::vector<Entry>, std::greater<>> late;  // released after the start
};

struct Pick {
    Entry entry;
    const Shape* shape = nullptr;
};

class Dispatcher {
  public:
    Dispatcher(const Problem& problem, const Allotment& allotment, const std::vector<int>& order,
               const DispatchOptions& options)
        : problem_(problem),
          options_(options),
          out_(problem.tasks.size()),
          now_(problem.now_s),
          nodes_(problem),
          kept_(problem, nodes_),
          quotas_(problem, options.empty_cluster),
          started_(problem.tasks.size(), 0) {
        out_.choice = allotment;
        out_.parts.reserve(order.size());
        events_.reserve(order.size() + problem.pinned.size());
        if (!options_.empty_cluster) set_up_cluster();
        for (std::size_t n = 0; n < problem.nodes.size(); ++n)
            if (!kept_.has(static_cast<int>(n))) nodes_.list(static_cast<int>(n));
        set_up_lines(order);
        if (options_.bounded_wait && !options_.empty_cluster) {
            ahead_.emplace(problem, allotment, order);
            if (ahead_->empty()) ahead_.reset();
        }
    }

    Schedule run() {
        while (true) {
            if (ahead_) start_ahead();
            for (Pick next = first_in_line(); next.shape && find(next.entry.task, *next.shape, next.entry.seconds);
                 next = first_in_line())
                start(next.entry.task, *next.shape, next.entry.seconds);
            if (events_.empty()) break;
            advance();
        }
        return std::move(out_);
    }

  private:
    void set_up_cluster() {
        for (const Pinned& pinned : problem_.pinned) {
            if (pinned.tenant >= 0) quotas_.take(pinned.tenant, std::popcount(pinned.gpus));
            nodes_.take(pinned.node, pinned.gpus);
            events_.push(pinned.end_s, {pinned.node, pinned.tenant, pinned.gpus});
        }
        for (const Window& window : problem_.windows) {
            if (!nodes_.ready(window.node) || window.end_s <= now_) continue;
            kept_.add_window(window);
            events_.push(window.end_s, {window.node, -1, 0});
        }
    }

    void set_up_lines(const std::vector<int>& order) {
        const std::size_t stride = problem_.tenants.size() + 1;
        std::vector<int> line_of(problem_.shapes.size() * stride, -1);
        for (std::size_t rank = 0; rank < order.size(); ++rank) {
            const int task = order[rank];
            if (out_.choice[task] < 0) continue;
            const Choice& choice = problem_.choices[out_.choice[task]];
            if (problem_.shapes[choice.shape].parts.empty()) continue;
            const Task& row = problem_.tasks[task];
            const int tenant = quotas_.limits(row.tenant) ? row.tenant : -1;
            int& line = line_of[choice.shape * stride + tenant + 1];
            if (line < 0) {
                line = static_cast<int>(lines_.size());
                lines_.push_back({choice.shape, tenant, {}, 0, {}});
                lines_.back().entries.reserve(order.size() - rank);
            }
            const Entry entry{static_cast<int>(rank), task, choice.seconds};
            if (!options_.empty_cluster && row.not_before_s > now_) {
                released_.resize(problem_.tasks.size());
                released_[task] = {line, entry};
                events_.push(row.not_before_s, {-1, task, 0});
            } else {
                lines_[line].entries.push_back(entry);
            }
        }
    }

    // Find GPUs for all parts of `task` now, each on a node of its own. The answer is in found_.
    bool find(int task, const Shape& shape, double seconds) {
        found_.clear();
        for (int width : shape.parts) {
            const int node = nodes_.best_fit(shape, width);
            if (node >= 0) {
                found_.push_back({node, lowest_bits(nodes_.free(node), width)});
                if (shape.parts.size() > 1) nodes_.unlist(node);
            } else if (kept_.empty()) {
                break;
            } else if (const PartOut part = kept_.find(task, shape, width, seconds, now_, found_); part.node >= 0) {
                found_.push_back(part);
            } else {
                break;
            }
        }
        if (shape.parts.size() > 1)
            for (std::size_t i = found_.size(); i-- > 0;)
                if (!kept_.has(found_[i].node)) nodes_.list(found_[i].node);
        return found_.size() == shape.parts.size();
    }

    // Start `task` on the GPUs in found_.
    void start(int task, const Shape& shape, double seconds) {
        const double end = now_ + seconds;
        const int tenant =
            quotas_.on() && quotas_.limits(problem_.tasks[task].tenant) ? problem_.tasks[task].tenant : -1;
        started_[task] = 1;
        out_.start_s[task] = now_;
        out_.first_part[task] = static_cast<int>(out_.parts.size());
        out_.part_count[task] = static_cast<int>(found_.size());
        for (const PartOut& part : found_) {
            out_.parts.push_back(part);
            nodes_.take(part.node, part.gpus);
            if (ahead_) ahead_->taken(part, end);
            events_.push(end, {part.node, tenant, part.gpus});
        }
        if (tenant >= 0) quotas_.take(tenant, shape.gpus);
    }

    void start_ahead() {
        for (int task : ahead_->served(started_)) {
            const Choice& choice = problem_.choices[out_.choice[task]];
            const Shape& shape = problem_.shapes[choice.shape];
            const int tenant = problem_.tasks[task].tenant;
            if (quotas_.limits(tenant) && !quotas_.allow(tenant, shape.gpus)) continue;
            const bool held = kept_.is_held_for(task);
            const bool may_fit = shape.parts.size() > 1 || nodes_.best_fit(shape, shape.parts[0]) >= 0 ||
                                 (held ? kept_.held_gpus_are_free(task) : !kept_.empty());
            if (may_fit && find(task, shape, choice.seconds)) {
                start(task, shape, choice.seconds);
                kept_.release(task, now_);
            } else if (!held) {
                ahead_->hold(task, shape, choice.seconds, now_, nodes_, kept_);
            }
        }
    }

    Pick first_in_line() {
        // What a tenant may hold as its own goes before what it would borrow.
        const Pick own = first_fitting(false);
        return own.shape || !quotas_.on() ? own : first_fitting(true);
    }

    // The first in line that fits now.
    Pick first_fitting(bool borrowed) {
        Pick best;
        for (Line& line : lines_) {
            const Entry head = head_of(line);
            if (head.rank >= best.entry.rank) continue;
            const Shape& shape = problem_.shapes[line.shape];
            if (line.tenant >= 0 && !quotas_.allow(line.tenant, shape.gpus)) continue;
            if (quotas_.on() && borrowed != (line.tenant >= 0 && quotas_.borrows(line.tenant, shape.gpus))) continue;
            const bool fits = shape.parts.size() == 1 ? nodes_.best_fit(shape, shape.parts[0]) >= 0
                                                      : find(head.task, shape, head.seconds);
            if (fits)
                best = {head, &shape};
            else if (!kept_.empty())
                if (const Entry entry = backfilling(line, shape, best.entry.rank); entry.rank < best.entry.rank)
                    best = {entry, &shape};
        }
        return best;
    }

    Entry head_of(Line& line) {
        while (line.head < line.entries.size() && started_[line.entries[line.head].task]) ++line.head;
        while (!line.late.empty() && started_[line.late.top().task]) line.late.pop();
        const Entry usual = line.head < line.entries.size() ? line.entries[line.head] : Entry{};
        return !line.late.empty() && line.late.top().rank < usual.rank ? line.late.top() : usual;
    }

    // The first task of a line that is short enough for what the kept nodes have left.
    Entry backfilling(const Line& line, const Shape& shape, int below) {
        const double until_s = shape.parts.size() == 1 ? kept_.until_s(shape, shape.parts[0], now_) : kNever;
        if (until_s == -kNever) return {};  // not even one for whom they are held finds so many there
        int looked = 0;
        for (std::size_t i = line.head; i < line.entries.size() && looked < kBackfillDepth; ++i) {
            const Entry& entry = line.entries[i];
            if (entry.rank >= below) break;
            if (started_[entry.task]) continue;
            ++looked;
            if (now_ + entry.seconds - kSameTime > until_s && !kept_.is_held_for(entry.task)) continue;
            if (find(entry.task, shape, entry.seconds)) return entry;
        }
        return {};
    }

    void advance() {
        now_ = std::max(now_, events_.time());
        while (!events_.empty() && events_.time() <= now_ + kSameTime) {
            const Event event = events_.pop();
            if (event.node < 0) {
                const Release& released = released_[event.tenant_or_task];
                lines_[released.line].late.push(released.entry);
            } else if (event.gpus) {
                nodes_.give_back(event.node, event.gpus);
                if (event.tenant_or_task >= 0) quotas_.take(event.tenant_or_task, -std::popcount(event.gpus));
            } else {
                kept_.tidy(event.node, now_);
            }
        }
    }

    struct Release {
        int line = -1;
        Entry entry;
    };

    const Problem& problem_;
    DispatchOptions options_;
    Schedule out_;
    double now_;
    FreeNodes nodes_;
    KeptNodes kept_;
    Quotas quotas_;
    std::optional<AheadOfList> ahead_;
    EventQueue events_;
    std::vector<Line> lines_;
    std::vector<Release> released_;  // per task, when anything is held back
    std::vector<char> started_;      // per task
    std::vector<PartOut> found_;
};

}  // namespace

Schedule dispatch(const Problem& problem, const Allotment& allotment, const std::vector<int>& order,
                  const DispatchOptions& options) {
    return Dispatcher(problem, allotment, order, options).run();
}

}  // namespace alto
