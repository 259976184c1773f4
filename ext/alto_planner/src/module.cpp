// alto_planner._planner: the compiled core of the planner, bound without torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <bit>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "following.hpp"
#include "orders.hpp"
#include "reader.hpp"
#include "settling.hpp"
#include "solve.hpp"

namespace py = pybind11;

namespace {

using ProblemPointer = std::shared_ptr<const alto::Problem>;

// A snapshot as read. Immutable.
struct ReadSnapshot {
    ProblemPointer problem;

    // GPUs of each node that nothing holds now; 0 for nodes that take no work.
    [[nodiscard]] std::vector<alto::Mask> free_now() const {
        std::vector<alto::Mask> free;
        for (const alto::Node& node : problem->nodes)
            free.push_back(!node.ready                   ? 0
                           : node.gpus == alto::kMaxGpus ? ~alto::Mask{0}
                                                         : (alto::Mask{1} << node.gpus) - 1);
        for (const alto::Pinned& pinned : problem->pinned) free[pinned.node] &= ~pinned.gpus;
        return free;
    }

    // Whether tasks are equal but for their sizes and nothing limits them.
    [[nodiscard]] bool plain() const { return problem->plain(alto::allot(*problem, alto::Allot::kBalanced)); }

    // When the bounded wait of a task of this duration ends, counted from its arrival.
    [[nodiscard]] double patience_s(double seconds) const { return problem->patience_of(seconds); }

    // Of the waiting tasks; the lowest int when there are none.
    [[nodiscard]] int highest_priority() const {
        int highest = std::numeric_limits<int>::min();
        for (const alto::Task& task : problem->tasks) highest = std::max(highest, task.priority);
        return highest;
    }
};

// The schedule found for a snapshot, read row by row: tasks are named by their place in its queue. Immutable.
class Solution {
  public:
    Solution(ProblemPointer problem, alto::Answer answer)
        : problem_(std::move(problem)), answer_(std::move(answer)), task_of_row_(problem_->row.size()) {
        for (std::size_t i = 0; i < task_of_row_.size(); ++i) task_of_row_[problem_->row[i]] = static_cast<int>(i);
    }

    [[nodiscard]] const alto::Answer& answer() const { return answer_; }

    // (choice of the task, [(node, GPU mask)], start, end) or None for a task without a place.
    [[nodiscard]] py::object placement(std::size_t row) const {
        const std::size_t task = task_of(row);
        if (!schedule().placed(task)) return py::none();
        py::list parts;
        for (int p = 0; p < schedule().part_count[task]; ++p) {
            const alto::PartOut& part = schedule().parts[schedule().first_part[task] + p];
            parts.append(py::make_tuple(part.node, part.gpus));
        }
        return py::make_tuple(schedule().choice[task] - problem_->tasks[task].first_choice, parts,
                              schedule().start_s[task], schedule().end_s(*problem_, task));
    }

    [[nodiscard]] std::vector<int> starting() const {
        return select([&](std::size_t i) { return schedule().start_s[i] <= problem_->now_s; });
    }
    [[nodiscard]] std::vector<int> placed() const {
        return select([&](std::size_t i) { return schedule().placed(i); });
    }
    [[nodiscard]] std::vector<int> unplaced() const {
        return select([&](std::size_t i) { return !schedule().placed(i); });
    }

    // Planned tasks that hold a GPU of `task` before it, the last one on each GPU.
    [[nodiscard]] std::vector<int> predecessors(std::size_t row) const {
        const std::size_t task = task_of(row);
        std::vector<int> found;  // rows
        for (int p = 0; p < schedule().part_count[task]; ++p) {
            const alto::PartOut& part = schedule().parts[schedule().first_part[task] + p];
            std::vector<std::pair<double, int>> last(alto::kMaxGpus, {-alto::kNever, -1});
            for (std::size_t other = 0; other < problem_->tasks.size(); ++other) {
                if (other == task || schedule().start_s[other] >= schedule().start_s[task]) continue;
                for (int q = 0; q < schedule().part_count[other]; ++q) {
                    const alto::PartOut& held = schedule().parts[schedule().first_part[other] + q];
                    if (held.node != part.node) continue;
                    const std::pair<double, int> holder{schedule().end_s(*problem_, other), problem_->row[other]};
                    for (alto::Mask both = held.gpus & part.gpus; both; both &= both - 1)
                        last[std::countr_zero(both)] = std::max(last[std::countr_zero(both)], holder);
                }
            }
            for (const auto& [end, other] : last)
                if (other >= 0 && std::find(found.begin(), found.end(), other) == found.end()) found.push_back(other);
        }
        return found;
    }

    // Waiting tasks that the plan starts before `task`.
    [[nodiscard]] int ahead(std::size_t row) const {
        const std::size_t task = task_of(row);
        const std::vector<double>& starts = schedule().start_s;
        return static_cast<int>(
            std::count_if(starts.begin(), starts.end(), [&](double s) { return s < starts[task]; }));
    }

    // Another plan for the same snapshot, judged as this one is: a node for each (rigid) task, first is first on it.
    [[nodiscard]] Solution settled(std::vector<std::pair<int, int>> rows, std::string source) const {
        for (auto& [row, node] : rows) {
            row = static_cast<int>(task_of(static_cast<std::size_t>(row)));
            const alto::Shape& shape = problem_->shapes[problem_->choices[problem_->tasks[row].first_choice].shape];
            if (node < 0 || node >= static_cast<int>(problem_->nodes.size()) || !problem_->nodes[node].ready ||
                !shape.eligible[problem_->nodes[node].node_class] || shape.gpus > problem_->nodes[node].gpus)
                throw py::index_error("a node that cannot hold the task");
        }
        const std::vector<double> weights = alto::completion_weights(*problem_);
        alto::Answer answer = answer_;
        answer.schedule = alto::settle(*problem_, rows, weights);
        answer.score = alto::evaluate(*problem_, answer.schedule, answer.bounds, weights);
        answer.source = std::move(source);
        return {problem_, std::move(answer)};
    }

  private:
    [[nodiscard]] const alto::Schedule& schedule() const { return answer_.schedule; }
    [[nodiscard]] std::size_t task_of(std::size_t row) const {
        if (row >= task_of_row_.size()) throw py::index_error("no such task");
        return static_cast<std::size_t>(task_of_row_[row]);
    }
    template <class Condition>
    [[nodiscard]] std::vector<int> select(Condition condition) const {
        std::vector<int> found;
        for (std::size_t i = 0; i < problem_->tasks.size(); ++i)
            if (condition(i)) found.push_back(problem_->row[i]);
        std::sort(found.begin(), found.end());
        return found;
    }

    ProblemPointer problem_;
    alto::Answer answer_;
    std::vector<int> task_of_row_;
};

Solution solve(const ReadSnapshot& read, double budget_s, unsigned long long seed, std::array<long, 3> effort,
               std::string only) {
    const py::gil_scoped_release release;
    return {read.problem, alto::solve(*read.problem, {budget_s, seed, effort, std::move(only)})};
}

}  // namespace

PYBIND11_MODULE(_planner, module) {
    module.doc() = "List scheduling, packing and bounds for placement plans.";
    // Its arguments are kind, subject and message. Lives as long as the interpreter.
    static PyObject* const read_error =
        PyErr_NewException("alto_planner._planner.ReadError", PyExc_ValueError, nullptr);
    module.attr("ReadError") = py::handle(read_error);
    py::register_local_exception_translator([](std::exception_ptr raised) {
        try {
            if (raised) std::rethrow_exception(raised);
        } catch (const alto::ReadError& error) {
            PyErr_SetObject(read_error, py::make_tuple(error.kind, error.subject, error.what()).ptr());
        }
    });
    py::class_<alto::Reader>(module, "Reader")
        .def(py::init<>())
        .def(
            "read",
            [](alto::Reader& reader, const py::object& snapshot) {
                auto problem = std::make_shared<alto::Problem>();
                reader.read(snapshot, *problem);
                return ReadSnapshot{std::move(problem)};
            },
            py::arg("snapshot"));
    py::class_<alto::Following>(module, "FirstCome")
        .def(py::init<>())
        .def("follow", &alto::Following::follow, py::arg("snapshot"))
        .def_property_readonly("longest_wait_s", [](const alto::Following& f) { return f.schedule().longest_wait_s(); })
        .def("line", [](const alto::Following& f) { return f.schedule().line(); })
        .def("running", [](const alto::Following& f) {
            py::list rows;
            for (const alto::FirstCome::VirtualRun& run : f.schedule().running())
                rows.append(py::make_tuple(run.id, run.parts, run.began_s, run.end_s));
            return rows;
        });
    py::class_<ReadSnapshot>(module, "ReadSnapshot")
        .def("free_now", &ReadSnapshot::free_now)
        .def("plain", &ReadSnapshot::plain)
        .def("patience_s", &ReadSnapshot::patience_s, py::arg("seconds"))
        .def_property_readonly("highest_priority", &ReadSnapshot::highest_priority);
    py::class_<Solution>(module, "Solution")
        .def_property_readonly("makespan_s", [](const Solution& s) { return s.answer().score.makespan_s; })
        .def_property_readonly("mean_completion_s",
                               [](const Solution& s) { return s.answer().score.mean_completion_s; })
        .def_property_readonly("value", [](const Solution& s) { return s.answer().score.value; })
        .def_property_readonly("makespan_bound_s", [](const Solution& s) { return s.answer().bounds.makespan_s; })
        .def_property_readonly("mean_completion_bound_s",
                               [](const Solution& s) { return s.answer().bounds.mean_completion_s; })
        .def_property_readonly("source", [](const Solution& s) { return s.answer().source; })
        .def_property_readonly("effort", [](const Solution& s) { return py::tuple(py::cast(s.answer().effort)); })
        .def("placement", &Solution::placement, py::arg("task"))
        .def("starting", &Solution::starting)
        .def("placed", &Solution::placed)
        .def("unplaced", &Solution::unplaced)
        .def("predecessors", &Solution::predecessors, py::arg("task"))
        .def("ahead", &Solution::ahead, py::arg("task"))
        .def("settled", &Solution::settled, py::arg("rows"), py::arg("source"));
    module.def("solve", &solve, py::arg("read"), py::arg("budget_s"), py::arg("seed"),
               py::arg("effort") = std::array<long, 3>{-1, -1, -1}, py::arg("only") = "");
}
