// Threads that walk through a pass together, of which none is waited for.
//
// An OpenMP region ends when all of its threads have come to its end, so one that another process has put off its core costs
// a time slice at the end of every pass. Here the caller goes on when the work is done: a helper that comes late finds nothing left to
// take, and leaves. What it looks at meanwhile is kept alive by its own reference.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>

#include "stretch.hpp"

namespace stretto {

class Walk {
  public:
    virtual ~Walk() = default;
    // Returns when there is nothing left to do. The part of thread 0 returns only when all work of all threads is done.
    virtual void walk(int thread, int threads) = 0;
};

class Crew {
  public:
    static constexpr int kCrews = 2;  // passes that may be under way at once

    // One of the process's own; they are never taken apart, since their threads may be anywhere when the process ends.
    static Crew &get(int number) {
        static Crew *crews = new Crew[kCrews];
        return crews[number];
    }

    // The caller's part of `walk` as thread 0, with up to `threads` - 1 helpers.
    void go(int threads, const std::shared_ptr<Walk> &walk) {
        std::lock_guard<std::mutex> one_at_a_time(turn_);
        if (threads > 1) {
            std::lock_guard<std::mutex> lock(mutex_);
            for (; helpers_ < threads - 1; helpers_++) std::thread(&Crew::serve, this, helpers_ + 1).detach();
            walk_ = walk;
            threads_ = threads;
            news_.fetch_add(1, std::memory_order_release);
        }
        if (threads > 1 && sleepers_.load(std::memory_order_acquire)) wake_.notify_all();
        const Over over{*this};
        walk->walk(0, threads);
    }

  private:
    // Lets go of a pass, also of one that threw.
    struct Over {
        Crew &crew;
        ~Over() {
            std::lock_guard<std::mutex> lock(crew.mutex_);
            crew.walk_.reset();
        }
    };

    static constexpr double kAwake = 1e-3;  // seconds that a helper looks for the next pass before it sleeps

    void serve(int number) {
        for (uint64_t seen = 0;;) {
            await(seen);
            std::shared_ptr<Walk> walk;
            int threads;
            {
                std::lock_guard<std::mutex> lock(mutex_);
                seen = news_.load(std::memory_order_relaxed);
                walk = walk_;
                threads = threads_;
            }
            if (walk && number < threads) walk->walk(number, threads);
        }
    }

    // Until there is a pass that was not seen before.
    void await(uint64_t seen) {
        const double since = seconds_now();
        for (int turn = 0; news_.load(std::memory_order_acquire) == seen; turn++) {
            if (turn % 64 || seconds_now() - since < kAwake) {
#if defined(__x86_64__)
                __builtin_ia32_pause();
#endif
                continue;
            }
            std::unique_lock<std::mutex> lock(mutex_);
            sleepers_++;
            wake_.wait(lock, [&] { return news_.load(std::memory_order_relaxed) != seen; });
            sleepers_--;
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_;
    std::shared_ptr<Walk> walk_;
    int threads_ = 0, helpers_ = 0;
    std::atomic<uint64_t> news_{0};
    std::atomic<int> sleepers_{0};
};

}  // namespace stretto
