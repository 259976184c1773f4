// alto_planner._planner: the compiled core of the planner, bound without torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <bit>

#include "reader.hpp"
#include "solve.hpp"

namespace py = pybind11;

namespace {

// A snapshot as read, and the last answer to it. Rows are remembered from one read to the next.
class Core {
  public:
    void read(const py::object& snapshot) { reader_.read(snapshot, problem_); }

    py::dict solve(const alto::Request& request) {
        {
            const py::gil_scoped_release release;
            answer_ = alto::solve(problem_, request);
        }
        py::dict out;
        out["makespan_s"] = answer_.score.makespan_s;
        out["mean_completion_s"] = answer_.score.mean_completion_s;
        out["unplaced"] = answer_.score.unplaced;
        out["value"] = answer_.score.value;
        out["makespan_bound_s"] = answer_.bounds.makespan_s;
        out["mean_completion_bound_s"] = answer_.bounds.mean_completion_s;
        out["source"] = answer_.source;
        out["effort"] = answer_.effort;
        return out;
    }

    // (choice of the task, [(node, GPU mask)], start, end) or None for a task without a place.
    [[nodiscard]] py::object placement(std::size_t task) const {
        const alto::Schedule& schedule = answer_.schedule;
        if (task >= problem_.tasks.size()) throw py::index_error("no such task");
        if (!schedule.placed(task)) return py::none();
        py::list parts;
        for (int p = 0; p < schedule.part_count[task]; ++p) {
            const alto::PartOut& part = schedule.parts[schedule.first_part[task] + p];
            parts.append(py::make_tuple(part.node, part.gpus));
        }
        return py::make_tuple(schedule.choice[task] - problem_.tasks[task].first_choice, parts, schedule.start_s[task],
                              schedule.end_s(problem_, task));
    }

    // Tasks that start at or before `time`, and tasks without a place, by index.
    [[nodiscard]] std::vector<int> starting_by(double time) const {
        std::vector<int> found;
        for (std::size_t i = 0; i < problem_.tasks.size(); ++i)
            if (answer_.schedule.start_s[i] <= time) found.push_back(static_cast<int>(i));
        return found;
    }
    [[nodiscard]] std::vector<int> unplaced() const {
        std::vector<int> found;
        for (std::size_t i = 0; i < problem_.tasks.size(); ++i)
            if (!answer_.schedule.placed(i)) found.push_back(static_cast<int>(i));
        return found;
    }

    // Planned tasks that hold a GPU of `task` before it, the last one on each GPU.
    [[nodiscard]] std::vector<int> predecessors(std::size_t task) const {
        const alto::Schedule& schedule = answer_.schedule;
        std::vector<int> found;
        for (int p = 0; p < schedule.part_count[task]; ++p) {
            const alto::PartOut& part = schedule.parts[schedule.first_part[task] + p];
            std::vector<std::pair<double, int>> last(alto::kMaxGpus, {-alto::kNever, -1});
            for (std::size_t other = 0; other < problem_.tasks.size(); ++other) {
                if (other == task || schedule.start_s[other] >= schedule.start_s[task]) continue;
                for (int q = 0; q < schedule.part_count[other]; ++q) {
                    const alto::PartOut& held = schedule.parts[schedule.first_part[other] + q];
                    if (held.node != part.node) continue;
                    for (alto::Mask both = held.gpus & part.gpus; both; both &= both - 1)
                        last[std::countr_zero(both)] =
                            std::max(last[std::countr_zero(both)], {schedule.end_s(problem_, other), static_cast<int>(other)});
                }
            }
            for (const auto& [end, other] : last)
                if (other >= 0 && std::find(found.begin(), found.end(), other) == found.end()) found.push_back(other);
        }
        return found;
    }

    // Waiting tasks that the plan starts before `task`.
    [[nodiscard]] int ahead(std::size_t task) const {
        const std::vector<double>& starts = answer_.schedule.start_s;
        return static_cast<int>(std::count_if(starts.begin(), starts.end(), [&](double s) { return s < starts[task]; }));
    }

  private:
    alto::Reader reader_;
    alto::Problem problem_;
    alto::Answer answer_;
};

}  // namespace

PYBIND11_MODULE(_planner, module) {
    module.doc() = "List scheduling, packing and bounds for placement plans.";
    // Its arguments are kind, subject and message. Lives as long as the interpreter.
    static PyObject* const read_error = PyErr_NewException("alto_planner._planner.ReadError", PyExc_ValueError, nullptr);
    module.attr("ReadError") = py::handle(read_error);
    py::register_local_exception_translator([](std::exception_ptr raised) {
        try {
            if (raised) std::rethrow_exception(raised);
        } catch (const alto::ReadError& error) {
            PyErr_SetObject(read_error, py::make_tuple(error.kind, error.subject, error.what()).ptr());
        }
    });
    py::class_<Core>(module, "Core")
        .def(py::init<>())
        .def("read", &Core::read, py::arg("snapshot"))
        .def(
            "solve",
            [](Core& core, double budget_s, unsigned long long seed, std::array<long, 3> effort, std::string only) {
                return core.solve({budget_s, seed, effort, std::move(only)});
            },
            py::arg("budget_s"), py::arg("seed"), py::arg("effort") = std::array<long, 3>{-1, -1, -1},
            py::arg("only") = "")
        .def("placement", &Core::placement, py::arg("task"))
        .def("starting_by", &Core::starting_by, py::arg("time_s"))
        .def("unplaced", &Core::unplaced)
        .def("predecessors", &Core::predecessors, py::arg("task"))
        .def("ahead", &Core::ahead, py::arg("task"));
}
