// Loops that measure arithmetic and memory, each at three levels that are picked at run time: plain, avx2 and avx512
// (with VNNI and BF16). A tile is kRows by kColumns accumulators over an inner dimension: C += A^T B, where A is packed
// [inner][kRows] and B [inner][kColumns] (with 2 or 4 inner steps side by side for bf16 and int8), the loop at the heart
// of every matrix product. Accumulators stay in registers, so a tile runs at the peak as long as A and B are in a cache.
// Where there is AMX, bf16 and int8 have a larger tile beside these, kAmxSide squared, for which A is [kAmxSide][inner].
#pragma once

#include <cstddef>
#include <cstdint>

namespace probe {

constexpr int kRows = 6;
constexpr int kColumns = 32;

enum class Level { plain = 0, avx2 = 1, avx512 = 2 };

// The highest level that this machine runs.
Level best_level();

uint64_t read_words(Level level, const uint64_t *words, size_t count); // the sum, modulo 2^64
void copy_words(Level level, const uint64_t *from, uint64_t *to, size_t count);
void tile_fp32(Level level, const float *a, const float *b, size_t inner, float *c);
void tile_bf16(Level level, const uint16_t *a, const uint16_t *b, size_t inner, float *c);  // inner a multiple of 2
void tile_int8(Level level, const uint8_t *a, const int8_t *b, size_t inner, int32_t *c);   // inner a multiple of 4

constexpr int kAmxSide = 32;

bool has_amx();
void amx_bf16(const uint16_t *a, const uint16_t *b, size_t inner, float *c, int repeats);  // inner a multiple of 32
void amx_int8(const uint8_t *a, const int8_t *b, size_t inner, int32_t *c, int repeats);   // inner a multiple of 64

} // namespace probe
