// Loops over independent items on the OpenMP team that torch already has.
//
// For kernels that are called between torch's own operations: another team would fight torch's spinning helpers for the same cores,
// so the runtime that torch has loaded is called by name. Whole passes of the decoder, beside which torch rests, have a crew (crew.hpp). Where there is none (another compiler's runtime, no torch), the caller's thread does it all.
#pragma once

#include <dlfcn.h>

#include <atomic>
#include <cstdint>

namespace stretto {

// work(item) for each item in [0, items), on up to `threads` threads that take the next item when they are done with one. `work`
// must not throw.
template <typename Work>
void share(int threads, int64_t items, const Work &work) {
    using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
    static const Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    if (threads <= 1 || items <= 1 || parallel == nullptr) {
        for (int64_t item = 0; item < items; item++) work(item);
        return;
    }
    struct Loop {
        const Work &work;
        const int64_t items;
        std::atomic<int64_t> next{0};
    } loop{work, items};
    const auto take = [](void *data) {
        Loop &mine = *static_cast<Loop *>(data);
        for (int64_t item; (item = mine.next.fetch_add(1, std::memory_order_relaxed)) < mine.items;) mine.work(item);
    };
    parallel(take, &loop, static_cast<unsigned>(threads), 0);
}

}  // namespace stretto
