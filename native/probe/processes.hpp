// How long threads and processes take to hear from each other, and how steady this machine's time is.
#pragma once

#include <nanobind/nanobind.h>

#include <sys/mman.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstring>
#include <mutex>
#include <sched.h>
#include <stdexcept>
#include <thread>

namespace nb = nanobind;

namespace probe {

using Clock = std::chrono::steady_clock;

inline double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// The share of `seconds` of spinning during which this thread did not run: gaps over 20 microseconds between two looks at
// the clock.
inline double stolen_share(double seconds) {
    const auto start = Clock::now();
    double last = 0.0, lost = 0.0;
    while (last < seconds) {
        const double now = since(start);
        if (now - last > 20e-6) { lost += now - last; }
        last = now;
    }
    return lost / last;
}

// Seconds from notifying a thread that sleeps on a condition variable until it runs; the mean over `rounds` there and back.
inline double wake(int rounds) {
    std::mutex mutex;
    std::condition_variable heard;
    int turn = 0;
    const auto play = [&](int own) {
        for (int round = 0; round < rounds; ++round) {
            std::unique_lock<std::mutex> lock(mutex);
            heard.wait(lock, [&] { return turn == own; });
            turn = 1 - own;
            lock.unlock();
            heard.notify_one();
        }
    };
    const auto start = Clock::now();
    std::thread other(play, 1);
    play(0);
    other.join();
    return since(start) / (2.0 * rounds);
}

struct Mailbox {
    std::atomic<int> turn; // 0: the parent's, 1: the child's
};

// Waits for a turn; yields, as two processes may share a core. False when the deadline has passed.
inline bool await(Mailbox &box, int turn, Clock::time_point start, double limit) {
    for (unsigned spins = 0; box.turn.load(std::memory_order_acquire) != turn; ++spins) {
        if (spins % 64 == 63) {
            sched_yield();
            if (since(start) > limit) { return false; }
        }
    }
    return true;
}

// One message between processes: the parent copies `bytes` into shared memory, the child copies them out and answers
// likewise. Returns mean seconds of one way, or throws when `limit` seconds have passed.
inline double shared_message(size_t bytes, int rounds, double limit) {
    constexpr size_t kHead = 4096;
    void *memory = mmap(nullptr, kHead + 3 * bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) { throw std::runtime_error("no shared memory for a message between processes"); }
    auto *box = new (memory) Mailbox{};
    char *shared = static_cast<char *>(memory) + kHead, *mine = shared + bytes, *theirs = mine + bytes;
    std::memset(shared, 1, 3 * bytes);

    const auto start = Clock::now();
    const pid_t child = fork();
    if (child < 0) {
        munmap(memory, kHead + 3 * bytes);
        throw std::runtime_error("no second process can be started");
    }
    // The child of a threaded process may use nothing that takes a lock: atomics, memcpy and _exit alone.
    if (child == 0) {
        for (int round = 0; round <= rounds; ++round) {
            if (!await(*box, 1, start, limit)) { _exit(1); }
            std::memcpy(theirs, shared, bytes);
            std::memcpy(shared, theirs, bytes);
            box->turn.store(0, std::memory_order_release);
        }
        _exit(0);
    }
    auto warm = start;
    bool alive = true;
    for (int round = 0; round <= rounds && alive; ++round) {
        if (round == 1) { warm = Clock::now(); }
        std::memcpy(shared, mine, bytes);
        box->turn.store(1, std::memory_order_release);
        alive = await(*box, 0, start, limit);
        std::memcpy(mine, shared, bytes);
    }
    const double seconds = since(warm) / (2.0 * rounds);
    if (!alive) { kill(child, SIGKILL); }
    waitpid(child, nullptr, 0);
    munmap(memory, kHead + 3 * bytes);
    if (!alive) { throw std::runtime_error("a message between processes took longer than its time limit"); }
    return seconds;
}

} // namespace probe
