// Schedules without pools and shared resources, played in one pass: each edge is looked at once, and cycles are found on the way.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "columns.hpp"

namespace stretto {

// Rows of a ragged table: row i is index[ptr[i]] .. index[ptr[i + 1]].
struct Ragged {
    const int64_t *ptr;
    const int32_t *index;
};

struct Graph {
    int size;
    const double *seconds;
    Ragged lanes, after;
    const int32_t *widths; // of each lane: 0 an ordered lane, else the slots of a pool
    int num_lanes;
};

struct Played {
    Column<double> start, finish;
    Column<int32_t> cause; // the task whose finish let this one start (-1: none); unplayed: what it waits for
    Column<int32_t> order; // tasks in the order in which they were played
    Played(int size, double unplayed) : start(size_t(size)), finish(size_t(size), unplayed), cause(size_t(size), -1) {
        order.reserve(size_t(size));
    }
};

// Each lane knows its head, the next task in its order. A task is tried when it is at the head of all of its lanes; if a
// dependency is missing it is parked there, and tried again when that is played. So each edge is looked at once.
class StaticPass {
  public:
    explicit StaticPass(const Graph &graph)
        : played(graph.size, kUnplayed), graph_(graph), lanes_(size_t(graph.num_lanes)), seen_(size_t(graph.size), 0),
          first_waiter_(size_t(graph.size), -1), next_waiter_(size_t(graph.size), -1) {
        thread_lanes();
    }

    Played played;

    void run() {
        for (int task = 0; task < graph_.size; ++task) {
            tried_.push_back(task);
            while (!tried_.empty()) {
                int next = tried_.back();
                tried_.pop_back();
                bool parked = played.cause[next] >= 0, done = played.finish[next] != kUnplayed;
                if (!parked && !done && attempt(next)) wake(next);
            }
        }
        if (int(played.order.size()) < graph_.size) blame_heads();
    }

  private:
    static constexpr double kUnplayed = -1;

    struct Lane {
        int head = -1, last = -1; // the next task to be played on it, and the last one played
        double free = 0;          // when that one finished
    };

    const Graph &graph_;
    std::vector<Lane> lanes_;
    Column<int32_t> next_on_lane_; // laid out as graph.lanes; -1: none
    Column<int32_t> seen_;         // edges already found to be played: those of lanes first
    Column<int32_t> first_waiter_, next_waiter_;
    std::vector<int> tried_;

    bool ordered(int lane) const { return graph_.widths[lane] == 0; }

    void thread_lanes() {
        next_on_lane_.assign(size_t(graph_.lanes.ptr[graph_.size]), -1);
        std::vector<int64_t> last(size_t(graph_.num_lanes), -1);
        for (int task = 0; task < graph_.size; ++task) {
            for (int64_t at = graph_.lanes.ptr[task]; at < graph_.lanes.ptr[task + 1]; ++at) {
                int lane = graph_.lanes.index[at];
                if (!ordered(lane)) continue;
                (last[lane] < 0 ? lanes_[lane].head : next_on_lane_[last[lane]]) = task;
                last[lane] = at;
            }
        }
    }

    bool attempt(int task) {
        const int32_t *lane = graph_.lanes.index + graph_.lanes.ptr[task];
        const int32_t *after = graph_.after.index + graph_.after.ptr[task];
        int lanes = int(graph_.lanes.ptr[task + 1] - graph_.lanes.ptr[task]);
        int edges = lanes + int(graph_.after.ptr[task + 1] - graph_.after.ptr[task]);

        int i = seen_[task];
        for (; i < lanes; ++i) {
            if (ordered(lane[i]) && lanes_[lane[i]].head != task) break;
        }
        if (i >= lanes) {
            while (i < edges && played.finish[after[i - lanes]] != kUnplayed) ++i;
        }
        if (i < edges) {
            seen_[task] = i;
            if (i >= lanes) park(task, after[i - lanes]);
            return false;
        }
        play(task, lane, lanes, after, edges - lanes);
        return true;
    }

    void park(int task, int before) {
        played.cause[task] = before;
        next_waiter_[task] = std::exchange(first_waiter_[before], task);
    }

    void play(int task, const int32_t *lane, int lanes, const int32_t *after, int count) {
        double start = 0;
        int cause = -1;
        auto wait = [&](int before, double finish) {
            if (cause >= 0 && finish <= start) return;
            start = finish;
            cause = before;
        };
        for (int i = 0; i < lanes; ++i) {
            if (ordered(lane[i]) && lanes_[lane[i]].last >= 0) wait(lanes_[lane[i]].last, lanes_[lane[i]].free);
        }
        for (int i = 0; i < count; ++i) wait(after[i], played.finish[after[i]]);
        played.start[task] = start;
        played.finish[task] = start + graph_.seconds[task];
        played.cause[task] = cause;
        played.order.push_back(task);
    }

    void wake(int task) {
        for (int waiter = first_waiter_[task]; waiter >= 0; waiter = next_waiter_[waiter]) {
            played.cause[waiter] = -1;
            tried_.push_back(waiter);
        }
        for (int64_t at = graph_.lanes.ptr[task]; at < graph_.lanes.ptr[task + 1]; ++at) {
            int lane = graph_.lanes.index[at];
            if (!ordered(lane)) continue;
            lanes_[lane] = {next_on_lane_[at], task, played.finish[task]};
            if (next_on_lane_[at] >= 0) tried_.push_back(next_on_lane_[at]);
        }
    }

    // There is a cycle: what was never at the head of its lanes waits, if not directly, for the task that is.
    void blame_heads() {
        for (int task = 0; task < graph_.size; ++task) {
            if (played.finish[task] != kUnplayed || played.cause[task] >= 0) continue;
            played.cause[task] = lanes_[graph_.lanes.index[graph_.lanes.ptr[task] + seen_[task]]].head;
        }
    }
};

// The same for schedules whose tasks each hold one ordered lane, which most are. Then only the head of a lane can be parked, so
// what is known of a try belongs to the lane, and a task's row is touched when it is played.
class LanePass {
  public:
    explicit LanePass(const Graph &graph) : played(graph.size, kUnplayed), graph_(graph), lanes_(size_t(graph.num_lanes)) {
        thread_lanes();
    }

    Played played;

    static bool takes(const Graph &graph) {
        for (int lane = 0; lane < graph.num_lanes; ++lane) {
            if (graph.widths[lane]) return false;
        }
        for (int task = 0; task <= graph.size; ++task) {
            if (graph.lanes.ptr[task] != task) return false;
        }
        return true;
    }

    void run() {
        for (int lane = 0; lane < graph_.num_lanes; ++lane) {
            tried_.push_back(lane);
            while (!tried_.empty()) {
                int next = tried_.back();
                tried_.pop_back();
                advance(next);
            }
        }
        if (int(played.order.size()) < graph_.size) blame_heads();
    }

  private:
    static constexpr double kUnplayed = -1;

    struct Lane {
        int head = -1, last = -1; // the next task to be played on it, and the last one played
        int end = 0;              // one past its last task, where the tasks of each lane follow one another
        int seen = 0;             // dependencies of the head that are found to be played
        int next = -1;            // the next lane parked at the same task
        double free = 0;          // when the last one finished
    };

    const Graph &graph_;
    std::vector<Lane> lanes_;
    bool in_a_row_ = false;        // the tasks of each lane follow one another
    Column<int32_t> next_on_lane_; // empty if so; -1: none
    std::vector<int> tried_;

    void thread_lanes() {
        const int32_t *lane = graph_.lanes.index;
        in_a_row_ = std::is_sorted(lane, lane + graph_.size);
        if (!in_a_row_) next_on_lane_.assign(size_t(graph_.size), -1);
        for (int task = 0; task < graph_.size; ++task) {
            Lane &mine = lanes_[lane[task]];
            if (mine.head < 0) {
                mine.head = task;
            } else if (!in_a_row_) {
                next_on_lane_[mine.end - 1] = task;
            }
            mine.end = task + 1;
        }
    }

    int after(int task, const Lane &lane) const {
        if (!in_a_row_) return next_on_lane_[task];
        return task + 1 < lane.end ? task + 1 : -1;
    }

    // Plays a lane until its end or a dependency that is not played. While a task is not, its `cause` holds the first lane
    // that is parked at it.
    void advance(int number) {
        Lane &lane = lanes_[number];
        while (lane.head >= 0) {
            const int task = lane.head;
            const int32_t *before = graph_.after.index + graph_.after.ptr[task];
            const int count = int(graph_.after.ptr[task + 1] - graph_.after.ptr[task]);
            while (lane.seen < count && played.finish[before[lane.seen]] != kUnplayed) ++lane.seen;
            if (lane.seen < count) {
                lane.next = std::exchange(played.cause[before[lane.seen]], number);
                return;
            }
            double start = 0;
            int cause = -1;
            if (lane.last >= 0) start = lane.free, cause = lane.last;
            for (int i = 0; i < count; ++i) {
                const double finish = played.finish[before[i]];
                if (cause < 0 || finish > start) start = finish, cause = before[i];
            }
            played.start[task] = start;
            played.finish[task] = lane.free = start + graph_.seconds[task];
            played.order.push_back(task);
            for (int parked = std::exchange(played.cause[task], cause); parked >= 0; parked = lanes_[parked].next) {
                tried_.push_back(parked);
            }
            lane.last = task;
            lane.seen = 0;
            lane.head = after(task, lane);
        }
    }

    // There is a cycle: the head of a lane waits for what is not played, and whatever comes after it on the lane for the head.
    void blame_heads() {
        for (int task = 0; task < graph_.size; ++task) {
            if (played.finish[task] != kUnplayed) continue;
            const Lane &lane = lanes_[graph_.lanes.index[task]];
            const bool heads = lane.head == task;
            played.cause[task] = heads ? graph_.after.index[graph_.after.ptr[task] + lane.seen] : lane.head;
        }
    }
};

} // namespace stretto
