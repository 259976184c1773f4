// The waiting tasks: rows known from last time stay, by area, and only new ones are read.
#include <algorithm>
#include <cmath>
#include <limits>

#include "fields.hpp"
#include "reader.hpp"

namespace py = pybind11;

namespace alto {

int Reader::shape_of(py::handle choice, const std::string& subject) {
    const long long gpus = whole(choice, "gpus"), needed = whole(choice, "memory_bytes");
    require(gpus >= 1 && gpus <= 1 << 20, subject, "a choice has at least one GPU");
    require(needed >= 0, subject, "memory_bytes must not be negative");
    const auto least = std::lower_bound(memories_.begin(), memories_.end(), needed);
    const std::int64_t memory = least == memories_.end() ? std::numeric_limits<std::int64_t>::max() : *least;
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

}  // namespace alto
