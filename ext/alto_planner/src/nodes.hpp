// Free GPUs of every node, and the fullest node on which so many are free, found by bits.
#pragma once

#include <bit>
#include <vector>

#include "model.hpp"

namespace alto {

class FreeNodes {
  public:
    explicit FreeNodes(const Problem& problem)
        : rows_(problem.nodes.size()),
          heads_(problem.classes.size() * (kMaxGpus + 1), -1),
          filled_(problem.classes.size(), 0) {
        for (std::size_t n = 0; n < rows_.size(); ++n) {
            const Node& node = problem.nodes[n];
            rows_[n].node_class = node.node_class;
            rows_[n].ready = node.ready;
            if (!node.ready) continue;
            rows_[n].free = node.gpus == kMaxGpus ? ~Mask{0} : (Mask{1} << node.gpus) - 1;
            rows_[n].count = node.gpus;
        }
    }

    [[nodiscard]] Mask free(int node) const { return rows_[node].free; }
    [[nodiscard]] int free_count(int node) const { return rows_[node].count; }
    [[nodiscard]] bool ready(int node) const { return rows_[node].ready; }
    [[nodiscard]] int node_class(int node) const { return rows_[node].node_class; }

    // Only listed nodes are found by best_fit. A node that takes no work is never listed.
    void list(int node) {
        if (!rows_[node].ready || rows_[node].listed) return;
        rows_[node].listed = true;
        link(node);
    }
    void unlist(int node) {
        if (!rows_[node].listed) return;
        unlink(node);
        rows_[node].listed = false;
    }

    void take(int node, Mask gpus) { change(node, rows_[node].free & ~gpus); }
    void give_back(int node, Mask gpus) {
        if (rows_[node].ready) change(node, rows_[node].free | gpus);
    }

    // The fullest listed node with `width` free GPUs, of a class that `shape` may use; -1 for none.
    [[nodiscard]] int best_fit(const Shape& shape, int width) const {
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

  private:
    struct Row {
        Mask free = 0;
        int count = 0;  // of free GPUs
        int next = -1, previous = -1;
        int node_class = 0;
        bool ready = false, listed = false;
    };

    void change(int node, Mask free) {
        if (rows_[node].listed) unlink(node);
        rows_[node].free = free;
        rows_[node].count = std::popcount(free);
        if (rows_[node].listed) link(node);
    }

    void link(int node) {
        Row& row = rows_[node];
        const int count = row.count;
        if (count == 0) return;
        int& head = heads_[row.node_class * (kMaxGpus + 1) + count];
        row.next = head;
        row.previous = -1;
        if (head >= 0) rows_[head].previous = node;
        head = node;
        filled_[row.node_class] |= Mask{1} << (count - 1);
    }

    void unlink(int node) {
        const Row& row = rows_[node];
        const int count = row.count;
        if (count == 0) return;
        int& head = heads_[row.node_class * (kMaxGpus + 1) + count];
        if (row.previous >= 0) rows_[row.previous].next = row.next;
        if (row.next >= 0) rows_[row.next].previous = row.previous;
        if (head == node) head = row.next;
        if (head < 0) filled_[row.node_class] &= ~(Mask{1} << (count - 1));
    }

    std::vector<Row> rows_;
    std::vector<int> heads_;    // per class and count of free GPUs: the first node of a linked list
    std::vector<Mask> filled_;  // per class: bit c - 1 is set when a node has c free GPUs
};

inline Mask lowest_bits(Mask free, int width) {
    Mask found = 0;
    for (; width > 0; --width, free &= free - 1) found |= free & -free;
    return found;
}

}  // namespace alto
