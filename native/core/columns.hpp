// Columns of millions of rows, on huge pages where the system has them: first touching small ones costs half the pass.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace stretto {

template <typename T> struct HugePages {
    using value_type = T;
    HugePages() = default;
    template <typename U> HugePages(const HugePages<U> &) {}

    T *allocate(size_t count) {
        constexpr size_t page = size_t(2) << 20;
        size_t bytes = count * sizeof(T), align = bytes >= page ? page : alignof(std::max_align_t);
        void *at = std::aligned_alloc(align, (bytes + align - 1) / align * align);
        if (!at) throw std::bad_alloc();
#ifdef __linux__
        if (align == page) madvise(at, bytes, MADV_HUGEPAGE); // a hint: it may fail
#endif
        return static_cast<T *>(at);
    }
    void deallocate(T *at, size_t) { std::free(at); }
    // Numbers start out as they are found: a column that is written whole need not be cleared first.
    template <typename U> void construct(U *at) noexcept { ::new (static_cast<void *>(at)) U; }
    template <typename U, typename... Args> void construct(U *at, Args &&...args) {
        ::new (static_cast<void *>(at)) U(std::forward<Args>(args)...);
    }
    template <typename U> bool operator==(const HugePages<U> &) const { return true; }
    template <typename U> bool operator!=(const HugePages<U> &) const { return false; }
};

template <typename T> using Column = std::vector<T, HugePages<T>>;

} // namespace stretto
