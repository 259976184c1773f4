#include "following.hpp"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "fields.hpp"

namespace py = pybind11;

namespace alto {
namespace {

constexpr long long kMostGpus = 1 << 20;  // of a choice

FirstCome::Need read_need(py::handle choice, const std::string& subject) {
    const long long gpus = whole(choice, "gpus"), memory_bytes = whole(choice, "memory_bytes");
    require(gpus >= 1 && gpus <= kMostGpus, subject, "a choice has at least one GPU");
    require(memory_bytes >= 0, subject, "memory_bytes must not be negative");
    return {static_cast<int>(gpus), text(choice, "gpu_kind"), memory_bytes, py::cast<bool>(choice.attr("one_node"))};
}

FirstCome::Waiting read_waiting(py::handle row) {
    FirstCome::Waiting read{text(row, "task_id"), {}, kNever, number(row, "arrived_s")};
    require(std::isfinite(read.arrived_s), read.id, "times must be finite");
    for (const py::handle choice : row.attr("choices")) {
        const double seconds = number(choice.attr("duration"), "expected_s");
        require(std::isfinite(seconds) && seconds > 0, read.id, "an expected duration must be positive and finite");
        read.predicted_s = std::min(read.predicted_s, seconds);
        read.needs.push_back(read_need(choice, read.id));
    }
    require(!read.needs.empty(), read.id, "a task has at least one choice");
    return read;
}

FirstCome::Running read_running(py::handle row) {
    FirstCome::Running read{text(row, "task_id"),          {}, number(row, "started_s"),
                            number(row, "expected_end_s"), {}, false};
    require(std::isfinite(read.started_s) && std::isfinite(read.expected_end_s), read.id, "times must be finite");
    for (const py::handle choice : row.attr("resume")) read.needs.push_back(read_need(choice, read.id));
    for (const py::handle part : row.attr("parts"))
        if (const auto gpus = static_cast<int>(py::len(part.attr("gpu_indices"))))
            read.parts.emplace_back(text(part, "node_id"), gpus);
    read.is_guest = !text(row, "guest_of").empty();
    return read;
}

FirstCome::Node read_node(py::handle row) {
    FirstCome::Node node{text(row, "node_id"), text(row, "gpu_kind"), 0, whole(row, "memory_bytes")};
    const long long gpus = whole(row, "gpus");
    require(gpus >= 1 && gpus <= kMaxGpus, node.id, "a node has 1 to 64 GPUs");
    require(node.memory_bytes >= 0, node.id, "memory_bytes must not be negative");
    node.gpus = static_cast<int>(gpus);
    const std::string state = text(row.attr("state"), "value");
    node.ready = state == "ready";
    node.lost = state == "lost";
    return node;
}

// Rows usually come in the order of last time, with a few gone or added.
constexpr std::size_t kLookAhead = 4;

// Of a row that is known: what may have changed.
struct Corrected {
    int task;
    double started_s, expected_end_s;
};
template <class Read>
struct Fresh {
    std::size_t position;
    Read row;
};

py::tuple tuple_of(py::handle rows) {
    const auto found = py::reinterpret_steal<py::object>(PySequence_Tuple(rows.ptr()));
    if (!found) throw py::error_already_set();
    return py::tuple(found);
}

}  // namespace

// Finds who stands where by the objects alone.
Following::Rows Following::recognised(py::handle rows, const Rows& before) {
    Rows found{tuple_of(rows), {}};
    found.tasks.assign(found.objects.size(), -1);
    std::size_t expected = 0;
    for (std::size_t i = 0; i < found.tasks.size(); ++i) {
        const PyObject* object = PyTuple_GET_ITEM(found.objects.ptr(), i);
        for (std::size_t at = expected; at < std::min(expected + kLookAhead, before.tasks.size()); ++at)
            if (PyTuple_GET_ITEM(before.objects.ptr(), at) == object) {
                found.tasks[i] = before.tasks[at];
                expected = at + 1;
                break;
            }
    }
    return found;
}

void Following::follow(py::handle snapshot) {
    // All that may be refused comes first.
    const double now_s = number(snapshot, "now_s");
    require(std::isfinite(now_s), "snapshot", "now_s must be finite");
    const py::tuple node_rows = tuple_of(snapshot.attr("nodes"));
    const bool has_moved = !node_rows.equal(nodes_);
    std::vector<FirstCome::Node> nodes;
    if (has_moved)
        for (const py::handle row : node_rows) nodes.push_back(read_node(row));
    Rows waiting = recognised(snapshot.attr("waiting"), waiting_);
    std::vector<Fresh<FirstCome::Waiting>> fresh_waiting;
    for (std::size_t i = 0; i < waiting.tasks.size(); ++i) {
        if (waiting.tasks[i] >= 0) continue;
        const py::handle row = waiting.objects[i];
        waiting.tasks[i] = schedule_.present(text(row, "task_id"));
        if (waiting.tasks[i] < 0) fresh_waiting.push_back({i, read_waiting(row)});
    }
    Rows running = recognised(snapshot.attr("running"), running_);
    std::vector<Fresh<FirstCome::Running>> fresh_running;
    std::vector<Corrected> corrected;
    for (std::size_t i = 0; i < running.tasks.size(); ++i) {
        if (running.tasks[i] >= 0) continue;
        const py::handle row = running.objects[i];
        const int task = running.tasks[i] = schedule_.present(text(row, "task_id"));
        if (task < 0)
            fresh_running.push_back({i, read_running(row)});
        else
            corrected.push_back({task, number(row, "started_s"), number(row, "expected_end_s")});
        require(
            task < 0 || (std::isfinite(corrected.back().started_s) && std::isfinite(corrected.back().expected_end_s)),
            text(row, "task_id"), "times must be finite");
    }

    schedule_.carry_on(now_s);
    if (has_moved) schedule_.take_nodes(std::move(nodes));
    nodes_ = node_rows;
    ++generation_;
    for (int task : waiting.tasks) see(task);
    for (int task : running.tasks) see(task);
    note_gone(waiting_);
    note_gone(running_);
    for (const auto& [position, row] : fresh_waiting) waiting.tasks[position] = schedule_.take_in(row);
    for (const auto& [position, row] : fresh_running) {
        running.tasks[position] = schedule_.take_in(row);
        schedule_.note_run(running.tasks[position], row.started_s, row.expected_end_s);
    }
    for (const Corrected& row : corrected) schedule_.note_run(row.task, row.started_s, row.expected_end_s);
    waiting_ = std::move(waiting);
    running_ = std::move(running);
    schedule_.settle();
}

void Following::see(int task) {
    if (task < 0) return;
    if (static_cast<std::size_t>(task) >= seen_.size()) seen_.resize(task + 1, 0);
    seen_[task] = generation_;
}

// Who was there before and is not seen now has ended.
void Following::note_gone(const Rows& before) {
    for (int task : before.tasks) {
        if (static_cast<std::size_t>(task) < seen_.size() && seen_[task] == generation_) continue;
        see(task);
        schedule_.note_end(task);
    }
}

}  // namespace alto
