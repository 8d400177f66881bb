// One run of a workflow under "this action first, then so many samples on that model for every ready node".
//
// A batch (all samples of one launch of a node) is drawn whole: rollout, node, number of the launch and sample decide its
// draws, so all policies of one rollout meet the same luck, and a batch is computed once for all of them.
// The plain twin is stretto/workflow/portfolio/plain.py; both do the same arithmetic in the same order.
#pragma once

#include "philox.hpp"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace stretto {

constexpr int MAX_LAUNCHES = 10'000;
constexpr double MONEY_SLACK = 1e-12; // of the money at the start: what sums in floating point may be off
constexpr uint64_t IN_FLIGHT = uint64_t(1) << 63; // the streams of samples that run when the rollout starts

// One sample's row: where its fraction of a draw is below `success` (of 2^32), it succeeds.
struct Row {
    double latency, cost;
    uint64_t success;
};

struct Batch {
    double duration, taken, back; // seconds; money taken at the launch, and what of it comes back at the end
    bool success;
};

struct Flight {
    int node, model, running;
    bool succeeded;
    double elapsed;
    const double *remaining; // the true ones, where the planner is clairvoyant; else null
};

struct Start {
    uint64_t done;
    double time, money;
    std::vector<Flight> flights;
};

struct Outcome {
    bool won;
    double seconds, spent;
};

struct Problem {
    int nodes, models;
    std::vector<uint64_t> parents, children;
    std::vector<std::vector<Row>> laws; // of node * models + model, by latency; empty: the node has no such model
    std::vector<double> reserve;        // the most that a sample may cost, laid out as `laws`
    std::vector<int> first_model;
    std::vector<int> levels;
    bool realised; // the launch takes what the samples will cost, as the publication simulates it
    bool first;    // the first success ends a batch
    double refund; // share of a cancelled sample's unused price that comes back

    int law(int node, int model) const {
        int at = node * models + model;
        return laws[size_t(at)].empty() ? node * models + first_model[size_t(node)] : at;
    }
};

class Player {
  public:
    Player(const Problem &problem, const Start &start, uint64_t seed)
        : problem_(problem), start_(start), seed_(seed),
          choices_(problem.models * int(problem.levels.size())),
          rounds_(std::clamp(4096 / (problem.nodes * choices_), 1, 64)),
          batches_(size_t(problem.nodes) * size_t(choices_) * size_t(rounds_)), drawn_(batches_.size(), 0),
          in_flight_(start.flights.size()) {}

    // All that is played until the next call belongs to this rollout.
    void begin(uint32_t rollout) {
        rollout_ = rollout;
        ++stamp_;
        for (size_t at = 0; at < in_flight_.size(); ++at) in_flight_[at] = land(start_.flights[at]);
    }

    // Codes are model * levels + level; `action` has one a node, negative where it says nothing.
    Outcome play(const int32_t *action, int code) {
        const uint64_t all = problem_.nodes == 64 ? ~uint64_t(0) : (uint64_t(1) << problem_.nodes) - 1;
        uint64_t done = start_.done, flying = 0;
        double now = 0, money = start_.money;
        const double slack = start_.money * MONEY_SLACK;
        std::fill_n(round_, problem_.nodes, 0);
        for (size_t at = 0; at < in_flight_.size(); ++at) {
            int node = start_.flights[at].node;
            flying |= uint64_t(1) << node;
            end_[node] = in_flight_[at].duration;
            batch_[node] = in_flight_[at];
        }
        uint64_t ready = 0;
        for (int node = 0; node < problem_.nodes; ++node) {
            if ((problem_.parents[size_t(node)] & ~done) == 0) ready |= uint64_t(1) << node;
        }
        ready &= ~(done | flying);

        int launches = 0;
        for (bool opening = true; done != all; opening = false) {
            for (uint64_t rest = ready; rest; rest &= rest - 1) {
                int node = __builtin_ctzll(rest);
                int chosen = opening ? action[node] : code;
                if (chosen < 0) continue;
                const Batch &batch = launch(node, chosen);
                if (!(batch.taken <= money + slack)) continue;
                if (++launches > MAX_LAUNCHES) return {false, now, start_.money - money};
                money -= batch.taken;
                batch_[node] = batch;
                end_[node] = now + batch.duration;
                ++round_[node];
                flying |= uint64_t(1) << node;
                ready &= ~(uint64_t(1) << node);
            }
            if (!flying) return {false, now, start_.money - money};

            double next = end_[__builtin_ctzll(flying)];
            for (uint64_t rest = flying & (flying - 1); rest; rest &= rest - 1) {
                next = std::min(next, end_[__builtin_ctzll(rest)]);
            }
            if (next > start_.time) return {false, start_.time, start_.money - money};
            now = next;
            for (uint64_t rest = flying; rest; rest &= rest - 1) {
                int node = __builtin_ctzll(rest);
                if (end_[node] != now) continue;
                flying &= ~(uint64_t(1) << node);
                money += batch_[node].back;
                if (!batch_[node].success) {
                    ready |= uint64_t(1) << node;
                    continue;
                }
                done |= uint64_t(1) << node;
                for (uint64_t below = problem_.children[size_t(node)] & ~done; below; below &= below - 1) {
                    int child = __builtin_ctzll(below);
                    if ((problem_.parents[size_t(child)] & ~done) == 0) ready |= uint64_t(1) << child;
                }
            }
        }
        return {true, now, start_.money - money};
    }

  private:
    struct Sample {
        double latency, cost;
        bool success;
    };

    const Problem &problem_;
    const Start &start_;
    uint64_t seed_;
    int choices_, rounds_;
    std::vector<Batch> batches_;   // of (launch number, node, code), as far as this rollout has drawn them
    std::vector<uint32_t> drawn_;  // the stamp under which each was drawn
    std::vector<Batch> in_flight_; // how this rollout has each running batch end
    uint32_t rollout_ = 0, stamp_ = 0;
    std::vector<Sample> samples_;
    Batch late_{}; // a launch beyond the kept rounds
    Batch batch_[64];
    double end_[64];
    int round_[64];

    const Batch &launch(int node, int code) {
        int round = round_[node];
        if (round >= rounds_) return late_ = draw(node, code, round);
        size_t at = (size_t(round) * size_t(problem_.nodes) + size_t(node)) * size_t(choices_) + size_t(code);
        if (drawn_[at] != stamp_) {
            drawn_[at] = stamp_;
            batches_[at] = draw(node, code, round);
        }
        return batches_[at];
    }

    Batch draw(int node, int code, int round) {
        int levels = int(problem_.levels.size()), count = problem_.levels[size_t(code % levels)];
        int law = problem_.law(node, code / levels);
        const std::vector<Row> &rows = problem_.laws[size_t(law)];
        samples_.clear();
        Words words{};
        for (int sample = 0; sample < count; ++sample) {
            if (sample % 4 == 0) words = philox(seed_, stream(node, sample), uint64_t(round) << 32 | rollout_);
            uint64_t at = uint64_t(words[size_t(sample % 4)]) * rows.size();
            const Row &row = rows[at >> 32];
            samples_.push_back({row.latency, row.cost, (at & 0xFFFFFFFFu) < row.success});
        }
        return settle(law, 0.0, false);
    }

    // How a running batch ends, its samples' rows drawn among those that are longer than what has passed.
    Batch land(const Flight &flight) {
        int law = problem_.law(flight.node, flight.model);
        const std::vector<Row> &rows = problem_.laws[size_t(law)];
        size_t from = 0;
        if (!flight.remaining) {
            auto later = [](double elapsed, const Row &row) { return elapsed < row.latency; };
            from = size_t(std::upper_bound(rows.begin(), rows.end(), flight.elapsed, later) - rows.begin());
        }
        bool overdue = from == rows.size();
        if (overdue) --from;
        samples_.clear();
        Words words{};
        for (int sample = 0; sample < flight.running; ++sample) {
            if (sample % 4 == 0) words = philox(seed_, stream(flight.node, sample) | IN_FLIGHT, rollout_);
            uint64_t at = uint64_t(words[size_t(sample % 4)]) * (rows.size() - from);
            const Row &row = rows[from + (at >> 32)];
            double latency = flight.remaining ? flight.elapsed + flight.remaining[sample]
                             : overdue        ? 2 * flight.elapsed
                                              : row.latency;
            samples_.push_back({latency, row.cost, (at & 0xFFFFFFFFu) < row.success});
        }
        return settle(law, flight.elapsed, flight.succeeded);
    }

    static uint64_t stream(int node, int sample) { return uint64_t(sample / 4) << 32 | uint64_t(node); }

    Batch settle(int law, double elapsed, bool succeeded) const {
        double last = 0, spent = 0, cost = 0;
        bool any = false;
        double soonest = 0;
        for (const Sample &sample : samples_) {
            last = std::max(last, sample.latency);
            cost += sample.cost;
            if (sample.success && (!any || sample.latency < soonest)) any = true, soonest = sample.latency;
        }
        double end = problem_.first && any ? soonest : last;
        for (const Sample &sample : samples_) {
            double unused = sample.latency <= end ? 0.0 : 1 - end / sample.latency;
            spent += sample.cost * (1 - problem_.refund * unused);
        }
        double taken = problem_.realised ? cost : double(samples_.size()) * problem_.reserve[size_t(law)];
        return {end - elapsed, taken, taken - spent, any || succeeded};
    }
};

} // namespace stretto
