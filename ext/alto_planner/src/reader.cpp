#include "reader.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <unordered_set>

namespace py = pybind11;

namespace alto {
namespace {

// What runs beyond its expected end is taken to end after another 5 % of the time it has run, and a second at least.
constexpr double kOverdueShare = 0.05;
constexpr double kOverdueLeast_s = 1.0;

std::string text(py::handle row, const char* name) { return py::cast<std::string>(row.attr(name)); }
double number(py::handle row, const char* name) { return py::cast<double>(row.attr(name)); }
long long whole(py::handle row, const char* name) { return py::cast<long long>(row.attr(name)); }

void require(bool holds, const std::string& subject, const char* message) {
    if (!holds) throw ReadError("invalid", subject, message);
}

}  // namespace

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
    problem.objective = {number(objective, "makespan"),        number(objective, "completion"),
                         number(objective, "lateness"),        number(objective, "patience"),
                         number(objective, "min_patience_s"),  number(objective, "fairness"),
                         number(objective, "backlog_patience")};
    const Objective& wanted = problem.objective;
    require(wanted.makespan >= 0 && wanted.completion >= 0 && wanted.lateness >= 0 && wanted.patience >= 0 &&
                wanted.backlog_patience >= 0 && wanted.fairness >= 0 && wanted.fairness <= 1 &&
                wanted.makespan + wanted.completion > 0,
            "objective", "weights must not be negative, fairness at most 1, and makespan or completion must count");
    read_nodes(snapshot.attr("nodes"), problem);
    read_waiting(snapshot.attr("waiting"), problem);
    read_running(snapshot.attr("running"), problem);
    number_tenants(read_tenants(snapshot.attr("tenants"), problem), problem);
    read_windows(snapshot.attr("reservations"), problem);
    finish_shapes(problem);
    problem.measure_backlog();
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
    }
    problem.nodes = nodes_;
    problem.classes = classes_;
}

int Reader::shape_of(py::handle choice, const std::string& subject) {
    const long long gpus = whole(choice, "gpus"), memory = whole(choice, "memory_bytes");
    require(gpus >= 1 && gpus <= 1 << 20, subject, "a choice has at least one GPU");
    require(memory >= 0, subject, "memory_bytes must not be negative");
    const std::string kind_name = text(choice, "gpu_kind");
    const int kind = kind_name.empty() ? -1 : kind_of(kind_name);
    const bool one_node = py::cast<bool>(choice.attr("one_node"));
    for (std::size_t s = 0; s < shapes_.size(); ++s)
        if (shapes_[s].gpus == gpus && shapes_[s].kind == kind && shapes_[s].memory_bytes == memory &&
            shapes_[s].one_node == one_node)
            return static_cast<int>(s);
    shapes_.push_back({static_cast<int>(gpus), kind, memory, one_node, {}, {}});
    return static_cast<int>(shapes_.size()) - 1;
}

std::pair<Reader::TaskRow, Reader::TaskDetail> Reader::read_task(py::handle row) {
    TaskRow read;
    TaskDetail detail{py::reinterpret_borrow<py::object>(row), text(row, "task_id"), {}};
    read.task.tenant = tenant_of(text(row, "tenant"));
    read.task.priority = py::cast<int>(row.attr("priority"));
    read.task.arrived_s = number(row, "arrived_s");
    read.task.not_before_s = number(row, "not_before_s");
    read.task.begun = py::cast<bool>(row.attr("begun"));
    require(std::isfinite(read.task.arrived_s) && read.task.not_before_s < kNever, detail.id, "times must be finite");
    for (const py::handle choice : row.attr("choices")) {
        const double seconds = number(choice.attr("duration"), "expected_s");
        require(std::isfinite(seconds) && seconds > 0, detail.id, "an expected duration must be positive and finite");
        detail.choices.push_back({shape_of(choice, detail.id), seconds});
    }
    require(!detail.choices.empty(), detail.id, "a task has at least one choice");
    read.task.choices = static_cast<int>(detail.choices.size());
    read.first = detail.choices[0];
    return {read, std::move(detail)};
}

void Reader::read_waiting(py::handle rows, Problem& problem) {
    const py::object fast =
        py::reinterpret_steal<py::object>(PySequence_Fast(rows.ptr(), "waiting must be a sequence"));
    if (!fast) throw py::error_already_set();
    const auto count = static_cast<std::size_t>(PySequence_Fast_GET_SIZE(fast.ptr()));
    PyObject** items = PySequence_Fast_ITEMS(fast.ptr());
    std::vector<int> order, fresh;
    order.reserve(count);
    std::size_t expected = 0;  // rows usually come in the order of last time, with a few gone or added
    for (std::size_t i = 0; i < count; ++i) {
        int row = -1;
        for (std::size_t ahead = expected; ahead < std::min(expected + 4, order_.size()); ++ahead)
            if (objects_[order_[ahead]] == items[i]) {
                row = order_[ahead];
                expected = ahead + 1;
                break;
            }
        if (row < 0) {
            const auto found = row_of_.find(items[i]);
            row = found != row_of_.end() ? found->second : add_row(items[i], fresh);
            if (seen_[row] >= 0 && seen_[row] < generation_ - 1) fresh.push_back(row);  // it was away
        }
        if (seen_[row] == generation_) throw ReadError("duplicate", details_[row].id, "the task appears twice");
        seen_[row] = generation_;
        position_[row] = static_cast<int>(i);
        order.push_back(row);
    }
    for (int row : fresh) {
        const auto [found, added] = row_of_id_.try_emplace(details_[row].id, row);
        if (added || found->second == row) continue;
        if (seen_[found->second] == generation_)
            throw ReadError("duplicate", details_[row].id, "the task appears twice");
        found->second = row;
    }
    order_ = std::move(order);
    sort_by_area(fresh);
    fresh_waiting_ = std::move(fresh);
    fill_tasks(problem);
    if (rows_.size() - free_rows_.size() > count + count / 8) forget_unseen();
}

// The order of last time, without those that are gone and with the fresh ones merged in.
void Reader::sort_by_area(const std::vector<int>& fresh) {
    const auto before = [&](const AreaKey& a, const AreaKey& b) {
        if (a.area != b.area) return a.area < b.area;
        return a.arrived_s != b.arrived_s ? a.arrived_s < b.arrived_s : position_[a.row] < position_[b.row];
    };
    std::erase_if(by_area_, [&](const AreaKey& key) { return seen_[key.row] != generation_; });
    const auto old = static_cast<std::ptrdiff_t>(by_area_.size());
    for (int row : fresh)
        by_area_.push_back(
            {shapes_[rows_[row].first.shape].gpus * rows_[row].first.seconds, rows_[row].task.arrived_s, row});
    std::sort(by_area_.begin() + old, by_area_.end(), before);
    std::inplace_merge(by_area_.begin(), by_area_.begin() + old, by_area_.end(), before);
    // Rows of equal area may have changed places in the queue.
    if (!std::is_sorted(by_area_.begin(), by_area_.end(), before)) std::sort(by_area_.begin(), by_area_.end(), before);
}

void Reader::fill_tasks(Problem& problem) {
    problem.tasks.reserve(by_area_.size());
    problem.choices.reserve(by_area_.size());
    problem.row.reserve(by_area_.size());
    for (const AreaKey& key : by_area_) {
        const TaskRow& row = rows_[key.row];
        problem.row.push_back(position_[key.row]);
        problem.tasks.push_back(row.task);
        problem.tasks.back().first_choice = static_cast<int>(problem.choices.size());
        problem.choices.push_back({row.first.shape, row.first.seconds});
        for (int c = 1; c < row.task.choices; ++c)
            problem.choices.push_back({details_[key.row].choices[c].shape, details_[key.row].choices[c].seconds});
    }
}

int Reader::add_row(PyObject* object, std::vector<int>& fresh) {
    auto [read, detail] = read_task(object);
    int row = static_cast<int>(rows_.size());
    if (free_rows_.empty()) {
        objects_.emplace_back();
        seen_.emplace_back();
        position_.emplace_back();
        rows_.emplace_back();
        details_.emplace_back();
    } else {
        row = free_rows_.back();
        free_rows_.pop_back();
    }
    objects_[row] = object;
    seen_[row] = -1;
    rows_[row] = read;
    details_[row] = std::move(detail);
    row_of_[object] = row;
    fresh.push_back(row);
    return row;
}

void Reader::forget_unseen() {
    for (std::size_t r = 0; r < rows_.size(); ++r) {
        if (seen_[r] == generation_ || !objects_[r]) continue;
        const auto named = row_of_id_.find(details_[r].id);
        if (named != row_of_id_.end() && named->second == static_cast<int>(r)) row_of_id_.erase(named);
        row_of_.erase(objects_[r]);
        objects_[r] = nullptr;
        details_[r] = {};
        free_rows_.push_back(static_cast<int>(r));
    }
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
            if (!kind || !memory) continue;
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
