// Reads the Python rows of a snapshot into a Problem. A row object seen in the last snapshot is not read again.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "model.hpp"

namespace alto {

// `kind` is one of: duplicate, unknown_node, invalid, gpu_conflict, reservation_conflict.
struct ReadError : std::runtime_error {
    ReadError(std::string kind_, std::string subject_, const std::string& message)
        : std::runtime_error(message), kind(std::move(kind_)), subject(std::move(subject_)) {}
    std::string kind, subject;
};

class Reader {
  public:
    // Fill `problem` from a snapshot object (see alto_placement.planner.model.Snapshot). Throws ReadError and then
    // forgets all rows.
    void read(pybind11::handle snapshot, Problem& problem);

    [[nodiscard]] int tenant_of(const std::string& name);

  private:
    struct ChoiceRow {
        int shape;
        double seconds;
    };
    // What every read touches of a row, apart from what only a new row needs.
    struct TaskRow {
        Task task;
        ChoiceRow first{0, 0};
    };
    struct TaskDetail {
        pybind11::object object;
        std::string id;
        std::vector<ChoiceRow> choices;
    };
    struct AreaKey {
        double area, arrived_s;
        int row;
    };
    struct RunningRow {
        pybind11::object object;
        std::string id;
        int tenant;
        double started_s, expected_end_s;
        bool guest;
        std::vector<std::pair<int, Mask>> parts;  // node index, GPUs
    };

    void read_all(pybind11::handle snapshot, Problem& problem);
    void read_nodes(pybind11::handle rows, Problem& problem);
    std::vector<int> read_tenants(pybind11::handle rows, Problem& problem);
    void number_tenants(const std::vector<int>& listed, Problem& problem);
    void read_waiting(pybind11::handle rows, Problem& problem);
    void sort_by_area(const std::vector<int>& fresh);
    void fill_tasks(Problem& problem);
    void read_running(pybind11::handle rows, Problem& problem);
    void read_windows(pybind11::handle rows, Problem& problem);
    void finish_shapes(Problem& problem);
    void tell_memories_apart();
    int add_row(PyObject* object, std::vector<int>& fresh);
    void forget_unseen();

    std::pair<TaskRow, TaskDetail> read_task(pybind11::handle row);
    RunningRow read_running_row(pybind11::handle row);
    std::pair<int, Mask> read_part(pybind11::handle part, const std::string& subject);
    int shape_of(pybind11::handle choice, const std::string& subject);
    int kind_of(const std::string& name);

    long generation_ = 0;
    std::vector<pybind11::object> node_objects_;
    std::vector<Node> nodes_;
    std::vector<NodeClass> classes_;
    std::vector<std::int64_t> memories_;  // of nodes, ascending: what shapes are told apart by
    std::unordered_map<std::string, int> node_index_;
    std::unordered_map<std::string, int> kinds_;
    std::unordered_map<std::string, int> tenants_;
    std::vector<Shape> shapes_;
    // One entry per row known, side by side.
    std::vector<PyObject*> objects_;
    std::vector<long> seen_;     // in which read it was there last
    std::vector<int> position_;  // in the queue of that read
    std::vector<TaskRow> rows_;
    std::vector<TaskDetail> details_;
    std::vector<AreaKey> by_area_;  // rows of the last snapshot, smallest area first
    std::vector<int> free_rows_;
    std::vector<int> order_;  // rows of the last snapshot, in its order
    std::unordered_map<PyObject*, int> row_of_;
    std::unordered_map<std::string, int> row_of_id_;
    std::vector<RunningRow> running_;
    std::vector<int> fresh_waiting_;  // rows of this snapshot that the last one did not have
    std::unordered_map<PyObject*, std::size_t> running_of_;
    std::unordered_set<std::string> running_ids_;
};

}  // namespace alto
