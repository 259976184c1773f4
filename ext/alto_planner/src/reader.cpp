#include "reader.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <unordered_set>

#include "fields.hpp"

namespace py = pybind11;

namespace alto {

void Reader::read(py::handle snapshot, Problem& problem) {
    try {
        read_all(snapshot, problem);
    } catch (...) {
        *this = Reader();  // half-read rows must not be taken for checked ones
        throw;
    }
}

void Reader::read_all(py::handle snapshot, Problem& problem) {
    ++generation_;
    problem.now_s = number(snapshot, "now_s");
    require(std::isfinite(problem.now_s), "snapshot", "now_s must be finite");
    const py::object objective = snapshot.attr("objective");
    problem.objective = {number(objective, "makespan"),       number(objective, "completion"),
                         number(objective, "lateness"),       number(objective, "patience"),
                         number(objective, "min_patience_s"), number(objective, "fairness"),
                         number(objective, "longest_wait_s")};
    const Objective& wanted = problem.objective;
    require(wanted.makespan >= 0 && wanted.completion >= 0 && wanted.lateness >= 0 && wanted.patience >= 0 &&
                wanted.longest_wait_s >= 0 && wanted.fairness >= 0 && wanted.fairness <= 1 &&
                wanted.makespan + wanted.completion > 0,
            "objective", "weights must not be negative, fairness at most 1, and makespan or completion must count");
    read_nodes(snapshot.attr("nodes"), problem);
    read_waiting(snapshot.attr("waiting"), problem);
    read_running(snapshot.attr("running"), problem);
    number_tenants(read_tenants(snapshot.attr("tenants"), problem), problem);
    read_windows(snapshot.attr("reservations"), problem);
    finish_shapes(problem);
}

int Reader::kind_of(const std::string& name) {
    return kinds_.try_emplace(name, static_cast<int>(kinds_.size())).first->second;
}

int Reader::tenant_of(const std::string& name) {
    return tenants_.try_emplace(name, static_cast<int>(tenants_.size())).first->second;
}

void Reader::read_nodes(py::handle rows, Problem& problem) {
    const py::object fast = py::reinterpret_steal<py::object>(PySequence_Fast(rows.ptr(), "nodes must be a sequence"));
    if (!fast) throw py::error_already_set();
    const auto count = static_cast<std::size_t>(PySequence_Fast_GET_SIZE(fast.ptr()));
    PyObject** items = PySequence_Fast_ITEMS(fast.ptr());
    bool same = count == node_objects_.size();
    for (std::size_t i = 0; same && i < count; ++i) same = items[i] == node_objects_[i].ptr();
    if (!same) {
        node_objects_.clear();
        nodes_.clear();
        classes_.clear();
        node_index_.clear();
        running_.clear();
        running_of_.clear();
        running_ids_.clear();
        for (std::size_t i = 0; i < count; ++i) {
            const py::handle row = items[i];
            const std::string id = text(row, "node_id");
            const long long gpus = whole(row, "gpus"), memory = whole(row, "memory_bytes");
            require(gpus >= 1 && gpus <= kMaxGpus, id, "a node has 1 to 64 GPUs");
            require(memory >= 0, id, "memory_bytes must not be negative");
            if (!node_index_.emplace(id, static_cast<int>(i)).second)
                throw ReadError("duplicate", id, "the node appears twice");
            const int kind = kind_of(text(row, "gpu_kind"));
            const auto found = std::find_if(classes_.begin(), classes_.end(), [&](const NodeClass& c) {
                return c.kind == kind && c.memory_bytes == memory && c.gpus == gpus;
            });
            const int node_class = static_cast<int>(found - classes_.begin());
            if (found == classes_.end()) classes_.push_back({kind, memory, static_cast<int>(gpus), 0});
            const bool ready = text(row.attr("state"), "value") == "ready";
            classes_[node_class].ready_nodes += ready;
            nodes_.push_back({node_class, static_cast<int>(gpus), ready});
            node_objects_.push_back(py::reinterpret_borrow<py::object>(row));
        }
        tell_memories_apart();
    }
    problem.nodes = nodes_;
    problem.classes = classes_;
}

// Every task may need another memory, but nodes have few: needs that the same nodes meet are one shape. Where nodes
// have other memories than before, all tasks are read again.
void Reader::tell_memories_apart() {
    std::vector<std::int64_t> memories;
    for (const NodeClass& one : classes_) memories.push_back(one.memory_bytes);
    std::sort(memories.begin(), memories.end());
    memories.erase(std::unique(memories.begin(), memories.end()), memories.end());
    if (memories == memories_) return;
    memories_ = std::move(memories);
    shapes_.clear();
    objects_.clear();
    seen_.clear();
    position_.clear();
    rows_.clear();
    details_.clear();
    by_area_.clear();
    free_rows_.clear();
    order_.clear();
    row_of_.clear();
    row_of_id_.clear();
}

std::pair<int, Mask> Reader::read_part(py::handle part, const std::string& subject) {
    const std::string node_id = text(part, "node_id");
    const auto found = node_index_.find(node_id);
    if (found == node_index_.end()) throw ReadError("unknown_node", subject, "there is no node " + node_id);
    Mask gpus = 0;
    for (const py::handle index : part.attr("gpu_indices")) {
        const int gpu = py::cast<int>(index);
        if (gpu < 0 || gpu >= nodes_[found->second].gpus)
            throw ReadError("unknown_node", subject, "node " + node_id + " has no GPU " + std::to_string(gpu));
        gpus |= Mask{1} << gpu;
    }
    return {found->second, gpus};
}

std::vector<int> Reader::read_tenants(py::handle rows, Problem& problem) {
    std::vector<int> listed;
    std::unordered_map<std::string, int> cohorts;
    std::unordered_set<std::string> named;
    problem.has_quotas = false;
    problem.tenants.assign(tenants_.size(), {});
    for (const py::handle row : rows) {
        const std::string name = text(row, "tenant");
        if (!named.insert(name).second) throw ReadError("duplicate", name, "the tenant appears twice");
        const auto index = static_cast<std::size_t>(tenant_of(name));
        if (index >= problem.tenants.size()) problem.tenants.resize(index + 1);
        listed.push_back(static_cast<int>(index));
        Tenant& tenant = problem.tenants[index];
        tenant.weight = number(row, "weight");
        tenant.usage_gpu_s = number(row, "usage_gpu_s");
        require(tenant.weight > 0 && std::isfinite(tenant.weight), name, "a weight must be positive");
        require(tenant.usage_gpu_s >= 0 && std::isfinite(tenant.usage_gpu_s), name, "usage must not be negative");
        if (!row.attr("quota_gpus").is_none()) {
            tenant.quota_gpus = number(row, "quota_gpus");
            problem.has_quotas = true;
        }
        if (!row.attr("borrow_gpus").is_none()) tenant.borrow_gpus = number(row, "borrow_gpus");
        require(tenant.quota_gpus >= 0 && tenant.borrow_gpus >= 0, name, "a quota must not be negative");
        const std::string cohort = text(row, "cohort");
        if (!cohort.empty())
            tenant.cohort = cohorts.try_emplace(cohort, static_cast<int>(cohorts.size())).first->second;
    }
    return listed;
}

// Only the tenants of this snapshot, by name: whom the reader met before must not show in turns or shares.
void Reader::number_tenants(const std::vector<int>& listed, Problem& problem) {
    std::vector<char> present(problem.tenants.size(), 0);
    for (int index : listed) present[index] = 1;
    for (const Task& task : problem.tasks) present[task.tenant] = 1;
    for (const Pinned& pinned : problem.pinned) present[pinned.tenant] = 1;
    std::vector<std::pair<std::string, int>> named;
    for (const auto& [name, index] : tenants_)
        if (present[index]) named.emplace_back(name, index);
    std::sort(named.begin(), named.end());
    std::vector<int> number(present.size(), -1);
    std::vector<Tenant> tenants;
    for (const auto& [name, index] : named) {
        number[index] = static_cast<int>(tenants.size());
        tenants.push_back(problem.tenants[index]);
    }
    problem.tenants = std::move(tenants);
    for (Task& task : problem.tasks) task.tenant = number[task.tenant];
    for (Pinned& pinned : problem.pinned) pinned.tenant = number[pinned.tenant];
}

void Reader::read_windows(py::handle rows, Problem& problem) {
    problem.windows.clear();
    std::vector<std::pair<std::string, Window>> read;
    std::unordered_set<std::string> ids;
    for (const py::handle row : rows) {
        const std::string id = text(row, "reservation_id");
        if (!ids.insert(id).second) throw ReadError("duplicate", id, "the reservation appears twice");
        const auto [node, gpus] = read_part(row.attr("part"), id);
        const Window window{node, gpus, number(row, "start_s"), number(row, "end_s")};
        require(window.start_s < window.end_s && gpus, id, "a reservation needs GPUs and must start before it ends");
        for (const auto& [other_id, other] : read)
            if (other.node == node && (other.gpus & gpus) && other.start_s < window.end_s &&
                window.start_s < other.end_s)
                throw ReadError("reservation_conflict", id, "reservation " + other_id + " keeps the same GPUs");
        read.emplace_back(id, window);
        if (window.end_s > problem.now_s) problem.windows.push_back(window);
    }
}

// Which classes may hold a shape, and into which parts it falls: whole nodes, widest first, and one remainder.
void Reader::finish_shapes(Problem& problem) {
    for (Shape& shape : shapes_) {
        shape.eligible.assign(classes_.size(), 0);
        shape.parts.clear();
        std::vector<int> widths;
        for (std::size_t c = 0; c < classes_.size(); ++c) {
            const NodeClass& row = classes_[c];
            const bool kind = shape.kind < 0 || shape.kind == row.kind;
            const bool memory =
                shape.memory_bytes == 0 || row.memory_bytes == 0 || shape.memory_bytes <= row.memory_bytes;
            const bool whole = !shape.one_node || shape.gpus <= row.gpus;
            if (!kind || !memory || !whole) continue;
            shape.eligible[c] = 1;
            widths.insert(widths.end(), row.ready_nodes, row.gpus);
        }
        std::sort(widths.rbegin(), widths.rend());
        int left = shape.gpus;
        for (std::size_t i = 0; i < widths.size() && left > 0; ++i) {
            shape.parts.push_back(std::min(left, widths[i]));
            left -= shape.parts.back();
        }
        if (left > 0 || (shape.one_node && shape.parts.size() > 1)) shape.parts.clear();
    }
    problem.shapes = shapes_;
}

}  // namespace alto
