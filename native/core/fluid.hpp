// Tasks that share resources, as fluids: each flows at a rate x_i <= alone_i, and sum of use_ir x_i <= C_r on each resource.
//
// The idea: under weighted max-min each saturated resource r has one *level* L_r, and a task runs at scale_i * min(cap_i,
// lowest level among its resources). These levels are the unique fixed point of "L_r fills r, given the other levels", so a
// start or a finish repairs only the resources that it reaches, lowest level first, as a shortest-path tree is repaired.
// Tasks held back by r all follow r's own clock, dV = L_r dt, on which a finish is a constant: a new level moves no task.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace stretto {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// A binary heap of items by (key, tie), in which an item can be moved or erased. Positions live with the owner, so that
// several heaps over disjoint items may share them; -1 means in none.
class IndexedHeap {
  public:
    struct Entry {
        double key;
        int64_t tie;
        int item;
        bool operator<(const Entry &other) const {
            return key < other.key || (key == other.key && tie < other.tie);
        }
    };

    bool empty() const { return entries_.empty(); }
    const Entry &top() const { return entries_.front(); }
    double key_at(int position) const { return entries_[size_t(position)].key; }
    void put(std::vector<int> &position, Entry entry); // inserts, or moves if it is there
    void erase(std::vector<int> &position, int item);

  private:
    std::vector<Entry> entries_;

    void settle(std::vector<int> &position, size_t at, Entry entry);
};

// Measured co-runs: for the sorted kinds that run on a resource, the share of its rate alone that each one keeps.
using CoRunRows = std::map<std::vector<int>, std::vector<double>>;

class Fluid {
  public:
    struct Completion {
        double time;
        int64_t id;
    };

    Fluid(const std::vector<double> &capacity, bool table, CoRunRows rows, std::vector<std::string> kinds);

    int64_t start(double work, const std::vector<std::pair<int, double>> &use, double peak, double weight, int kind);
    bool next(Completion &completion);
    void advance(double to, std::vector<int64_t> &finished);
    double cancel(int64_t id);
    double rate(int64_t id);
    double in_use(int resource);
    double now() const { return now_; }
    size_t active() const { return slot_of_.size(); }

  private:
    static constexpr int kOwn = -1;    // follows its own pace
    static constexpr int kNowhere = -2; // started, rates not settled yet

    struct Use {
        int resource;
        int member;    // index in the members of that resource
        double demand; // what it draws there at level 1
        double factor; // share of its rate alone that a co-run table leaves it there
    };
    struct Task {
        int64_t id; // -1: the slot is free
        int kind;
        double scale; // rate at level 1
        double cap;   // the level at which it runs as if alone
        double low;   // lowest level among its resources, second lowest, and whose the lowest is
        double second;
        int lowest;
        int clock;    // the resource whose clock it follows, kOwn or kNowhere
        double pace;  // kOwn: its level
        double mark;  // reading of that clock when it is done; kOwn: the time of it; kNowhere: work left, in level-seconds
        bool touched;
        std::vector<Use> uses;
    };
    struct Member {
        int task;
        int use;
        double demand;
    };
    struct Resource {
        double capacity;
        double level = kInfinity; // being solved
        double pace = 0;          // level in force, 0 where nothing follows this clock
        double clock = 0, since = 0;
        double asked = 0;  // what its members would draw if it had no end; valid while it is not suspected
        double filled = 0; // candidate level, valid while `fresh`
        bool fresh = false, touched = false;
        std::vector<Member> members;
        IndexedHeap due; // tasks that follow this clock, by mark
    };

    bool table_;
    CoRunRows rows_;
    std::vector<std::string> kinds_;
    double now_ = 0;
    int64_t next_id_ = 0;
    std::vector<Resource> resources_;
    std::vector<Task> tasks_;
    std::vector<int> free_, due_at_, agenda_at_, queue_at_;
    std::vector<int> touched_tasks_, touched_resources_;
    std::unordered_map<int64_t, int> slot_of_;
    IndexedHeap agenda_; // completions: one entry a clock, one a task at its own pace
    IndexedHeap queue_;  // resources whose level may be wrong, by the lowest level that this can move
    std::vector<std::pair<double, double>> scratch_;

    int slot(int64_t id) const;
    int take_slot();
    void remove(int slot);
    void touch_task(int slot);
    void touch_resource(int r);
    double limit_elsewhere(const Task &task, int r) const;
    void lowest_levels(Task &task) const;
    bool has_room(int r) const;
    void suspect(int r, double bound);
    double fill(int r);
    void apply_level(int r);
    void settle_levels();
    void settle_table();
    void settle();
    double clock_now(const Resource &r) const { return r.clock + r.pace * (now_ - r.since); }
    double left(const Task &task) const;
    void follow(int slot);
    void schedule(int r);
    void take_finished(std::vector<int64_t> &finished);
    double level_of(const Task &task) const;
};

} // namespace stretto
