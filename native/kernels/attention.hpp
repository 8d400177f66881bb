// Attention over a paged KV cache, for whoever runs it KV head by KV head, a few rows at a time.
#pragma once

#include <cstdint>
#include <string>

namespace stretto {

struct AttentionCall {
    const void *query;     // [rows, heads, D], `row_stride` elements from row to row
    int64_t row_stride;
    const void *cache;     // [pages, 2 * kv_heads, page_tokens, D]: key heads of a page, then its value heads
    const int64_t *table;  // [rows, table_width]
    int64_t table_width;
    const int64_t *length;  // [rows], at least 1
    void *out;              // [rows, heads, D]
    int64_t rows, kv_heads, group, page_tokens, dim;
    bool is_bf16;
    // A cache in 4 bits (see kv_pages.hpp): `cache` holds full pages alone, and what is newer lies in open ones, as above; null and
    // null for a cache as above.
    const void *open = nullptr;           // [open pages, 2 * kv_heads, page_tokens, D]
    const int64_t *open_table = nullptr;  // [rows, table_width]; only those of pages that are not full are looked at
};

constexpr int64_t kNeighbours = 8;  // rows that one call takes at most, unless it is one of tiles
constexpr int64_t kTileNeighbours = 16;

// One KV head of `count` rows from `row` on, which are neighbouring positions of one text: all of them read the block table of the last.
using AttendHead = void (*)(const AttentionCall &, int64_t row, int64_t count, int64_t head);

// The kernels of each level.
extern const AttendHead kAttendPlain;
#if defined(__x86_64__)
extern const AttendHead kAttendAmx, kAttendAvx512Bf16, kAttendAvx512, kAttendAvx2;
#endif

// The kernel of a level of instructions; throws as require_level.
AttendHead attention_kernel(const std::string &level);

// Whether level "amx" has tiles for such heads; it does the others as level "avx512".
inline bool attention_by_tiles(int64_t dim, bool is_bf16, bool packed) { return is_bf16 && !packed && dim % 32 == 0; }

// Whether there is a kernel for heads of this width, over a cache in 4 bits if `packed`.
bool attention_has(int64_t dim, bool packed);

}  // namespace stretto
