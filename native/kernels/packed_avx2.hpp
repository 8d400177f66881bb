// What products of both kinds by AVX2 share; for x86-64 alone.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "levels.hpp"
#include "packed.hpp"

namespace stretto {

#define STRETTO_INLINE_AVX2 __attribute__((target("avx2,fma,f16c"), always_inline))

using Eight = __m256;
constexpr int kHalves = 2;    // of a panel: eight columns each, which are the lanes of a vector
constexpr int kAsked = 1024;  // bytes of weights that are asked for ahead of their use

// A panel of weights, and where its columns' results go.
struct PanelColumns {
    const uint8_t *panel;
    const float *units;  // of columns on grids
    float *out;
    int64_t stride, width;
    bool add;
};

// All rows by panels [first, last), Tile::kTall of them at once.
template <typename Tile>
STRETTO_TARGET_AVX2 void multiply_panels(const Rows &rows, const Packed &w, int64_t first, int64_t last, float *out, int64_t stride, bool add) {
    constexpr int kTall = Tile::kTall;
    static_assert(kTall == 1 || kTall == 2 || kTall == 4);
    for (int64_t panel = first; panel < last; panel++) {
        const PanelColumns columns{w.data + panel * w.panel_bytes(), w.units ? w.units + panel * kPanel : nullptr, out + panel * kPanel, stride,
                                   w.columns - panel * kPanel, add};
        int64_t r = 0;
        for (; r + kTall <= rows.count; r += kTall) Tile::template run<kTall>(rows, r, w, columns);
        if constexpr (kTall > 2) {
            if (r + 2 <= rows.count) Tile::template run<2>(rows, r, w, columns), r += 2;
        }
        if constexpr (kTall > 1) {
            if (r < rows.count) Tile::template run<1>(rows, r, w, columns);
        }
    }
}

// Four neighbouring bytes of a row, for every column.
STRETTO_TARGET_AVX2 inline __m256i four(const int8_t *bytes) {
    int32_t x;
    std::memcpy(&x, bytes, sizeof x);
    return _mm256_set1_epi32(x);
}

// Adds the products of a piece: R rows in PLANES digits, `to_plane` bytes apart, by H halves of a panel from number `half` on.
//
// Two products of bytes are added in 16 bits, so each column has two sums, which the caller adds up. They hold a piece's: 32 weights of 4
// bits, or halves of weights of 8, which have sums of their own, times digits of 8 bits.
template <int R, int H, int PLANES, int BITS>
STRETTO_INLINE_AVX2 inline void add_piece(const int8_t *const (&digits)[R], int64_t to_plane, const uint8_t *at, int half,
                                          __m256i (&sum)[R][H][PLANES][BITS / 4]) {
    constexpr int kElements = BITS == 4 ? 8 : 4, kLast = BITS / 4 - 1;  // elements of a column in 64 bytes
#pragma GCC unroll 1
    for (int k = 0; k < 32; k += kElements, at += 64) {
        if (H == kHalves || half == 0) _mm_prefetch(reinterpret_cast<const char *>(at) + kAsked, _MM_HINT_T0);
        __m256i low[H], high[H];
#pragma GCC unroll 2
        for (int h = 0; h < H; h++) {
            const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(at) + half + h), fifteen = _mm256_set1_epi8(15);
            low[h] = _mm256_and_si256(bytes, fifteen);
            high[h] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), fifteen);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
#pragma GCC unroll 3
            for (int p = 0; p < PLANES; p++) {
                const int8_t *x = digits[r] + p * to_plane + k;
                const __m256i near = four(x), far = BITS == 4 ? four(x + 4) : near;
#pragma GCC unroll 2
                for (int h = 0; h < H; h++) {
                    sum[r][h][p][0] = _mm256_add_epi16(sum[r][h][p][0], _mm256_maddubs_epi16(low[h], near));
                    sum[r][h][p][kLast] = _mm256_add_epi16(sum[r][h][p][kLast], _mm256_maddubs_epi16(high[h], far));
                }
            }
        }
    }
}

// Eight elements from number `from` on, zeros behind the row's end.
STRETTO_TARGET_AVX2 inline Eight some(const float *x, int64_t from, int64_t length) {
    const int64_t left = length - from;
    if (left >= 8) return _mm256_loadu_ps(x + from);
    if (left <= 0) return _mm256_setzero_ps();
    const __m256i inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(left)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return _mm256_maskload_ps(x + from, inside);
}

// The largest magnitude of elements [from, to), infinity if one of them is not finite.
STRETTO_TARGET_AVX2 inline float largest_of(const float *x, int64_t from, int64_t to, int64_t length) {
    const Eight magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF)), infinity = _mm256_set1_ps(std::numeric_limits<float>::infinity());
    Eight top = _mm256_setzero_ps(), wrong = _mm256_setzero_ps();
    for (int64_t k = from; k < to; k += 8) {
        const Eight size = _mm256_and_ps(some(x, k, length), magnitude);
        wrong = _mm256_or_ps(wrong, _mm256_cmp_ps(size, infinity, _CMP_NLT_UQ));
        top = _mm256_max_ps(top, size);
    }
    if (_mm256_movemask_ps(wrong)) return std::numeric_limits<float>::infinity();
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps(top, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}

// 32 whole numbers, each of which a byte can hold.
STRETTO_TARGET_AVX2 inline void store_bytes(int8_t *to, const __m256i (&q)[4]) {
    const __m256i mixed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    const __m256i bytes = _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), bytes);
}

// The first `width` of eight columns of a row's result, and what lies there.
STRETTO_TARGET_AVX2 inline void put_eight(Eight total, float *to, int64_t width) {
    if (width >= 8) return _mm256_storeu_ps(to, total);
    alignas(32) float all[8];
    _mm256_store_ps(all, total);
    for (int64_t c = 0; c < width; c++) to[c] = all[c];
}
STRETTO_TARGET_AVX2 inline Eight take_eight(const float *from, int64_t width) { return some(from, 0, width); }

}  // namespace stretto
