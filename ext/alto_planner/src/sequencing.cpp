#include "sequencing.hpp"

#include <algorithm>
#include <limits>

namespace alto {
namespace {

constexpr int kMovesPerRound = 400;
// Postponed tasks that are tried again after each that is placed: fewer in an order of many, for each costs time.
constexpr std::size_t kRetried = 48, kRetriedOfMany = 4, kMany = 2000;
constexpr int kNear = 12;  // places of an order that count as near

// What all trees share.
struct Ground {
    const Packing& packing;
    const std::vector<double>& weights;
    double limit;
    std::vector<int> unit_of;

    [[nodiscard]] const Unit& unit(int p) const { return packing.units()[unit_of[p]]; }
};

// The tasks under one root, in the order in which they take their units.
class Tree {
  public:
    std::vector<int> order;
    double weighted = 0;  // sum of weight x end

    explicit Tree(const Ground& ground) : ground_(&ground) {}

    void hold(const Unit& unit) {
        first_leaf_ = std::min(first_leaf_, unit.first_leaf);
        const int leaves = unit.first_leaf + unit.width - first_leaf_;
        free_.resize(std::max<std::size_t>(free_.size(), leaves));
    }

    // Narrow before wide never exceeds the largest load. Otherwise: smallest area first, as long as every GPU of the
    // task could still finish what is left for it in time; what would break that goes to the end, narrow before wide.
    void choose_start() {
        order = by_key(0);
        weighted = decode(kNever);
        for (int rule = 1; rule < 3; ++rule) {
            std::vector<int> kept = order;
            order = within(by_key(rule));
            if (const double found = decode(weighted); found < weighted)
                weighted = found;
            else
                order = std::move(kept);
        }
    }

    // The weighted sum of ends of `order`; endless once it exceeds `most`, or a task ends after the limit. Whoever asks
    // for starts is told all.
    double decode(double most, std::vector<double>* starts = nullptr) {
        release();
        double sum = 0;
        for (int p : order) {
            const Unit& unit = ground_->unit(p);
            double* free = free_at(unit);
            double start = free[0];
            for (int i = 1; i < unit.width; ++i) start = std::max(start, free[i]);
            const double end = start + ground_->packing.seconds(p);
            for (int i = 0; i < unit.width; ++i) free[i] = end;
            sum += ground_->weights[p] * end;
            if (starts) (*starts)[p] = start;
            if (!starts && (sum > most || end > ground_->limit)) return kNever;
        }
        return sum;
    }

    void shift(int from, int to, bool swap) {
        const auto begin = order.begin();
        if (swap)
            std::swap(order[from], order[to]);
        else if (from < to)
            std::rotate(begin + from, begin + from + 1, begin + to + 1);
        else
            std::rotate(begin + to, begin + from, begin + from + 1);
    }

  private:
    void release() {
        for (std::size_t i = 0; i < free_.size(); ++i)
            free_[i] = ground_->packing.offset(first_leaf_ + static_cast<int>(i));
    }
    [[nodiscard]] double* free_at(const Unit& unit) { return &free_[unit.first_leaf - first_leaf_]; }

    [[nodiscard]] std::vector<int> by_key(int rule) const {
        std::vector<int> sorted = order;
        std::stable_sort(sorted.begin(), sorted.end(), [&](int a, int b) { return key(a, rule) < key(b, rule); });
        return sorted;
    }

    std::vector<int> within(const std::vector<int>& wanted) {
        std::vector<double> left(free_.size(), 0);  // work still to be placed, by leaf
        for (int p : wanted) {
            const Unit& unit = ground_->unit(p);
            for (int i = 0; i < unit.width; ++i) left[unit.first_leaf - first_leaf_ + i] += ground_->packing.seconds(p);
        }
        release();
        const std::size_t retried = wanted.size() > kMany ? kRetriedOfMany : kRetried;
        std::vector<int> placed, postponed;
        const auto place = [&](int p) {
            const Unit& unit = ground_->unit(p);
            const double seconds = ground_->packing.seconds(p);
            double* free = free_at(unit);
            double* rest = &left[unit.first_leaf - first_leaf_];
            double end = 0;
            for (int i = 0; i < unit.width; ++i) end = std::max(end, free[i]);
            end += seconds;
            for (int i = 0; i < unit.width; ++i)
                if (end + rest[i] - seconds > ground_->limit) return false;
            for (int i = 0; i < unit.width; ++i) {
                free[i] = end;
                rest[i] -= seconds;
            }
            placed.push_back(p);
            return true;
        };
        for (int p : wanted) {
            for (std::size_t i = 0; i < std::min(postponed.size(), retried);) {
                if (place(postponed[i]))
                    postponed.erase(postponed.begin() + static_cast<std::ptrdiff_t>(i));
                else
                    ++i;
            }
            if (!place(p)) postponed.push_back(p);
        }
        std::stable_sort(postponed.begin(), postponed.end(), [&](int a, int b) { return key(a, 0) < key(b, 0); });
        placed.insert(placed.end(), postponed.begin(), postponed.end());
        return placed;
    }

    [[nodiscard]] double key(int p, int rule) const {
        const double width = ground_->unit(p).width, seconds = ground_->packing.seconds(p);
        if (rule == 0) return width * 1e12 + seconds / ground_->weights[p];
        return (rule == 1 ? width * seconds : seconds) / ground_->weights[p];
    }

    const Ground* ground_;
    int first_leaf_ = std::numeric_limits<int>::max();
    std::vector<double> free_;  // when each leaf of this root becomes free
};

// Descent: a move is taken back unless the sum stays or falls.
class Trees {
  public:
    Trees(const Packing& packing, const std::vector<double>& weights, double limit)
        : ground_{packing, weights, limit, packing.unit_of()},
          tasks_(static_cast<int>(packing.tasks().size())),
          trees_(packing.roots(), Tree(ground_)) {
        for (const Unit& unit : packing.units()) trees_[unit.root].hold(unit);
        for (int p = 0; p < tasks_; ++p) tree_of(p).order.push_back(p);
        for (Tree& tree : trees_) tree.choose_start();
    }

    void improve(Random& random) {
        for (int move = 0; move < kMovesPerRound; ++move) {
            const int kind = random.below(4);
            if (kind == 0)
                relocate(random);
            else if (kind == 1)
                exchange(random);
            else
                reorder(random);
        }
    }

    Sequence sequence() {
        Sequence found{std::vector<double>(tasks_, 0), ground_.unit_of};
        for (Tree& tree : trees_) tree.decode(kNever, &found.start_s);
        return found;
    }

  private:
    [[nodiscard]] Tree& tree_of(int p) { return trees_[ground_.unit(p).root]; }

    // Whether what changed, in two trees or in one, is no worse.
    bool keep(Tree& a, Tree& b) {
        const bool one = &a == &b;
        const double before = one ? a.weighted : a.weighted + b.weighted;
        const double first = a.decode(before);
        const double second = one || first == kNever ? first : b.decode(before - first);
        if (second == kNever) return false;
        a.weighted = first;
        b.weighted = second;
        return true;
    }

    // A task to another place in the order of its tree, or two there change places.
    void reorder(Random& random) {
        Tree& tree = tree_of(random.below(tasks_));
        const int count = static_cast<int>(tree.order.size());
        const int from = random.below(count);
        const int reach = random.below(4) == 0 ? count : std::min(count, kNear);
        int to = random.below(4) == 0 ? random.below(count) : from + random.below(2 * reach + 1) - reach;
        to = std::clamp(to, 0, count - 1);
        if (to == from) return;
        const bool swap = random.below(2) == 0;
        tree.shift(from, to, swap);
        if (keep(tree, tree)) return;
        if (swap)
            tree.shift(from, to, true);
        else
            tree.shift(to, from, false);
    }

    // A task to another unit: anywhere in the order there, or near those as short as itself.
    void relocate(Random& random) {
        const int p = random.below(tasks_);
        const std::vector<int>& units = ground_.packing.candidates(p);
        const int from = ground_.unit_of[p], to = units[random.below(static_cast<int>(units.size()))];
        if (to == from) return;
        Tree& source = tree_of(p);
        const auto left = std::find(source.order.begin(), source.order.end(), p) - source.order.begin();
        source.order.erase(source.order.begin() + left);
        ground_.unit_of[p] = to;
        Tree& target = tree_of(p);
        const int size = static_cast<int>(target.order.size());
        int place = 0;
        if (random.below(2)) {
            place = random.below(size + 1);
        } else {
            const double seconds = ground_.packing.seconds(p);
            while (place < size && ground_.packing.seconds(target.order[place]) < seconds) ++place;
            place = std::clamp(place + random.below(kNear / 2 + 1) - kNear / 4, 0, size);
        }
        target.order.insert(target.order.begin() + place, p);
        if (keep(target, source)) return;
        target.order.erase(target.order.begin() + place);
        ground_.unit_of[p] = from;
        source.order.insert(source.order.begin() + left, p);
    }

    // Two tasks change places, units included.
    void exchange(Random& random) {
        const int p = random.below(tasks_), q = random.below(tasks_);
        if (!ground_.packing.alike(p, q) || ground_.unit_of[p] == ground_.unit_of[q]) return;
        Tree& a = tree_of(p);
        Tree& b = tree_of(q);
        const auto place_of_p = std::find(a.order.begin(), a.order.end(), p);
        const auto place_of_q = std::find(b.order.begin(), b.order.end(), q);
        const auto swap = [&] {
            std::swap(*place_of_p, *place_of_q);
            std::swap(ground_.unit_of[p], ground_.unit_of[q]);
        };
        swap();
        if (!keep(a, b)) swap();
    }

    Ground ground_;
    int tasks_;
    std::vector<Tree> trees_;
};

}  // namespace

Sequence sequence(const Packing& packing, const std::vector<double>& weights, double limit_s, Effort& effort,
                  Random& random) {
    Trees trees(packing, weights, limit_s * (1 + 1e-12));
    while (effort.another()) trees.improve(random);
    return trees.sequence();
}

}  // namespace alto
