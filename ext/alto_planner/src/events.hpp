// What is still to happen, soonest first: a heap with four children a node, whose entries are small enough to stay in
// the cache.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "model.hpp"

namespace alto {

// GPUs that become free (`gpus`), a window that ends (no GPUs), or, with node -1, task `tenant_or_task` that may start.
struct Event {
    int node = -1;
    int tenant_or_task = -1;  // with GPUs: the tenant whose quota they count against, -1 for none
    Mask gpus = 0;
};

class EventQueue {
  public:
    void reserve(std::size_t count) { events_.reserve(count); }
    [[nodiscard]] bool empty() const { return heap_.empty(); }
    [[nodiscard]] double time() const { return heap_.front().time; }

    void push(double time, const Event& event) {
        heap_.push_back({time, static_cast<std::uint32_t>(events_.size())});
        events_.push_back(event);
        std::size_t at = heap_.size() - 1;
        const Entry entry = heap_[at];
        while (at > 0 && entry.time < heap_[(at - 1) / 4].time) {
            heap_[at] = heap_[(at - 1) / 4];
            at = (at - 1) / 4;
        }
        heap_[at] = entry;
    }

    Event pop() {
        const Event event = events_[heap_.front().event];
        const Entry last = heap_.back();
        heap_.pop_back();
        if (heap_.empty()) return event;
        std::size_t at = 0;
        while (4 * at + 1 < heap_.size()) {
            std::size_t least = 4 * at + 1;
            const std::size_t end = std::min(heap_.size(), 4 * at + 5);
            for (std::size_t child = least + 1; child < end; ++child)
                if (heap_[child].time < heap_[least].time) least = child;
            if (!(heap_[least].time < last.time)) break;
            heap_[at] = heap_[least];
            at = least;
        }
        heap_[at] = last;
        return event;
    }

  private:
    struct Entry {
        double time;
        std::uint32_t event;
    };
    std::vector<Entry> heap_;
    std::vector<Event> events_;
};

}  // namespace alto
