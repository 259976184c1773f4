#include "kept.hpp"

#include <algorithm>
#include <bit>

namespace alto {

KeptNodes::Kept& KeptNodes::keep(int node) {
    if (index_[node] < 0) {
        nodes_.unlist(node);
        index_[node] = static_cast<int>(kept_.size());
        kept_.push_back({node, std::vector<double>(kMaxGpus, kNever), std::vector<int>(kMaxGpus, -1), {}});
    }
    return kept_[index_[node]];
}

void KeptNodes::add_window(const Window& window) { keep(window.node).windows.push_back(window); }

void KeptNodes::hold(int task, std::vector<PartOut> parts, double from_s) {
    for (const PartOut& part : parts) {
        Kept& kept = keep(part.node);
        for (Mask left = part.gpus; left; left &= left - 1) {
            kept.held_for[std::countr_zero(left)] = task;
            kept.needed_from_s[std::countr_zero(left)] = from_s;
        }
    }
    holds_.push_back({task, std::move(parts)});
    is_held_for_[task] = 1;
}

const KeptNodes::Hold* KeptNodes::hold_of(int task) const {
    const auto found = std::find_if(holds_.begin(), holds_.end(), [&](const Hold& hold) { return hold.task == task; });
    return found == holds_.end() ? nullptr : &*found;
}

bool KeptNodes::held_gpus_are_free(int task) const {
    const Hold* hold = hold_of(task);
    return hold && std::all_of(hold->parts.begin(), hold->parts.end(),
                               [&](const PartOut& part) { return (nodes_.free(part.node) & part.gpus) == part.gpus; });
}

void KeptNodes::release(int task, double now_s) {
    const Hold* hold = hold_of(task);
    if (!hold) return;
    for (const PartOut& part : hold->parts) {
        for (int& holder : kept_[index_[part.node]].held_for)
            if (holder == task) holder = -1;
        tidy(part.node, now_s);
    }
    holds_.erase(holds_.begin() + (hold - holds_.data()));
    is_held_for_[task] = 0;
}

void KeptNodes::tidy(int node, double now_s) {
    if (index_[node] < 0) return;
    Kept& kept = kept_[index_[node]];
    std::erase_if(kept.windows, [&](const Window& window) { return window.end_s <= now_s; });
    const bool held = std::any_of(kept.held_for.begin(), kept.held_for.end(), [](int task) { return task >= 0; });
    if (held || !kept.windows.empty()) return;
    const int index = index_[node];
    index_[node] = -1;
    if (index + 1 != static_cast<int>(kept_.size())) {
        kept_[index] = std::move(kept_.back());
        index_[kept_[index].node] = index;
    }
    kept_.pop_back();
    nodes_.list(node);
}

double KeptNodes::needed_from_s(const Kept& kept, int gpu, int task, double now_s) const {
    double from = kept.held_for[gpu] >= 0 && kept.held_for[gpu] != task ? kept.needed_from_s[gpu] : kNever;
    for (const Window& window : kept.windows)
        if ((window.gpus >> gpu & 1) && window.end_s > now_s) from = std::min(from, std::max(window.start_s, now_s));
    return from;
}

PartOut KeptNodes::find(int task, const Shape& shape, int width, double seconds, double now_s,
                        const std::vector<PartOut>& used) const {
    for (const Kept& kept : kept_) {
        if (!shape.eligible[nodes_.node_class(kept.node)]) continue;
        if (nodes_.free_count(kept.node) < width) continue;
        if (std::any_of(used.begin(), used.end(), [&](const PartOut& part) { return part.node == kept.node; }))
            continue;
        PartOut found{kept.node, 0};
        int count = 0;
        for (Mask left = nodes_.free(kept.node); left && count < width; left &= left - 1) {
            const int gpu = std::countr_zero(left);
            if (needed_from_s(kept, gpu, task, now_s) < now_s + seconds - kSameTime) continue;
            found.gpus |= Mask{1} << gpu;
            ++count;
        }
        if (count == width) return found;
    }
    return {-1, 0};
}

double KeptNodes::until_s(const Shape& shape, int width, double now_s) const {
    double longest_s = -kNever;
    for (const Kept& kept : kept_) {
        if (!shape.eligible[nodes_.node_class(kept.node)] || nodes_.free_count(kept.node) < width) continue;
        double needed_s[kMaxGpus];
        int count = 0;
        for (Mask left = nodes_.free(kept.node); left; left &= left - 1)
            needed_s[count++] = needed_from_s(kept, std::countr_zero(left), -1, now_s);
        std::nth_element(needed_s, needed_s + width - 1, needed_s + count, std::greater<>());
        longest_s = std::max(longest_s, needed_s[width - 1]);
    }
    return longest_s;
}

void KeptNodes::earliest(int node, int width, double seconds, const double* free_s, double now_s, double& best_s,
                         PartOut& best) const {
    std::pair<double, int> ends[kMaxGpus];
    int count = 0;
    const Kept* kept = index_[node] >= 0 ? &kept_[index_[node]] : nullptr;
    for (int gpu = 0; gpu < problem_.nodes[node].gpus; ++gpu) {
        double end = std::max(now_s, free_s[gpu]);
        if (kept && kept->held_for[gpu] >= 0) continue;
        if (kept)
            for (const Window& window : kept->windows)
                if ((window.gpus >> gpu & 1) && end + seconds > window.start_s) end = std::max(end, window.end_s);
        ends[count++] = {end, gpu};
    }
    if (count < width) return;
    std::partial_sort(ends, ends + width, ends + count);
    if (ends[width - 1].first >= best_s) return;
    best_s = ends[width - 1].first;
    best = {node, 0};
    for (int i = 0; i < width; ++i) best.gpus |= Mask{1} << ends[i].second;
}

}  // namespace alto
