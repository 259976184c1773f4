// First come, first served, carried out virtually beside the real cluster: see alto_placement.first_come.
//
// The same tasks come to the same nodes. Who came first goes first, and who is behind starts earlier only where that
// does not delay the first in line (EASY backfilling). Predictions count, and what tasks really took as soon as that is
// known. Every task is a slot; a step costs what changed, not what is there.
#pragma once

#include <cstdint>
#include <deque>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace alto {

class FirstCome {
  public:
    struct Node {
        std::string id;
        std::string kind;
        int gpus = 0;
        std::int64_t memory_bytes = 0;
        bool ready = true;
        bool lost = false;
    };
    // What one choice of a task asks for. Of any kind if `kind` is empty.
    struct Need {
        int gpus = 0;
        std::string kind;
        std::int64_t memory_bytes = 0;
        bool one_node = false;
        auto operator<=>(const Need&) const = default;
    };
    struct Waiting {
        std::string id;
        std::vector<Need> needs;
        double predicted_s = 0;
        double arrived_s = 0;
    };
    struct Running {
        std::string id;
        std::vector<Need> needs;  // it would have after a loss of its node
        double started_s = 0;
        double expected_end_s = 0;
        std::vector<std::pair<std::string, int>> parts;  // GPUs by node; none for a guest
        bool is_guest = false;
    };
    struct VirtualRun {
        std::string id;
        std::vector<std::pair<std::string, int>> parts;
        double began_s;
        double end_s;
    };

    // Carry the schedule on. A clock that went back stands.
    void carry_on(double until_s);
    // The cluster as it is now; what runs virtually on a node that is gone waits again.
    void take_nodes(std::vector<Node> nodes);
    // Who is seen in reality. A new task is put in line; one that runs already runs on where it is.
    int take_in(const Waiting& row);
    int take_in(const Running& row);
    void note_run(int task, double started_s, double expected_end_s);
    // A task is gone in reality: virtually it lasts as long as it really did.
    void note_end(int task);
    // Everything of this moment was said.
    void settle();

    // The slot of a task that is there in reality; -1 for none.
    [[nodiscard]] int present(const std::string& id) const;
    // The longest wait of the last starts and, predicted, of the first in line.
    [[nodiscard]] double longest_wait_s() const;
    [[nodiscard]] std::vector<VirtualRun> running() const;
    [[nodiscard]] std::vector<std::string> line() const;

  private:
    // Of tasks that took what was predicted: the weight of predictions as they are.
    static constexpr double kPrior_s = 100 * 3600.0;

    enum class State { kNone, kInLine, kRunning };
    using Parts = std::vector<std::pair<int, int>>;  // node, GPUs

    struct Task {
        std::string id;
        std::vector<Need> needs;
        int asks = 0;
        double arrived_s = 0;
        double predicted_s = 0;
        double seconds = 0;  // the best that is known of its duration
        std::optional<double> really_began_s;
        bool present = false;  // in reality
        State state = State::kNone;
        Parts parts;  // while it runs
        double began_s = 0;
        [[nodiscard]] double end_s() const { return began_s + seconds; }
    };
    // A need on the nodes as they are.
    struct Fitting {
        Need need;
        std::vector<int> ready;   // nodes of its kind and memory that take work, widest first
        std::vector<int> widths;  // GPUs of each part: whole nodes and a remainder; none where they do not suffice
    };
    // All that a task asks for: a fitting for each of its choices.
    struct Asks {
        std::vector<int> fittings;
        bool placeable = false;
    };

    int add(const std::string& id, const std::vector<Need>& needs, double arrived_s, double predicted_s);
    void release_if_gone(int task);
    void last_for(int task, double seconds);
    int asks_of(const std::vector<Need>& needs);
    void match_all();
    void match(Fitting& fitting) const;
    void match(Asks& asks) const;
    void put_in_line(int task);
    void hold(int task);
    void place(int task, Parts parts, double at_s);
    void begin(int task, Parts parts);
    void end(int task);
    void start();
    void backfill(const std::vector<int>& line, double first_start_s);
    void note_wait(double wait_s);
    [[nodiscard]] Parts fit(const Task& task, bool outside_kept) const;
    // Sets kept_ to the nodes that the task then takes.
    double earliest(const Task& task);
    double free_from(int node, int width);

    double now_s_ = -std::numeric_limits<double>::infinity();    // of the schedule
    double shown_s_ = -std::numeric_limits<double>::infinity();  // of the last snapshot
    std::vector<Node> nodes_;
    std::unordered_map<std::string, int> node_index_;
    std::vector<std::int64_t> memories_;  // of nodes, ascending: what needs are told apart by
    std::vector<int> free_;               // per node
    std::vector<int> name_order_;         // per node: its place by name
    std::vector<std::vector<int>> on_;    // per node: tasks that run there
    std::vector<char> kept_;              // per node: whether it is kept for the first in line
    std::vector<Fitting> fittings_;
    std::vector<Asks> asks_;
    std::map<Need, int> fitting_of_;
    std::map<std::vector<int>, int> asks_of_;

    std::vector<Task> tasks_;
    std::vector<int> free_slots_;
    std::unordered_map<std::string, int> slot_of_;
    std::vector<int> queue_;                              // tasks in line, first come first
    std::set<std::pair<double, int>> ends_;               // of what runs
    std::deque<double> waits_s_;                          // of the last starts
    std::string first_;                                   // in line, that does not fit
    double first_wait_s_ = 0;                             // the longest that it was predicted to wait
    double predicted_s_ = kPrior_s, taken_s_ = kPrior_s;  // of all tasks that ended
    std::vector<std::pair<double, int>> ends_there_;      // scratch of free_from
};

}  // namespace alto
