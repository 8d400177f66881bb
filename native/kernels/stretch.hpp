// Work that the threads of a team share, stretch after stretch.
#pragma once

#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstdint>

namespace stretto {

constexpr int kMostThreads = 64;
constexpr int kSpins = 2'000;  // turns of waiting before the processor is offered to others

inline double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// One stretch of work that threads share, after which the next may begin. Each thread has items of its own, so that the same
// weights come to the same core in every pass, and helps the others when it is done. The stretch is over when its items are, not when
// every thread has come: one that another process has put off its core finds them done and hurries after the others.
class Stretch {
  public:
    template <typename Work>
    void work(int thread, int threads, int64_t items, const Work &work) {
        int64_t done = 0;
        for (int k = 0; k < threads; k++) {
            const int owner = thread + k < threads ? thread + k : thread + k - threads;
            const int64_t first = items * owner / threads, count = items * (owner + 1) / threads - first;
            for (int64_t i; (i = next_[owner].fetch_add(1, std::memory_order_relaxed)) < count; done++) work(first + i);
        }
        if (done && done_.fetch_add(done, std::memory_order_acq_rel) + done == items) finished = seconds_now();
        for (int spins = 0; done_.load(std::memory_order_acquire) < items; spins++) {
            if (spins < kSpins) {
#if defined(__x86_64__)
                __builtin_ia32_pause();
#endif
            } else {
                sched_yield();
            }
        }
    }

    void clear(int threads) {
        for (int t = 0; t < threads; t++) next_[t].store(0, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
    }

    double finished = 0.0;  // when its last item was done

  private:
    std::atomic<int64_t> next_[kMostThreads];
    alignas(64) std::atomic<int64_t> done_;
};

}  // namespace stretto
