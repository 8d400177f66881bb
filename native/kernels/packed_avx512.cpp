// Packed products by AVX-512 with VNNI and BF16.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "packed.hpp"
#include "packed_rows.hpp"
#include "packed_vectors.hpp"

namespace stretto {

namespace {

STRETTO_TARGET_BF16 inline Lanes widened(__m256i halves) {
    return reinterpret_cast<Lanes>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Sixteen elements from number `from` on, zeros behind the row's end.
STRETTO_TARGET_BF16 inline Lanes some(const float *x, int64_t from, int64_t length) {
    const int64_t left = length - from;
    const __mmask16 mask = left >= 16 ? 0xFFFF : left <= 0 ? 0 : __mmask16((1u << left) - 1);
    return _mm512_maskz_loadu_ps(mask, x + from);
}

// Sixteen values as bf16, to where they lie within four neighbours.
STRETTO_TARGET_BF16 inline __m256i store_halves(uint16_t *to, Lanes values) {
    const __m256i order = _mm256_set_epi16(15, 13, 14, 12, 11, 9, 10, 8, 7, 5, 6, 4, 3, 1, 2, 0);
    const __m256i halves = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), _mm256_permutexvar_epi16(order, halves));
    return halves;
}

STRETTO_TARGET_BF16 void prepare_parts(const Rows &rows, int64_t r, const float *x, int64_t length) {
    uint16_t *to = reinterpret_cast<uint16_t *>(rows.values(r));
    for (int64_t k = 0; k < rows.inner; k += 16) {
        Lanes rest = some(x, k, length);
        for (int plane = 0; plane < rows.planes; plane++) {
            rest = _mm512_sub_ps(rest, widened(store_halves(to + plane * rows.inner + k, rest)));
        }
    }
}

// Sixteen whole numbers, elements `from` and on, as digits of 12 bits.
STRETTO_TARGET_BF16 inline void store_twelves(uint8_t *bytes, int twelves, int64_t from, __m512i q) {
    uint8_t *to = bytes + from / 32 * 64 * twelves + from % 32;
    for (int t = twelves - 1; t >= 0; t--) {
        const __m512i digit = _mm512_srai_epi32(_mm512_slli_epi32(q, 20), 20);
        const __m512i rest = _mm512_and_si512(digit, _mm512_set1_epi32(15));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(to + 64 * t), _mm512_cvtepi32_epi8(_mm512_srai_epi32(digit, 4)));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(to + 64 * t + 32), _mm512_cvtepi32_epi8(rest));
        q = _mm512_srai_epi32(_mm512_sub_epi32(q, digit), 12);
    }
}

constexpr int kNarrow = 16 * 128;  // numbers of 24 bits of which 16 lanes of 32 bits hold the sums

// Sums of 64 bits, and on them those of 32.
STRETTO_TARGET_BF16 __m512i widened(__m512i wide, __m512i sum) {
    const __m512i low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(sum));
    const __m512i high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(sum, 1));
    return _mm512_add_epi64(wide, _mm512_add_epi64(low, high));
}

// Whole numbers come out as in prepare_plain.
STRETTO_TARGET_BF16 void prepare_avx512(const Rows &rows, int64_t r, const float *x, int64_t length) {
    if (rows.grid) return prepare_grid_avx512(rows, r, x, length);
    x = sorted(rows, x, length);
    if (!rows.whole) return prepare_parts(rows, r, x, length);
    float *numbers = rows.numbers(r);
    uint8_t *bytes = rows.values(r);
    const int group = rows.group;
    for (int64_t g = 0; g < rows.groups(); g++) {
        const int64_t first = g * group;
        Lanes top = _mm512_setzero_ps();
        __mmask16 wrong = 0;
        for (int i = 0; i < group; i += 16) {
            const Lanes value = _mm512_abs_ps(some(x, first + i, length));
            wrong |= _mm512_cmp_ps_mask(value, _mm512_set1_ps(std::numeric_limits<float>::infinity()), _CMP_NLT_UQ);
            top = _mm512_max_ps(top, value);
        }
        const float most = wrong ? std::numeric_limits<float>::infinity() : _mm512_reduce_max_ps(top);
        const Scale of(most, rows.largest(g));
        __m512i sum = _mm512_setzero_si512(), wide = _mm512_setzero_si512();  // of 32 and of 64 bits
        for (int i = 0; i < group; i += 16) {
            if (i % kNarrow == 0) wide = widened(wide, sum), sum = _mm512_setzero_si512();
            const Lanes value = some(x, first + i, length);
            const Lanes scaled = of.inverse == 0.0f ? _mm512_setzero_ps() : _mm512_mul_ps(value, _mm512_set1_ps(of.inverse));
            __m512i q = _mm512_cvtps_epi32(scaled);
            sum = _mm512_add_epi32(sum, q);
            if (rows.twelves) {
                store_twelves(bytes, rows.twelves, first + i, q);
                continue;
            }
            for (int plane = rows.planes - 1; plane >= 0; plane--) {
                const __m128i digit = _mm512_cvtepi32_epi8(q);
                _mm_storeu_si128(reinterpret_cast<__m128i *>(bytes + plane * rows.inner + first + i), digit);
                q = _mm512_srai_epi32(_mm512_sub_epi32(q, _mm512_cvtepi8_epi32(digit)), 8);
            }
        }
        numbers[2 * g * rows.tall] = of.scale;
        numbers[(2 * g + 1) * rows.tall] = of.scale * float(_mm512_reduce_add_epi64(widened(wide, sum)));
    }
}

// R rows from `first` on by C panels, activations in PLANES bytes an element: whole numbers inside a group.
template <int R, int C, int BITS, bool MINIMUM, int PLANES>
STRETTO_TARGET_BF16 void tile_bytes(const Rows &rows, int64_t first, const Packed &w, const Columns &columns) {
    const __m512i fifteen = _mm512_set1_epi8(15);
    constexpr int kStep = BITS == 4 ? 8 : 4;  // inner elements of 64 bytes
    const int64_t group_bytes = w.group_bytes(), inner = w.inner;
    const int8_t *bytes_of[R];
    const float *numbers[R];
    Lanes total[R][C];
    for (int r = 0; r < R; r++) {
        bytes_of[r] = rows.bytes_of(first + r);
        numbers[r] = rows.numbers(first + r);
        for (int c = 0; c < C; c++) total[r][c] = _mm512_setzero_ps();
    }
    for (int64_t g = 0; g < w.groups(); g++) {
        __m512i sum[R][C][PLANES];
        for (int r = 0; r < R; r++) {
            for (int c = 0; c < C; c++) {
                for (int p = 0; p < PLANES; p++) sum[r][c][p] = _mm512_setzero_si512();
            }
        }
        for (int k = 0; k < w.group; k += kStep) {
            for (int c = 0; c < C; c++) {
                const uint8_t *at = columns.panels[c] + g * group_bytes + kPanel * 2 * (MINIMUM ? 2 : 1) + k / kStep * 64;
                const __m512i bytes = _mm512_loadu_si512(at);
                _mm_prefetch(reinterpret_cast<const char *>(at) + kAhead<C>, kWhere<C>);
                const __m512i q0 = BITS == 4 ? _mm512_and_si512(bytes, fifteen) : bytes;
                const __m512i q1 = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), fifteen);
                for (int r = 0; r < R; r++) {
                    for (int p = 0; p < PLANES; p++) {
                        int32_t x[2];
                        std::memcpy(x, bytes_of[r] + p * inner + g * w.group + k, BITS == 4 ? 8 : 4);
                        sum[r][c][p] = _mm512_dpbusd_epi32(sum[r][c][p], q0, _mm512_set1_epi32(x[0]));
                        if constexpr (BITS == 4) sum[r][c][p] = _mm512_dpbusd_epi32(sum[r][c][p], q1, _mm512_set1_epi32(x[1]));
                    }
                }
            }
        }
        for (int c = 0; c < C; c++) {
            const uint16_t *d = reinterpret_cast<const uint16_t *>(columns.panels[c] + g * group_bytes);
            const Lanes scale = halves(d), minimum = minimum_of<BITS, MINIMUM>(d, scale);
            for (int r = 0; r < R; r++) {
                const float *of_group = numbers[r] + 2 * g * rows.tall;
                total[r][c] = add_group(total[r][c], together(sum[r][c]), scale, minimum, of_group[0], of_group[rows.tall]);
            }
        }
    }
    for (int c = 0; c < C; c++) {
        for (int r = 0; r < R; r++) {
            put(total[r][c], columns.out + (first + r) * columns.stride + c * kPanel, columns.width - c * kPanel, columns.add);
        }
    }
}

// R rows in PARTS bf16 numbers an element by C panels of bf16 weights: one chain a part.
template <int R, int C, int PARTS>
STRETTO_TARGET_BF16 void tile_numbers(const Rows &rows, int64_t first, const Packed &w, const Columns &columns) {
    const uint16_t *halves_of[R];
    Lanes sum[PARTS][R][C];
    for (int r = 0; r < R; r++) {
        halves_of[r] = rows.halves_of(first + r);
        for (int p = 0; p < PARTS; p++) {
            for (int c = 0; c < C; c++) sum[p][r][c] = _mm512_setzero_ps();
        }
    }
    for (int64_t k = 0; k < w.inner; k += 2) {
        for (int c = 0; c < C; c++) {
            const uint8_t *at = columns.panels[c] + k * 2 * kPanel;
            const __m512i pairs = _mm512_loadu_si512(at);
            _mm_prefetch(reinterpret_cast<const char *>(at) + kAhead<C>, kWhere<C>);
            for (int r = 0; r < R; r++) {
                for (int p = 0; p < PARTS; p++) {
                    uint32_t both;
                    std::memcpy(&both, halves_of[r] + p * w.inner + k, sizeof both);
                    sum[p][r][c] = _mm512_dpbf16_ps(sum[p][r][c], reinterpret_cast<__m512bh>(pairs),
                                                    reinterpret_cast<__m512bh>(_mm512_set1_epi32(int(both))));
                }
            }
        }
    }
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < C; c++) {
            Lanes total = sum[0][r][c];
            if constexpr (PARTS == 3) total = _mm512_add_ps(total, _mm512_add_ps(sum[1][r][c], sum[2][r][c]));
            put(total, columns.out + (first + r) * columns.stride + c * kPanel, columns.width - c * kPanel, columns.add);
        }
    }
}

template <int R, int C, int BITS, bool MINIMUM>
STRETTO_TARGET_BF16 void tile_planes(const Rows &rows, int64_t first, const Packed &w, const Columns &columns) {
    if (rows.planes == 3) return tile_bytes<R, C, BITS, MINIMUM, 3>(rows, first, w, columns);
    if (rows.planes == 2) return tile_bytes<R, C, BITS, MINIMUM, 2>(rows, first, w, columns);
    return tile_bytes<R, C, BITS, MINIMUM, 1>(rows, first, w, columns);
}

struct Tiles {
    template <int R, int C>
    STRETTO_TARGET_BF16 static void run(const Rows &rows, int64_t first, const Packed &w, const Columns &columns) {
        if (w.bits == 8) return tile_planes<R, C, 8, false>(rows, first, w, columns);
        if (w.bits == 4) {
            return w.minimum ? tile_planes<R, C, 4, true>(rows, first, w, columns) : tile_planes<R, C, 4, false>(rows, first, w, columns);
        }
        return rows.planes == 3 ? tile_numbers<R, C, 3>(rows, first, w, columns) : tile_numbers<R, C, 1>(rows, first, w, columns);
    }
};

STRETTO_TARGET_BF16 void multiply_avx512(const Rows &rows, const Packed &w, int64_t first, int64_t last, float *out, int64_t stride,
                                         bool add) {
    if (rows.grid) return multiply_grid_avx512(rows, w, first, last, out, stride, add);
    multiply_blocks<Tiles>(rows, rows.planes == 3 ? 6 : 8, w, first, last, out, stride, add);
}

}  // namespace

const Kernels kPackedAvx512{prepare_avx512, multiply_avx512};

}  // namespace stretto
#endif
