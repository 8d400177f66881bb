// Work that the threads of a team share, stretch after stretch.
#pragma once

#include <sched.h>
#include <time.h>

#include <atomic>
#include <chrono>
#include <cstdint>

namespace stretto {

constexpr int kMostThreads = 64;
constexpr int kSpins = 2'000;     // turns of waiting before the processor is offered to others
constexpr double kYielding = 3e-4;  // seconds of offering it before sleeping: no item of a pass that is let be takes so long

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
        if (done) done_.fetch_add(done, std::memory_order_acq_rel);
        wait(items);
        if (thread == 0) finished = seconds_now();
    }

    void clear(int threads) {
        for (int t = 0; t < threads; t++) next_[t].store(0, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
    }

    double finished = 0.0;  // when thread 0, which alone writes and reads it, found its last item done

  private:
    // Who waits long waits for a thread that another process has put off its core. Only a core that goes idle takes that
    // thread over; one that spins, or offers itself, lets it wait for its next time slice.
    void wait(int64_t items) const {
        int spins = 0;
        double since = 0.0;
        while (done_.load(std::memory_order_acquire) < items) {
            if (spins < kSpins) {
                spins++;
#if defined(__x86_64__)
                __builtin_ia32_pause();
#endif
                continue;
            }
            if (since == 0.0) since = seconds_now();
            if (seconds_now() - since < kYielding) {
                sched_yield();
            } else {
                const timespec nap{0, 100000};
                nanosleep(&nap, nullptr);
            }
        }
    }

    std::atomic<int64_t> next_[kMostThreads];
    alignas(64) std::atomic<int64_t> done_;
};

}  // namespace stretto
