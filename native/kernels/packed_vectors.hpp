// What the AVX-512 and AMX levels of packed products share; for x86-64 alone.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "packed_grid.hpp"

namespace stretto {

#define STRETTO_AVX512_BF16 "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,f16c,fma"
#define STRETTO_TARGET_BF16 __attribute__((target(STRETTO_AVX512_BF16)))
#define STRETTO_INLINE_BF16 __attribute__((target(STRETTO_AVX512_BF16), always_inline))

using Lanes = __m512;

// One panel's numbers of a group, from fp16.
STRETTO_TARGET_BF16 inline Lanes halves(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}

template <int BITS, bool MINIMUM>
STRETTO_TARGET_BF16 inline Lanes minimum_of(const uint16_t *d, Lanes scale) {
    if constexpr (MINIMUM) return halves(d + kPanel);
    return _mm512_mul_ps(scale, _mm512_set1_ps(BITS == 4 ? -8.0f : -128.0f));
}

// What the sums of planes of whole numbers stand for together.
template <int PLANES>
STRETTO_TARGET_BF16 inline Lanes together(const __m512i (&sums)[PLANES]) {
    const Lanes first = _mm512_cvtepi32_ps(sums[0]);
    if constexpr (PLANES == 1) return first;
    if constexpr (PLANES == 2) return _mm512_fmadd_ps(first, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(sums[1]));
    if constexpr (PLANES == 3) {
        const Lanes rest = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[1]), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(sums[2]));
        return _mm512_fmadd_ps(first, _mm512_set1_ps(65536.0f), rest);
    }
}

// total + what a group adds to it: `whole`, the sum of its products, with the scales and minima of sixteen columns and the scale and sum
// of the row's own group. All levels, the plain one too, do this in one order, so that their results are the same to the last bit.
STRETTO_TARGET_BF16 inline Lanes add_group(Lanes total, Lanes whole, Lanes scale, Lanes minimum, float row_scale, float row_sum) {
    total = _mm512_fmadd_ps(scale, _mm512_mul_ps(whole, _mm512_set1_ps(row_scale)), total);
    return _mm512_fmadd_ps(minimum, _mm512_set1_ps(row_sum), total);
}

// What the sums of low and of high digits of a row on a grid stand for together.
STRETTO_TARGET_BF16 inline Lanes grid_together(__m512i low, __m512i high) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(kBase), _mm512_cvtepi32_ps(low));
}

// The first `width` of sixteen columns of such a row's result, from its sums and the units of row and columns.
STRETTO_TARGET_BF16 inline void put_grid(Lanes total, float unit, const float *units, float *to, int64_t width, bool add) {
    const Lanes scaled = _mm512_mul_ps(total, _mm512_set1_ps(unit));
    if (width >= kPanel) {
        const Lanes before = add ? _mm512_loadu_ps(to) : _mm512_setzero_ps();
        return _mm512_storeu_ps(to, _mm512_fmadd_ps(scaled, _mm512_loadu_ps(units), before));
    }
    const __mmask16 mask = __mmask16((1u << width) - 1);
    const Lanes before = add ? _mm512_maskz_loadu_ps(mask, to) : _mm512_setzero_ps();
    _mm512_mask_storeu_ps(to, mask, _mm512_fmadd_ps(scaled, _mm512_loadu_ps(units), before));
}

// Some panels of weights, and where their columns' results go.
struct Columns {
    const uint8_t *panels[4];
    const float *units;  // of columns on grids
    float *out;
    int64_t stride, width;
    bool add;
};

// Bytes of weights that are asked for ahead of their use: of each of four panels at once as many as the nearest cache can wait for; of
// one or two, which would leave the memory idle, further away and into the cache behind it.
template <int C>
constexpr int kAhead = C == 4 ? 1536 : 16384;
template <int C>
constexpr _mm_hint kWhere = C == 4 ? _MM_HINT_T0 : _MM_HINT_T1;

// Rows by panels [first, last) with Tiles::run<R, C>: a block of rows at once, so that weights are unpacked once for it; for few rows,
// several panels, so that enough sums are under way. `tallest` rows, 6 or 8, make a block.
template <typename Tiles>
STRETTO_TARGET_BF16 void multiply_blocks(const Rows &rows, int64_t tallest, const Packed &w, int64_t first, int64_t last, float *out,
                                         int64_t stride, bool add) {
    for (int64_t panel = first, wide; panel < last; panel += wide) {
        wide = rows.count == 1 && last - panel >= 4 ? 4 : rows.count < 4 && last - panel >= 2 ? 2 : 1;
        Columns columns{{}, w.units ? w.units + panel * kPanel : nullptr, out + panel * kPanel, stride, w.columns - panel * kPanel, add};
        for (int c = 0; c < wide; c++) columns.panels[c] = w.data + (panel + c) * w.panel_bytes();
        for (int64_t r = 0, tall; r < rows.count; r += tall) {
            const int64_t rest = rows.count - r;
            tall = wide == 4 ? 1 : wide == 2 ? std::min<int64_t>(2, rest) : rest >= tallest ? tallest : rest >= 4 ? 4 : std::min<int64_t>(2, rest);
            if (wide == 1 && tallest == 6 && rest == 8) tall = 4;
            const auto run = tall == 8   ? Tiles::template run<8, 1>
                             : tall == 6 ? Tiles::template run<6, 1>
                             : tall == 4 ? Tiles::template run<4, 1>
                             : tall == 2 ? (wide == 2 ? Tiles::template run<2, 2> : Tiles::template run<2, 1>)
                             : wide == 4 ? Tiles::template run<1, 4>
                             : wide == 2 ? Tiles::template run<1, 2>
                                         : Tiles::template run<1, 1>;
            run(rows, r, w, columns);
        }
    }
}

// The first `width` of sixteen columns of a row's result.
STRETTO_TARGET_BF16 inline void put(Lanes total, float *to, int64_t width, bool add) {
    const __mmask16 mask = width >= kPanel ? 0xFFFF : __mmask16((1u << width) - 1);
    const Lanes before = add ? _mm512_maskz_loadu_ps(mask, to) : _mm512_setzero_ps();
    _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(before, total));
}

}  // namespace stretto
