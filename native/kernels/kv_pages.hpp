// Keys and values in 4 bits: a page of 64 positions of one KV head.
//
// Every channel of a page has a scale d and a minimum m of its own, fp16, for its keys and for its values, and stands for
// d * q + m (channel-wise groups, as COMET, Liu et al., ASPLOS 2025, has them). A page is made when its last position is written. A query
// reads the page of its own position, and none before, as it was written; so what it sees depends on its position alone.
//
// Bytes of a page: for each channel the keys of 32 bytes (position i in the low half of byte i, position 32 + i in the high one), then
// d and m of all channels; for each position its values of D / 2 bytes (channel i, and D / 2 + i), then d and m of all channels.
#pragma once

#include <cstdint>

namespace stretto {

constexpr int64_t kPagePositions = 64;

constexpr int64_t packed_keys_bytes(int64_t dim) { return kPagePositions / 2 * dim; }
constexpr int64_t packed_half_bytes(int64_t dim) { return packed_keys_bytes(dim) + 4 * dim; }
constexpr int64_t packed_page_bytes(int64_t dim) { return 2 * packed_half_bytes(dim); }

// Packs the keys or the values [64, dim] of a head; the same bytes at every level of instructions.
void pack_page(const float *from, int64_t dim, bool keys, uint8_t *to);
void pack_page(const uint16_t *from, int64_t dim, bool keys, uint8_t *to);

}  // namespace stretto
