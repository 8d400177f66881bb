// The native half of stretto.workflow.portfolio: many rollouts of many (action, continuation) pairs.
#include "rollouts.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <thread>
#include <tuple>

namespace nb = nanobind;

namespace {

using namespace stretto;

template <typename T> using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FlightTuple = std::tuple<int, int, int, bool, double, std::vector<double>>;

template <typename T> nb::ndarray<nb::numpy, T, nb::ndim<1>> to_numpy(std::vector<T> &&values) {
    auto *kept = new std::vector<T>(std::move(values));
    nb::capsule owner(kept, [](void *p) noexcept { delete static_cast<std::vector<T> *>(p); });
    return nb::ndarray<nb::numpy, T, nb::ndim<1>>(kept->data(), {kept->size()}, owner);
}

class Rollouts {
  public:
    Rollouts(Array<uint64_t> parents, Array<int64_t> law_ptr, Array<double> latency, Array<uint64_t> success,
             Array<double> cost, Array<double> reserve, Array<int32_t> levels, bool realised, bool first,
             double refund) {
        int nodes = int(parents.size());
        if (nodes < 1 || nodes > 64) throw std::invalid_argument("a workflow has 1 .. 64 nodes");
        if (levels.size() == 0 || reserve.size() % parents.size() || law_ptr.size() != reserve.size() + 1)
            throw std::invalid_argument("columns do not fit together");
        problem_.nodes = nodes;
        problem_.models = int(reserve.size()) / nodes;
        problem_.parents.assign(parents.data(), parents.data() + nodes);
        problem_.children.assign(size_t(nodes), 0);
        for (int node = 0; node < nodes; ++node) {
            for (uint64_t rest = parents.data()[node]; rest; rest &= rest - 1) {
                problem_.children[size_t(__builtin_ctzll(rest))] |= uint64_t(1) << node;
            }
        }
        problem_.reserve.assign(reserve.data(), reserve.data() + reserve.size());
        problem_.levels.assign(levels.data(), levels.data() + levels.size());
        for (size_t law = 0; law + 1 < law_ptr.size(); ++law) {
            std::vector<Row> rows;
            for (int64_t at = law_ptr.data()[law]; at < law_ptr.data()[law + 1]; ++at) {
                rows.push_back({latency.data()[at], cost.data()[at], success.data()[at]});
            }
            problem_.laws.push_back(std::move(rows));
        }
        for (int node = 0; node < nodes; ++node) {
            int model = 0;
            while (model < problem_.models && problem_.laws[size_t(node * problem_.models + model)].empty()) ++model;
            if (model == problem_.models) throw std::invalid_argument("a node has no model");
            problem_.first_model.push_back(model);
        }
        problem_.realised = realised, problem_.first = first, problem_.refund = refund;
    }

    // How many of the rollouts `from .. from + count - 1` each pair (action, continuation) wins.
    nb::ndarray<nb::numpy, int32_t, nb::ndim<1>> wins(uint64_t done, double time, double money,
                                                      const std::vector<FlightTuple> &flights, Table actions,
                                                      Array<int32_t> action, Array<int32_t> continuation,
                                                      uint64_t seed, uint32_t from, uint32_t count,
                                                      int threads) const {
        Start start = start_of(done, time, money, flights);
        size_t pairs = action.size();
        check_codes(actions, action, continuation);
        std::vector<std::vector<int32_t>> parts(size_t(std::max(1, threads)), std::vector<int32_t>(pairs));
        {
            nb::gil_scoped_release free;
            auto part = [&](size_t at) {
                Player player(problem_, start, seed);
                uint32_t begin = uint32_t(uint64_t(count) * at / parts.size());
                uint32_t end = uint32_t(uint64_t(count) * (at + 1) / parts.size());
                for (uint32_t rollout = begin; rollout < end; ++rollout) {
                    player.begin(from + rollout);
                    for (size_t pair = 0; pair < pairs; ++pair) {
                        const int32_t *first = actions.data() + size_t(action.data()[pair]) * actions.shape(1);
                        parts[at][pair] += player.play(first, continuation.data()[pair]).won;
                    }
                }
            };
            std::vector<std::thread> team;
            for (size_t at = 1; at < parts.size(); ++at) team.emplace_back(part, at);
            part(0);
            for (std::thread &member : team) member.join();
        }
        for (size_t at = 1; at < parts.size(); ++at) {
            for (size_t pair = 0; pair < pairs; ++pair) parts[0][pair] += parts[at][pair];
        }
        return to_numpy(std::move(parts[0]));
    }

    // Each rollout of one policy: whether it won, when it ended, what it had spent by then.
    auto outcomes(uint64_t done, double time, double money, const std::vector<FlightTuple> &flights, Table action,
                  int continuation, uint64_t seed, uint32_t from, uint32_t count) const {
        Start start = start_of(done, time, money, flights);
        const int32_t zero = 0;
        size_t one = 1;
        check_codes(action, Array<int32_t>(&zero, 1, &one), Array<int32_t>(&continuation, 1, &one));
        std::vector<uint8_t> won(count);
        std::vector<double> seconds(count), spent(count);
        {
            nb::gil_scoped_release free;
            Player player(problem_, start, seed);
            for (uint32_t rollout = 0; rollout < count; ++rollout) {
                player.begin(from + rollout);
                Outcome outcome = player.play(action.data(), continuation);
                won[rollout] = outcome.won, seconds[rollout] = outcome.seconds, spent[rollout] = outcome.spent;
            }
        }
        return std::make_tuple(to_numpy(std::move(won)), to_numpy(std::move(seconds)), to_numpy(std::move(spent)));
    }

  private:
    Problem problem_;

    Start start_of(uint64_t done, double time, double money, const std::vector<FlightTuple> &flights) const {
        Start start{done, time, money, {}};
        for (const auto &[node, model, running, succeeded, elapsed, remaining] : flights) {
            if (node < 0 || node >= problem_.nodes || model < 0 || model >= problem_.models || running < 1)
                throw std::invalid_argument("a flight is out of range");
            if (!remaining.empty() && remaining.size() != size_t(running))
                throw std::invalid_argument("a flight knows the ends of some of its samples only");
            start.flights.push_back(
                {node, model, running, succeeded, elapsed, remaining.empty() ? nullptr : remaining.data()});
        }
        return start;
    }

    void check_codes(const Table &actions, const Array<int32_t> &action, const Array<int32_t> &continuation) const {
        int codes = problem_.models * int(problem_.levels.size());
        if (int(actions.shape(1)) != problem_.nodes || action.size() != continuation.size())
            throw std::invalid_argument("an action has one code a node, a pair one action and one continuation");
        for (size_t at = 0; at < actions.size(); ++at) {
            if (actions.data()[at] >= codes) throw std::invalid_argument("an action has an unknown code");
        }
        for (size_t at = 0; at < action.size(); ++at) {
            if (action.data()[at] < 0 || size_t(action.data()[at]) >= actions.shape(0) ||
                continuation.data()[at] < 0 || continuation.data()[at] >= codes)
                throw std::invalid_argument("a pair has an unknown code");
        }
    }
};

} // namespace

NB_MODULE(_native, m) {
    using namespace nb::literals;
    nb::set_leak_warnings(false);  // what a process holds when it ends is nothing to tell its user of
    m.doc() = "Rollouts of stretto.workflow.portfolio; the Python face is rollouts.py, the plain twin plain.py.";
    nb::class_<Rollouts>(m, "Rollouts")
        .def(nb::init<Array<uint64_t>, Array<int64_t>, Array<double>, Array<uint64_t>, Array<double>, Array<double>,
                      Array<int32_t>, bool, bool, double>(),
             "parents"_a, "law_ptr"_a, "latency"_a, "success"_a, "cost"_a, "reserve"_a, "levels"_a, "realised"_a,
             "first"_a, "refund"_a)
        .def("wins", &Rollouts::wins, "done"_a, "time"_a, "money"_a, "flights"_a, "actions"_a, "action"_a,
             "continuation"_a, "seed"_a, "start"_a, "count"_a, "threads"_a)
        .def("outcomes", &Rollouts::outcomes, "done"_a, "time"_a, "money"_a, "flights"_a, "action"_a,
             "continuation"_a, "seed"_a, "start"_a, "count"_a);
}
