// Playing numbers on lanes. Two interpreters of one set of columns:
//   play_static: lanes in order and dependencies alone; one pass, each edge looked at once, which also finds cycles;
//   play_events: pools that pick among ready tasks, and resources shared by way of `Fluid`; a loop over instants.
// An instant may have several rounds: all finishes that are due apply (by id), then what is ready starts, and tasks of no
// length finish in the next round of the same instant.
#include "fluid.hpp"
#include "static_pass.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <queue>
#include <set>
#include <stdexcept>
#include <tuple>

namespace nb = nanobind;

namespace {

using namespace stretto;

using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Longs = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Doubles = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename T> nb::ndarray<nb::numpy, T, nb::ndim<1>> to_numpy(Column<T> &&values) {
    auto *kept = new Column<T>(std::move(values));
    nb::capsule owner(kept, [](void *p) noexcept { delete static_cast<Column<T> *>(p); });
    return nb::ndarray<nb::numpy, T, nb::ndim<1>>(kept->data(), {kept->size()}, owner);
}

Graph graph_of(const Doubles &seconds, const Longs &lane_ptr, const Ints &lanes, const Longs &after_ptr,
               const Ints &after, const Ints &widths) {
    return {int(seconds.size()), seconds.data(), {lane_ptr.data(), lanes.data()}, {after_ptr.data(), after.data()},
            widths.data(), int(widths.size())};
}

// The task before each one on each of its ordered lanes (-1: none), laid out as graph.lanes.
std::vector<int32_t> lane_edges(const Graph &graph) {
    std::vector<int32_t> previous(size_t(graph.lanes.ptr[graph.size]));
    std::vector<int32_t> last(size_t(graph.num_lanes), -1);
    for (int task = 0; task < graph.size; ++task) {
        for (int64_t at = graph.lanes.ptr[task]; at < graph.lanes.ptr[task + 1]; ++at) {
            int lane = graph.lanes.index[at];
            previous[size_t(at)] = graph.widths[lane] ? -1 : std::exchange(last[size_t(lane)], task);
        }
    }
    return previous;
}

// Use of shared resources: rows of (resource, amount over the task's life).
struct Sharing {
    Ragged use;
    const double *amount, *weight;
    const int32_t *kind;
};

class EventLoop {
  public:
    EventLoop(const Graph &graph, const uint8_t *by_priority, const double *priority, const Sharing &sharing,
              stretto::Fluid &fluid)
        : played(graph.size, 0), graph_(graph), priority_(priority), sharing_(sharing), fluid_(fluid),
          waits_for_(size_t(graph.size)), next_ptr_(size_t(graph.size) + 1) {
        for (int lane = 0; lane < graph.num_lanes; ++lane) {
            slots_.push_back(graph.widths[lane]);
            ready_.emplace_back(ReadyOrder{by_priority[lane] != 0});
        }
        successors(lane_edges(graph));
    }

    Played played;

    void run() {
        for (int task = 0; task < graph_.size; ++task) {
            if (waits_for_[task] == 0) become_ready(task, -1);
        }
        start_ready();
        std::vector<int> finished;
        while (next_instant()) {
            collect(finished);
            std::sort(finished.begin(), finished.end());
            for (int task : finished) finish(task);
            start_ready();
        }
    }

  private:
    struct Ready {
        double priority, since;
        int task;
    };
    struct ReadyOrder {
        bool by_priority;
        bool operator()(const Ready &a, const Ready &b) const {
            if (by_priority && a.priority != b.priority) return a.priority > b.priority;
            return a.since != b.since ? a.since < b.since : a.task < b.task;
        }
    };
    using Due = std::pair<double, int>;

    const Graph &graph_;
    const double *priority_;
    Sharing sharing_;
    stretto::Fluid &fluid_;
    double now_ = 0;
    std::vector<int32_t> waits_for_, next_;
    std::vector<int64_t> next_ptr_;
    std::vector<int> slots_; // free slots of each pool
    std::vector<std::set<Ready, ReadyOrder>> ready_;
    std::vector<int> unpooled_; // ready tasks that hold no pool
    std::vector<int32_t> last_on_pool_ = std::vector<int32_t>(size_t(graph_.num_lanes), -1);
    std::priority_queue<Due, std::vector<Due>, std::greater<Due>> due_;
    std::vector<int> flowing_; // tasks by their id in the fluid
    std::vector<int64_t> drained_;
    std::vector<std::pair<int, double>> draws_;

    template <typename F> void each_edge(const std::vector<int32_t> &previous, int task, F visit) const {
        for (int64_t at = graph_.lanes.ptr[task]; at < graph_.lanes.ptr[task + 1]; ++at) {
            if (previous[size_t(at)] >= 0) visit(previous[size_t(at)]);
        }
        for (int64_t at = graph_.after.ptr[task]; at < graph_.after.ptr[task + 1]; ++at) visit(graph_.after.index[at]);
    }

    void successors(const std::vector<int32_t> &previous) {
        for (int task = 0; task < graph_.size; ++task) {
            each_edge(previous, task, [&](int before) { ++next_ptr_[before + 1], ++waits_for_[task]; });
        }
        for (int task = 0; task < graph_.size; ++task) next_ptr_[task + 1] += next_ptr_[task];
        next_.resize(size_t(next_ptr_.back()));
        std::vector<int64_t> fill(next_ptr_.begin(), next_ptr_.end() - 1);
        for (int task = 0; task < graph_.size; ++task) {
            each_edge(previous, task, [&](int before) { next_[size_t(fill[before]++)] = task; });
        }
    }

    template <typename F> void each_pool(int task, F visit) const {
        for (int64_t at = graph_.lanes.ptr[task]; at < graph_.lanes.ptr[task + 1]; ++at) {
            if (graph_.widths[graph_.lanes.index[at]]) visit(graph_.lanes.index[at]);
        }
    }

    Ready entry(int task) const { return {priority_[task], played.finish[task], task}; }

    // Until a task starts, played.finish holds the instant at which it became ready.
    void become_ready(int task, int cause) {
        played.finish[task] = now_;
        played.cause[task] = cause;
        bool pooled = false;
        each_pool(task, [&](int pool) { ready_[pool].insert(entry(task)), pooled = true; });
        if (!pooled) unpooled_.push_back(task);
    }

    // Tasks without pools first, by id; then the pools in order of insertion, each as it picks. A task that needs a slot of
    // another pool as well is passed over until all of its pools have one.
    void start_ready() {
        std::sort(unpooled_.begin(), unpooled_.end());
        for (int task : unpooled_) start(task);
        unpooled_.clear();
        for (int pool = 0; pool < graph_.num_lanes; ++pool) {
            auto &queue = ready_[pool];
            for (auto at = queue.begin(); slots_[pool] > 0 && at != queue.end();) {
                int task = at->task;
                ++at; // starting a task takes it out of the queue
                bool fits = true;
                each_pool(task, [&](int other) { fits = fits && slots_[other] > 0; });
                if (fits) start(task);
            }
        }
    }

    void start(int task) {
        each_pool(task, [&](int pool) {
            ready_[pool].erase(entry(task));
            --slots_[pool];
            // What waited for a slot, and not for a dependency, was let in by the pool's last finish.
            if (played.finish[task] < now_ && last_on_pool_[pool] >= 0 &&
                played.finish[last_on_pool_[pool]] == now_) {
                played.cause[task] = last_on_pool_[pool];
            }
        });
        played.start[task] = now_;
        played.order.push_back(task);
        if (sharing_.use.ptr[task] == sharing_.use.ptr[task + 1]) {
            due_.emplace(now_ + graph_.seconds[task], task);
        } else {
            start_flow(task);
        }
    }

    // Work is counted in seconds alone, so that the peak is 1; a task of no seconds is held by its resources alone.
    void start_flow(int task) {
        double seconds = graph_.seconds[task], work = seconds > 0 ? seconds : 1.0;
        draws_.clear();
        for (int64_t at = sharing_.use.ptr[task]; at < sharing_.use.ptr[task + 1]; ++at) {
            draws_.emplace_back(sharing_.use.index[at], sharing_.amount[at] / work);
        }
        double peak = seconds > 0 ? 1.0 : stretto::kInfinity;
        fluid_.start(work, draws_, peak, sharing_.weight[task], sharing_.kind[task]);
        flowing_.push_back(task);
    }

    bool next_instant() {
        stretto::Fluid::Completion completion;
        double next = due_.empty() ? stretto::kInfinity : due_.top().first;
        if (fluid_.next(completion)) next = std::min(next, completion.time);
        if (next == stretto::kInfinity) return false;
        now_ = next;
        return true;
    }

    void collect(std::vector<int> &finished) {
        finished.clear();
        for (; !due_.empty() && due_.top().first <= now_; due_.pop()) finished.push_back(due_.top().second);
        fluid_.advance(now_, drained_);
        for (int64_t id : drained_) finished.push_back(flowing_[size_t(id)]);
        drained_.clear();
    }

    void finish(int task) {
        played.finish[task] = now_;
        each_pool(task, [&](int pool) { ++slots_[pool], last_on_pool_[pool] = task; });
        for (int64_t at = next_ptr_[task]; at < next_ptr_[task + 1]; ++at) {
            if (--waits_for_[next_[size_t(at)]] == 0) become_ready(next_[size_t(at)], task);
        }
    }
};

// The lowest free slot for each interval, given in order of their starts: a picture of what ran side by side.
Column<int32_t> slots(const double *start, const double *finish, size_t size) {
    std::priority_queue<std::pair<double, int>, std::vector<std::pair<double, int>>, std::greater<>> held;
    std::priority_queue<int, std::vector<int>, std::greater<>> open;
    Column<int32_t> slot(size);
    int used = 0;
    for (size_t i = 0; i < size; ++i) {
        for (; !held.empty() && held.top().first <= start[i]; held.pop()) open.push(held.top().second);
        if (open.empty()) open.push(used++);
        slot[i] = open.top();
        open.pop();
        held.emplace(finish[i], slot[i]);
    }
    return slot;
}

using Result = std::tuple<nb::ndarray<nb::numpy, double, nb::ndim<1>>, nb::ndarray<nb::numpy, double, nb::ndim<1>>,
                          nb::ndarray<nb::numpy, int32_t, nb::ndim<1>>, nb::ndarray<nb::numpy, int32_t, nb::ndim<1>>>;

template <typename Pass> Played play(const Graph &graph) {
    Pass pass(graph);
    pass.run();
    return std::move(pass.played);
}

Result to_result(Played &&played) {
    return {to_numpy(std::move(played.start)), to_numpy(std::move(played.finish)), to_numpy(std::move(played.cause)),
            to_numpy(std::move(played.order))};
}

} // namespace

void bind_simulate(nb::module_ &m) {
    m.def(
        "play_static",
        [](Doubles seconds, Longs lane_ptr, Ints lanes, Longs after_ptr, Ints after, Ints widths) {
            Graph graph = graph_of(seconds, lane_ptr, lanes, after_ptr, after, widths);
            Played played = [&] {
                nb::gil_scoped_release release;
                return LanePass::takes(graph) ? play<LanePass>(graph) : play<StaticPass>(graph);
            }();
            return to_result(std::move(played));
        },
        nb::arg("seconds"), nb::arg("lane_ptr"), nb::arg("lanes"), nb::arg("after_ptr"), nb::arg("after"),
        nb::arg("widths"));
    m.def(
        "play_events",
        [](Doubles seconds, Longs lane_ptr, Ints lanes, Longs after_ptr, Ints after, Ints widths, Bytes by_priority,
           Doubles priority, Longs use_ptr, Ints use, Doubles amount, Doubles weight, Ints kind,
           stretto::Fluid &fluid) {
            Graph graph = graph_of(seconds, lane_ptr, lanes, after_ptr, after, widths);
            Sharing sharing{{use_ptr.data(), use.data()}, amount.data(), weight.data(), kind.data()};
            auto loop = [&] {
                nb::gil_scoped_release release;
                auto made = std::make_unique<EventLoop>(graph, by_priority.data(), priority.data(), sharing, fluid);
                made->run();
                return made;
            }();
            return to_result(std::move(loop->played));
        },
        nb::arg("seconds"), nb::arg("lane_ptr"), nb::arg("lanes"), nb::arg("after_ptr"), nb::arg("after"),
        nb::arg("widths"), nb::arg("by_priority"), nb::arg("priority"), nb::arg("use_ptr"), nb::arg("use"),
        nb::arg("amount"), nb::arg("weight"), nb::arg("kind"), nb::arg("fluid"));
    m.def("slots", [](Doubles start, Doubles finish) { return to_numpy(slots(start.data(), finish.data(), start.size())); });
}
