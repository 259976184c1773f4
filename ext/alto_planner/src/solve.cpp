#include "solve.hpp"

#include <algorithm>
#include <chrono>
#include <optional>
#include <utility>

#include "bounds.hpp"
#include "clock.hpp"
#include "dispatch.hpp"
#include "orders.hpp"
#include "packing.hpp"
#include "search.hpp"
#include "sequencing.hpp"

namespace alto {
namespace {

// Above this many tasks a plan without budget is one list alone: its latency is what counts then.
constexpr std::size_t kManyTasks = 4000;
// Packing and searching pay off while a schedule takes microseconds.
constexpr std::size_t kSearchTasks = 6000;
// So few that ordering them takes little of the budget.
constexpr std::size_t kFewTasks = 120;
// How much longer than the packing the schedule may be, if mean completion gains by it.
constexpr double kSlacks[] = {0, 0.002, 0.005, 0.01};
// Tasks of this share of the makespan go first in some lists.
constexpr double kLongShares[] = {0.5, 0.2, 0.1, 0.05};

class Solver {
  public:
    Solver(const Problem& problem, const Request& request)
        : problem_(problem),
          request_(request),
          weights_(completion_weights(problem)),
          random_(request.seed),
          began_(std::chrono::steady_clock::now()) {}

    Answer run() {
        run_lists();
        bounds_ = lower_bounds(problem_, longest_known());
        choose();
        std::array<long, 3> effort = improving() ? std::array<long, 3>{0, 0, 0} : std::array<long, 3>{-1, -1, -1};
        if (request_.only.empty() && problem_.tasks.size() <= kSearchTasks && improving()) {
            pack(effort);
            Effort rounds(left(1.0), request_.effort[2]);
            search_orders(problem_, bounds_, weights_, best_, rounds, random_);
            effort[2] = rounds.used();
        }
        return {std::move(best_.schedule), best_.score, bounds_, best_.source, effort};
    }

  private:
    [[nodiscard]] bool improving() const { return request_.budget_s > 0 || request_.effort[0] >= 0; }

    // Seconds until `share` of the budget is spent.
    [[nodiscard]] double left(double share) const {
        const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - began_;
        return std::max(0.0, share * request_.budget_s - spent.count());
    }

    void offer(const Allotment& allotment, std::vector<int> order, const char* source) {
        Schedule schedule = dispatch(problem_, allotment, order);
        found_.push_back({std::move(schedule), {}, std::move(order), source});
    }

    void offer_mirrored(const Allotment& allotment) {
        Mirrored mirrored = mirror(problem_, allotment, Rule::kLargestArea);
        offer(allotment, mirrored.order, "largest area mirrored");
        if (!problem_.plain(allotment)) return;
        Schedule shifted = shift_left(problem_, mirrored.placed);
        found_.push_back({std::move(shifted), {}, std::move(mirrored.order), "largest area mirrored"});
    }

    void run_lists() {
        const std::string& only = request_.only;
        allotments_.push_back(allot(problem_, Allot::kBalanced));
        if (only == "fifo") return offer(allotments_[0], list_order(problem_, allotments_[0], Rule::kArrival), "fifo");
        if (only == "longest")
            return offer(allotments_[0], list_order(problem_, allotments_[0], Rule::kLongest), "lpt");
        if (only == "shortest")
            return offer(allotments_[0], list_order(problem_, allotments_[0], Rule::kShortest), "sjf");
        if (only == "mirrored") return offer_mirrored(allotments_[0]);
        const auto smallest = [&](const Allotment& allotment) {
            offer(allotment, fair_order(problem_, allotment, list_order(problem_, allotment, Rule::kSmallestArea)),
                  "smallest area");
        };
        smallest(allotments_[0]);
        if (only == "smallest_area" || (problem_.tasks.size() > kManyTasks && !improving())) return;
        for (Allot rule : {Allot::kLeastArea, Allot::kShortest}) {
            Allotment other = allot(problem_, rule);
            if (std::find(allotments_.begin(), allotments_.end(), other) != allotments_.end()) continue;
            smallest(other);
            allotments_.push_back(std::move(other));
        }
        for (const Allotment& allotment : allotments_) {
            offer_mirrored(allotment);
            offer(allotment, list_order(problem_, allotment, Rule::kLongest), "longest first");
        }
        if (!improving() || problem_.objective.makespan <= 0) return;
        for (double share : kLongShares)
            for (Rule rule : {Rule::kSmallestArea, Rule::kShortest}) {
                const std::vector<int> order = list_order(problem_, allotments_[0], rule);
                offer(allotments_[0], long_first(problem_, allotments_[0], order, share), "long first");
            }
    }

    [[nodiscard]] double longest_known() const {
        double shortest = kNever;
        for (const Candidate& candidate : found_) {
            double end = 0;
            for (const Pinned& pinned : problem_.pinned) end = std::max(end, pinned.end_s - problem_.now_s);
            for (std::size_t i = 0; i < problem_.tasks.size(); ++i)
                if (candidate.schedule.placed(i))
                    end = std::max(end, candidate.schedule.end_s(problem_, i) - problem_.now_s);
            shortest = std::min(shortest, end);
        }
        return shortest;
    }

    void choose() {
        for (Candidate& candidate : found_) candidate.score = evaluate(problem_, candidate.schedule, bounds_, weights_);
        best_ = std::move(*std::min_element(found_.begin(), found_.end(), [](const Candidate& a, const Candidate& b) {
            return a.score.value < b.score.value;
        }));
    }

    void pack(std::array<long, 3>& effort) {
        std::optional<Packing> packing = Packing::make(problem_, allotments_[0]);
        if (!packing || problem_.objective.makespan <= 0) return;
        packing->fill();
        Effort moves(left(packing->tasks().size() <= kFewTasks ? 0.75 : 0.5), request_.effort[0]);
        packing->improve(bounds_.makespan_s, moves, random_);
        effort[0] = moves.used();
        std::vector<double> weights;
        for (int task : packing->tasks()) weights.push_back(weights_[task]);
        const double shortest = std::max(packing->largest_load(), bounds_.makespan_s);
        double limit = shortest;
        double best_value = kNever;
        for (double slack : kSlacks) {
            Effort none(0, 0);
            const Candidate tried = sequenced(*packing, weights, shortest * (1 + slack), none);
            if (tried.score.value >= best_value) continue;
            best_value = tried.score.value;
            limit = shortest * (1 + slack);
        }
        Effort rounds(left(0.9), request_.effort[1]);
        Candidate packed = sequenced(*packing, weights, limit, rounds);
        effort[1] = rounds.used();
        packed.order = start_order(problem_, packed.schedule);
        if (packed.score.value < best_.score.value) best_ = std::move(packed);
    }

    Candidate sequenced(const Packing& packing, const std::vector<double>& weights, double limit, Effort& rounds) {
        const auto [starts, units] = sequence(packing, weights, limit, rounds, random_);
        Candidate found{packing.schedule(problem_, allotments_[0], starts, units), {}, {}, "packed"};
        found.score = evaluate(problem_, found.schedule, bounds_, weights_);
        return found;
    }

    const Problem& problem_;
    const Request& request_;
    std::vector<double> weights_;
    Random random_;
    std::chrono::steady_clock::time_point began_;
    std::vector<Allotment> allotments_;
    std::vector<Candidate> found_;
    Bounds bounds_;
    Candidate best_;
};

}  // namespace

Answer solve(const Problem& problem, const Request& request) { return Solver(problem, request).run(); }

}  // namespace alto
