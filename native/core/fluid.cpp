#include "fluid.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace nb = nanobind;

namespace stretto {

// A resource is taken to have room, unseen, only this far (relative) from its end: `asked` is kept up by differences.
constexpr double kClearRoom = 1e-9;

// Levels closer than this (relative) are the same: far above rounding, far below anything a duration can show.
constexpr double kSameLevel = 1e-13;

void IndexedHeap::settle(std::vector<int> &position, size_t at, Entry entry) {
    while (at > 0 && entry < entries_[(at - 1) / 2]) {
        entries_[at] = entries_[(at - 1) / 2];
        position[entries_[at].item] = int(at);
        at = (at - 1) / 2;
    }
    for (size_t child; (child = 2 * at + 1) < entries_.size(); at = child) {
        if (child + 1 < entries_.size() && entries_[child + 1] < entries_[child]) ++child;
        if (!(entries_[child] < entry)) break;
        entries_[at] = entries_[child];
        position[entries_[at].item] = int(at);
    }
    entries_[at] = entry;
    position[entry.item] = int(at);
}

void IndexedHeap::put(std::vector<int> &position, Entry entry) {
    int at = position[entry.item];
    if (at < 0) {
        at = int(entries_.size());
        entries_.push_back(entry);
    }
    settle(position, size_t(at), entry);
}

void IndexedHeap::erase(std::vector<int> &position, int item) {
    int at = position[item];
    if (at < 0) return;
    position[item] = -1;
    Entry last = entries_.back();
    entries_.pop_back();
    if (last.item != item) settle(position, size_t(at), last);
}

Fluid::Fluid(const std::vector<double> &capacity, bool table, CoRunRows rows, std::vector<std::string> kinds)
    : table_(table), rows_(std::move(rows)), kinds_(std::move(kinds)) {
    resources_.resize(capacity.size());
    for (size_t r = 0; r < capacity.size(); ++r) resources_[r].capacity = capacity[r];
    queue_at_.assign(capacity.size(), -1);
    agenda_at_.assign(capacity.size(), -1);
}

int Fluid::slot(int64_t id) const {
    auto found = slot_of_.find(id);
    if (found == slot_of_.end()) throw std::out_of_range("fluid: task " + std::to_string(id) + " is not running");
    return found->second;
}

int Fluid::take_slot() {
    if (!free_.empty()) {
        int slot = free_.back();
        free_.pop_back();
        return slot;
    }
    tasks_.emplace_back();
    due_at_.push_back(-1);
    agenda_at_.push_back(-1);
    return int(tasks_.size()) - 1;
}

void Fluid::touch_task(int slot) {
    if (std::exchange(tasks_[slot].touched, true)) return;
    touched_tasks_.push_back(slot);
}

void Fluid::touch_resource(int r) {
    if (std::exchange(resources_[r].touched, true)) return;
    touched_resources_.push_back(r);
}

int64_t Fluid::start(double work, const std::vector<std::pair<int, double>> &use, double peak, double weight, int kind) {
    double alone = peak;
    for (auto [r, amount] : use) alone = std::min(alone, resources_[r].capacity / amount);
    if (!(work >= 0 && std::isfinite(work))) throw std::invalid_argument("fluid: work must be finite and not negative");
    if (!(weight > 0 && std::isfinite(weight))) throw std::invalid_argument("fluid: weight must be positive and finite");
    if (!(alone > 0 && std::isfinite(alone))) {
        throw std::invalid_argument("fluid: the rate alone must be positive and finite; give a peak or use a resource");
    }

    int slot = take_slot();
    Task &task = tasks_[slot];
    task.id = next_id_++;
    task.kind = kind;
    task.scale = table_ ? alone : weight * alone;
    task.cap = table_ ? 1.0 : 1.0 / weight;
    task.clock = kNowhere;
    task.mark = work / task.scale;
    task.touched = false;
    task.uses.clear();
    for (auto [r, amount] : use) {
        auto &members = resources_[r].members;
        double demand = amount * task.scale;
        members.push_back({slot, int(task.uses.size()), demand});
        task.uses.push_back({r, int(members.size()) - 1, demand, 1.0});
    }
    lowest_levels(task);
    for (const Use &used : task.uses) {
        resources_[used.resource].asked += limit_elsewhere(task, used.resource) * used.demand;
        table_ ? touch_resource(used.resource) : suspect(used.resource, 0);
    }
    touch_task(slot);
    slot_of_.emplace(task.id, slot);
    return task.id;
}

void Fluid::remove(int slot) {
    Task &task = tasks_[slot];
    for (const Use &use : task.uses) {
        auto &members = resources_[use.resource].members;
        members[use.member] = members.back();
        members.pop_back();
        if (size_t(use.member) < members.size()) {
            const Member &moved = members[use.member];
            tasks_[moved.task].uses[moved.use].member = use.member;
        }
        resources_[use.resource].asked -= limit_elsewhere(task, use.resource) * use.demand;
        table_ ? touch_resource(use.resource) : suspect(use.resource, 0);
    }
    if (task.clock >= 0) {
        resources_[task.clock].due.erase(due_at_, slot);
        touch_resource(task.clock);
    }
    agenda_.erase(agenda_at_, int(resources_.size()) + slot);
    task.clock = kNowhere;
    task.uses.clear();
    slot_of_.erase(task.id);
    task.id = -1;
    free_.push_back(slot);
}

// The level at which the task would run if r were not there.
double Fluid::limit_elsewhere(const Task &task, int r) const {
    return std::min(task.cap, task.lowest == r ? task.second : task.low);
}

void Fluid::lowest_levels(Task &task) const {
    task.low = task.second = kInfinity;
    task.lowest = -1;
    for (const Use &use : task.uses) {
        double level = resources_[use.resource].level;
        if (level < task.low) {
            task.second = task.low;
            task.low = level;
            task.lowest = use.resource;
        } else if (level < task.second) {
            task.second = level;
        }
    }
}

bool Fluid::has_room(int r) const {
    const Resource &resource = resources_[r];
    bool settled = resource.level == kInfinity && queue_at_[r] < 0;
    return settled && resource.asked <= resource.capacity * (1 - kClearRoom);
}

// Marks that the level of r may be wrong, by a change that moves no level below `bound`.
void Fluid::suspect(int r, double bound) {
    if (has_room(r)) return;
    resources_[r].fresh = false;
    int at = queue_at_[r];
    if (at < 0 || bound < queue_.key_at(at)) queue_.put(queue_at_, {bound, r, r});
}

// The level L with sum over members of demand * min(limit elsewhere, L) = capacity; infinite if all fit. The sum is
// concave in L, so Newton's steps from the left rise to the root and end once no member changes sides.
double Fluid::fill(int r) {
    Resource &resource = resources_[r];
    double all = 0, demand = 0;
    scratch_.clear();
    for (const Member &member : resource.members) {
        double limit = limit_elsewhere(tasks_[member.task], r);
        scratch_.emplace_back(limit, member.demand);
        all += limit * member.demand;
        demand += member.demand;
    }
    resource.asked = all;
    if (all <= resource.capacity) return kInfinity;

    double floor = resource.capacity / demand;
    double level = std::isfinite(resource.level) ? resource.level : floor;
    for (size_t round = 0; round <= scratch_.size() + 2; ++round) {
        double below = 0, slope = 0;
        for (auto [limit, share] : scratch_) {
            below += limit <= level ? share * limit : 0.0;
            slope += limit <= level ? 0.0 : share;
        }
        double better = slope > 0 ? std::max(floor, (resource.capacity - below) / slope) : floor;
        if (std::abs(better - level) <= 1e-15 * level) return better;
        level = better;
    }
    return level;
}

// Puts the candidate level of r in force and suspects the resources on which this moves anything.
void Fluid::apply_level(int r) {
    resources_[r].level = resources_[r].filled;
    touch_resource(r);
    for (const Member &member : resources_[r].members) {
        Task &task = tasks_[member.task];
        double low = task.low, second = task.second;
        int lowest = task.lowest;
        lowest_levels(task);
        if (task.low != low || task.lowest != lowest) touch_task(member.task);
        for (const Use &use : task.uses) {
            int other = use.resource;
            if (other == r) continue;
            double before = std::min(task.cap, lowest == other ? second : low);
            double after = limit_elsewhere(task, other);
            if (before == after) continue;
            Resource &reached = resources_[other];
            reached.asked += (after - before) * use.demand;
            bool refilled = queue_at_[other] >= 0 && reached.fresh;
            double reach = refilled ? std::max(reached.level, reached.filled) : reached.level;
            if (std::min(before, after) < reach) suspect(other, std::min(before, after));
        }
    }
}

void Fluid::settle_levels() {
    while (!queue_.empty()) {
        int r = queue_.top().item;
        queue_.erase(queue_at_, r);
        Resource &resource = resources_[r];
        if (!resource.fresh) {
            resource.filled = fill(r);
            resource.fresh = true;
        }
        double old = resource.level, filled = resource.filled;
        if (old == filled || (std::isfinite(old) && std::abs(old - filled) <= kSameLevel * old)) continue;
        double key = std::min(old, filled);
        if (!queue_.empty() && queue_.top().key < key) {
            queue_.put(queue_at_, {key, r, r}); // what lies lower may still move it
        } else {
            apply_level(r);
        }
    }
}

void Fluid::settle_table() {
    std::vector<std::pair<int, int>> running;
    for (int r : touched_resources_) {
        running.clear();
        for (const Member &member : resources_[r].members) {
            running.emplace_back(tasks_[member.task].kind, member.task);
            touch_task(member.task);
        }
        std::sort(running.begin(), running.end());
        std::vector<int> kinds;
        for (auto [kind, task] : running) kinds.push_back(kind);
        auto row = rows_.find(kinds);
        if (row == rows_.end() && kinds.size() > 1) {
            std::string names;
            for (int kind : kinds) names += (names.empty() ? "" : ", ") + kinds_[kind];
            throw std::invalid_argument("co-run table: no row for (" + names + ")");
        }
        for (size_t i = 0; i < running.size(); ++i) {
            for (Use &use : tasks_[running[i].second].uses) {
                if (use.resource == r) use.factor = row == rows_.end() ? 1.0 : row->second[i];
            }
        }
    }
    for (int slot : touched_tasks_) {
        tasks_[slot].cap = 1.0;
        for (const Use &use : tasks_[slot].uses) tasks_[slot].cap = std::min(tasks_[slot].cap, use.factor);
    }
}

double Fluid::left(const Task &task) const {
    if (task.clock == kNowhere) return task.mark;
    if (task.clock == kOwn) return std::max(0.0, (task.mark - now_) * task.pace);
    return std::max(0.0, task.mark - clock_now(resources_[task.clock]));
}

// Moves the task to the clock that it must follow from now on.
void Fluid::follow(int slot) {
    Task &task = tasks_[slot];
    task.touched = false;
    if (task.id < 0) return;
    int clock = task.cap <= task.low ? kOwn : task.lowest;
    double pace = task.cap;
    if (clock == task.clock && (clock != kOwn || pace == task.pace)) return;

    double rest = left(task);
    if (task.clock >= 0) {
        resources_[task.clock].due.erase(due_at_, slot);
        touch_resource(task.clock);
    }
    task.clock = clock;
    int item = int(resources_.size()) + slot;
    if (clock == kOwn) {
        task.pace = pace;
        task.mark = now_ + rest / pace;
        agenda_.put(agenda_at_, {task.mark, task.id, item});
    } else {
        agenda_.erase(agenda_at_, item);
        Resource &resource = resources_[clock];
        task.mark = clock_now(resource) + rest;
        resource.due.put(due_at_, {task.mark, task.id, slot});
        touch_resource(clock);
    }
}

// Brings the clock of r up to date, sets it to the new level and books its next completion.
void Fluid::schedule(int r) {
    Resource &resource = resources_[r];
    resource.touched = false;
    resource.clock = resource.due.empty() ? 0.0 : clock_now(resource);
    resource.since = now_;
    resource.pace = resource.due.empty() ? 0.0 : resource.level;
    if (resource.due.empty()) {
        agenda_.erase(agenda_at_, r);
        return;
    }
    const auto &first = resource.due.top();
    double at = now_ + std::max(0.0, first.key - resource.clock) / resource.pace;
    agenda_.put(agenda_at_, {at, first.tie, r});
}

void Fluid::settle() {
    if (table_) {
        settle_table();
    } else {
        settle_levels();
    }
    for (size_t i = 0; i < touched_tasks_.size(); ++i) follow(touched_tasks_[i]);
    for (size_t i = 0; i < touched_resources_.size(); ++i) schedule(touched_resources_[i]);
    touched_tasks_.clear();
    touched_resources_.clear();
}

double Fluid::level_of(const Task &task) const {
    return task.clock == kOwn ? task.pace : resources_[task.clock].pace;
}

bool Fluid::next(Completion &completion) {
    settle();
    if (agenda_.empty()) return false;
    completion = {std::max(now_, agenda_.top().key), agenda_.top().tie};
    return true;
}

// All that end at this instant leave together, by id; the clocks stand still meanwhile.
void Fluid::take_finished(std::vector<int64_t> &finished) {
    while (!agenda_.empty() && agenda_.top().key <= now_) {
        int64_t id = agenda_.top().tie;
        int done = slot(id), clock = tasks_[done].clock;
        if (clock >= 0) { // by definition its clock reads its mark, free of rounding: equals end together
            resources_[clock].clock = tasks_[done].mark;
            resources_[clock].since = now_;
        }
        remove(done);
        finished.push_back(id);
        if (clock >= 0) schedule(clock);
    }
}

void Fluid::advance(double to, std::vector<int64_t> &finished) {
    Completion completion;
    while (next(completion) && completion.time <= to) {
        now_ = completion.time;
        take_finished(finished);
        if (now_ == to) return; // rates stay unsettled, so that what starts at this instant is settled with it
    }
    now_ = std::max(now_, to);
}

double Fluid::cancel(int64_t id) {
    settle();
    int gone = slot(id);
    double rest = left(tasks_[gone]) * tasks_[gone].scale;
    remove(gone);
    return rest;
}

double Fluid::rate(int64_t id) {
    settle();
    const Task &task = tasks_[slot(id)];
    return task.scale * level_of(task);
}

double Fluid::in_use(int resource) {
    settle();
    double sum = 0;
    for (const Member &member : resources_[resource].members) {
        sum += member.demand * level_of(tasks_[member.task]);
    }
    return sum;
}

} // namespace stretto

void bind_fluid(nb::module_ &m) {
    using stretto::Fluid;
    using Rows = std::vector<std::pair<std::vector<int>, std::vector<double>>>;
    nb::class_<Fluid>(m, "Fluid")
        .def(
            "__init__",
            [](Fluid *self, const std::vector<double> &capacity, const std::optional<Rows> &rows,
               std::vector<std::string> kinds) {
                stretto::CoRunRows table;
                if (rows) table.insert(rows->begin(), rows->end());
                new (self) Fluid(capacity, rows.has_value(), std::move(table), std::move(kinds));
            },
            nb::arg("capacity"), nb::arg("rows").none(), nb::arg("kinds"))
        .def("start", &Fluid::start, nb::arg("work"), nb::arg("use"), nb::arg("peak"), nb::arg("weight"),
             nb::arg("kind"))
        .def("next_completion",
             [](Fluid &self) -> std::optional<std::pair<double, int64_t>> {
                 Fluid::Completion completion;
                 if (!self.next(completion)) return std::nullopt;
                 return std::make_pair(completion.time, completion.id);
             })
        .def("advance",
             [](Fluid &self, double to) {
                 std::vector<int64_t> finished;
                 self.advance(to, finished);
                 return finished;
             })
        .def("cancel", &Fluid::cancel)
        .def("rate", &Fluid::rate)
        .def("in_use", &Fluid::in_use)
        .def_prop_ro("now", &Fluid::now)
        .def("__len__", &Fluid::active);
}
