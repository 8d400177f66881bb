// How attention of any level finds its way through the pages of a cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention.hpp"
#include "kv_pages.hpp"
#include "simd.hpp"

using namespace stretto;

namespace {

constexpr int kBlock = kPagePositions;  // 64: positions whose scores are held at once, wherever pages end; a multiple of every number of lanes

using Call = AttentionCall;

// Asks for one token's DIM elements ahead of their use: runs are too short for the hardware to see them coming.
template <int DIM, typename T>
STRETTO_INLINE void fetch(const T *p) {
    for (int byte = 0; byte < static_cast<int>(DIM * sizeof(T)); byte += 64) __builtin_prefetch(reinterpret_cast<const char *>(p) + byte);
}

// Where the keys of `count` positions from `at` on of a row lie.
template <typename T, int DIM>
STRETTO_INLINE void find_keys(const Call &call, int64_t row, int64_t head, int64_t at, int count, const T **keys) {
    const int64_t *table = call.table + row * call.table_width;
    for (int i = 0; i < count;) {
        const int64_t offset = (at + i) % call.page_tokens, page = table[(at + i) / call.page_tokens];
        const int end = static_cast<int>(std::min<int64_t>(count, i + call.page_tokens - offset));
        const T *key = static_cast<const T *>(call.cache) + ((page * 2 * call.kv_heads + head) * call.page_tokens + offset) * DIM;
        for (; i < end; i++, key += DIM) keys[i] = key;
    }
}

// Where this thread reads keys after those before position `at`: further on in the row, or else at its next head's start.
template <typename T, int DIM>
STRETTO_INLINE const T *next_keys(const Call &call, const T *keys, int64_t row, int64_t head, int64_t at) {
    const int64_t *table = call.table + row * call.table_width;
    if (at >= call.length[row]) {
        at = 0;
        head++;
        if (head == call.kv_heads) {
            if (row + 1 == call.rows) return keys;
            head = 0;
            table += call.table_width;
        }
    }
    const int64_t offset = at % call.page_tokens, page = table[at / call.page_tokens];
    return static_cast<const T *>(call.cache) + ((page * 2 * call.kv_heads + head) * call.page_tokens + offset) * DIM;
}

template <typename T>
STRETTO_INLINE const T *queries_of(const Call &call, int64_t row) {
    return static_cast<const T *>(call.query) + row * call.row_stride;
}

template <typename T>
STRETTO_INLINE T *result_of(const Call &call, int64_t row) {
    return static_cast<T *>(call.out) + row * call.kv_heads * call.group * call.dim;
}

}  // namespace
