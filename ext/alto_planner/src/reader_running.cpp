// The running tasks: what they hold, and until when.
#include <algorithm>
#include <cmath>
#include <unordered_set>

#include "fields.hpp"
#include "reader.hpp"

namespace py = pybind11;

namespace alto {
namespace {

// What runs beyond its expected end is taken to end after another 5 % of the time it has run, and a second at least.
constexpr double kOverdueShare = 0.05;
constexpr double kOverdueLeast_s = 1.0;

}  // namespace

Reader::RunningRow Reader::read_running_row(py::handle row) {
    RunningRow read{py::reinterpret_borrow<py::object>(row),
                    text(row, "task_id"),
                    tenant_of(text(row, "tenant")),
                    number(row, "started_s"),
                    number(row, "expected_end_s"),
                    !text(row, "guest_of").empty(),
                    {}};
    require(std::isfinite(read.started_s) && std::isfinite(read.expected_end_s), read.id, "times must be finite");
    for (const py::handle part : row.attr("parts")) read.parts.push_back(read_part(part, read.id));
    return read;
}

void Reader::read_running(py::handle rows, Problem& problem) {
    const py::object fast =
        py::reinterpret_steal<py::object>(PySequence_Fast(rows.ptr(), "running must be a sequence"));
    if (!fast) throw py::error_already_set();
    const auto count = static_cast<std::size_t>(PySequence_Fast_GET_SIZE(fast.ptr()));
    PyObject** items = PySequence_Fast_ITEMS(fast.ptr());
    std::vector<RunningRow> kept;
    kept.reserve(count);
    std::vector<std::size_t> fresh;
    std::size_t expected = 0;  // as for the waiting
    for (std::size_t i = 0; i < count; ++i) {
        std::size_t found = running_.size();
        for (std::size_t ahead = expected; ahead < std::min(expected + 4, running_.size()); ++ahead)
            if (running_[ahead].object.ptr() == items[i]) found = ahead;
        if (found == running_.size())
            if (const auto known = running_of_.find(items[i]); known != running_of_.end()) found = known->second;
        if (found < running_.size()) {
            if (!running_[found].object)  // moved from
                throw ReadError("duplicate", text(items[i], "task_id"), "the running task appears twice");
            kept.push_back(std::move(running_[found]));
            expected = found + 1;
        } else {
            kept.push_back(read_running_row(items[i]));
            fresh.push_back(i);
        }
    }
    bool moved = kept.size() != running_.size() || !fresh.empty();
    for (const RunningRow& gone : running_) {
        if (!gone.object) continue;
        running_ids_.erase(gone.id);
        moved = true;
    }
    running_ = std::move(kept);
    for (std::size_t index : fresh) {
        const std::string& id = running_[index].id;
        if (!running_ids_.insert(id).second) throw ReadError("duplicate", id, "the running task appears twice");
        const auto waiting = row_of_id_.find(id);
        if (waiting != row_of_id_.end() && seen_[waiting->second] == generation_)
            throw ReadError("duplicate", id, "the task is both waiting and running");
    }
    for (int row : fresh_waiting_)
        if (running_ids_.contains(details_[row].id))
            throw ReadError("duplicate", details_[row].id, "the task is both waiting and running");
    if (moved) {
        running_of_.clear();
        for (std::size_t i = 0; i < running_.size(); ++i) running_of_[running_[i].object.ptr()] = i;
    }
    problem.pinned.clear();
    problem.pinned.reserve(count);
    std::vector<Mask> held(nodes_.size(), 0);
    for (const RunningRow& row : running_) {
        if (row.guest) continue;
        const double elapsed = std::max(0.0, problem.now_s - row.started_s);
        const double end = row.expected_end_s > problem.now_s
                               ? row.expected_end_s
                               : problem.now_s + std::max(kOverdueLeast_s, kOverdueShare * elapsed);
        for (const auto& [node, gpus] : row.parts) {
            if (held[node] & gpus) throw ReadError("gpu_conflict", row.id, "another running task holds the same GPU");
            held[node] |= gpus;
            problem.pinned.push_back({node, gpus, end, row.tenant});
        }
    }
}

}  // namespace alto
