// Memory that grows and is kept from call to call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace stretto {

struct Free {
    void operator()(void *p) const { std::free(p); }
};

template <typename T>
struct Buffer {
    std::unique_ptr<T[], Free> held;
    int64_t size = 0;

    T *get(int64_t count) {
        if (count > size) {
            const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
            size = 0;
            held.reset(static_cast<T *>(std::aligned_alloc(64, bytes)));
            if (!held) throw std::bad_alloc();
            size = count;
        }
        return held.get();
    }
};

}  // namespace stretto
