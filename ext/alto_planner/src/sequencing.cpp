#include "sequencing.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace alto {
namespace {

constexpr int kMovesPerRound = 400;

struct Worth {
    double end = 0;       // latest end
    double weighted = 0;  // sum of weight x end
};

class Tree {
  public:
    Tree(const Packing& packing, const std::vector<double>& weights) : packing_(&packing), weights_(&weights) {}

    std::vector<int> order;
    Worth worth;

    // Narrow before wide never exceeds the largest load. Otherwise: smallest area first, as long as every GPU of the
    // task could still finish what is left for it in time; what would break that goes to the end, narrow before wide.
    void choose_start(double limit) {
        order = by_key(0);
        worth = decode(order, nullptr);
        for (int rule = 1; rule < 3; ++rule) {
            std::vector<int> tried = within(limit, by_key(rule));
            const Worth found = decode(tried, nullptr);
            if (found.end > limit || found.weighted >= worth.weighted) continue;
            worth = found;
            order = std::move(tried);
        }
    }

    void improve(double limit, Random& random, int moves) {
        const int count = static_cast<int>(order.size());
        if (count < 2) return;
        for (int move = 0; move < moves; ++move) {
            const int from = random.below(count);
            const int reach = random.below(4) == 0 ? count : std::min(count, 12);
            int to = random.below(4) == 0 ? random.below(count) : from + random.below(2 * reach + 1) - reach;
            to = std::clamp(to, 0, count - 1);
            if (to == from) continue;
            const bool swap = random.below(2) == 0;
            shift(from, to, swap);
            const Worth found = decode(order, nullptr);
            if (found.end <= limit && found.weighted <= worth.weighted) {
                worth = found;
            } else if (swap) {
                shift(from, to, true);
            } else {
                shift(to, from, false);
            }
        }
    }

    Worth decode(const std::vector<int>& tried, std::vector<double>* starts) {
        const auto& units = packing_->units();
        for (std::size_t i = 0; i < free_.size(); ++i) free_[i] = packing_->offset(first_leaf_ + static_cast<int>(i));
        Worth result;
        for (int p : tried) {
            const Unit& unit = units[packing_->unit_of(p)];
            double* free = &free_[unit.first_leaf - first_leaf_];
            double start = free[0];
            for (int i = 1; i < unit.width; ++i) start = std::max(start, free[i]);
            const double end = start + packing_->seconds(p);
            for (int i = 0; i < unit.width; ++i) free[i] = end;
            result.end = std::max(result.end, end);
            result.weighted += (*weights_)[p] * end;
            if (starts) (*starts)[p] = start;
        }
        return result;
    }

    void set_up() {
        int last = 0;
        first_leaf_ = packing_->leaves();
        for (int p : order) {
            const Unit& unit = packing_->units()[packing_->unit_of(p)];
            first_leaf_ = std::min(first_leaf_, unit.first_leaf);
            last = std::max(last, unit.first_leaf + unit.width);
        }
        free_.assign(last - first_leaf_, 0);
    }

  private:
    static constexpr std::size_t kRetried = 48;  // postponed tasks that are tried again after each that is placed

    [[nodiscard]] std::vector<int> by_key(int rule) const {
        std::vector<int> sorted = order;
        std::stable_sort(sorted.begin(), sorted.end(), [&](int a, int b) { return key(a, rule) < key(b, rule); });
        return sorted;
    }

    std::vector<int> within(double limit, const std::vector<int>& wanted) {
        std::vector<double> left(free_.size(), 0);  // work still to be placed, by leaf
        for (int p : wanted) {
            const Unit& unit = packing_->units()[packing_->unit_of(p)];
            for (int i = 0; i < unit.width; ++i) left[unit.first_leaf - first_leaf_ + i] += packing_->seconds(p);
        }
        for (std::size_t i = 0; i < free_.size(); ++i) free_[i] = packing_->offset(first_leaf_ + static_cast<int>(i));
        std::vector<int> placed, postponed;
        const auto place = [&](int p) {
            const Unit& unit = packing_->units()[packing_->unit_of(p)];
            double* free = &free_[unit.first_leaf - first_leaf_];
            double* rest = &left[unit.first_leaf - first_leaf_];
            double end = 0;
            for (int i = 0; i < unit.width; ++i) end = std::max(end, free[i]);
            end += packing_->seconds(p);
            for (int i = 0; i < unit.width; ++i)
                if (end + rest[i] - packing_->seconds(p) > limit) return false;
            for (int i = 0; i < unit.width; ++i) {
                free[i] = end;
                rest[i] -= packing_->seconds(p);
            }
            placed.push_back(p);
            return true;
        };
        for (int p : wanted) {
            for (std::size_t i = 0; i < std::min(postponed.size(), kRetried);) {
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
        const double width = packing_->units()[packing_->unit_of(p)].width, seconds = packing_->seconds(p);
        if (rule == 0) return width * 1e12 + seconds / (*weights_)[p];
        return (rule == 1 ? width * seconds : seconds) / (*weights_)[p];
    }

    void shift(int from, int to, bool swap) {
        if (swap)
            std::swap(order[from], order[to]);
        else if (from < to)
            std::rotate(order.begin() + from, order.begin() + from + 1, order.begin() + to + 1);
        else
            std::rotate(order.begin() + to, order.begin() + from, order.begin() + from + 1);
    }

    const Packing* packing_;
    const std::vector<double>* weights_;
    int first_leaf_ = 0;
    std::vector<double> free_;
};

}  // namespace

std::vector<double> sequence(const Packing& packing, const std::vector<double>& weights, double limit_s, Effort& effort,
                             Random& random) {
    const double limit = limit_s * (1 + 1e-12);
    std::vector<Tree> trees(packing.roots(), Tree(packing, weights));
    for (std::size_t p = 0; p < packing.tasks().size(); ++p)
        trees[packing.units()[packing.unit_of(static_cast<int>(p))].root].order.push_back(static_cast<int>(p));
    std::erase_if(trees, [](const Tree& tree) { return tree.order.empty(); });
    for (Tree& tree : trees) {
        tree.set_up();
        tree.choose_start(limit);
    }
    for (std::size_t next = 0; effort.another(); next = (next + 1) % trees.size())
        trees[next].improve(limit, random, kMovesPerRound);
    std::vector<double> starts(packing.tasks().size(), 0);
    for (Tree& tree : trees) tree.decode(tree.order, &starts);
    return starts;
}

}  // namespace alto
