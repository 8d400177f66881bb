// Products of whole numbers by AVX-512 with VNNI.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "packed_grid.hpp"
#include "packed_vectors.hpp"

namespace stretto {

namespace {

// R rows by C panels. The sum of a piece's digits times q - 8 fits 16 bits, so that the instruction for pairs of 16 bits scales it: the other
// half of each pair meets the zero above d.
template <int R, int C, bool MINIMUM>
STRETTO_TARGET_BF16 void tile(const Rows &rows, int64_t first, const Packed &w, const Columns &columns) {
    const __m512i fifteen = _mm512_set1_epi8(15);
    const int64_t pieces = w.inner / kPiece, section = section_steps(w.inner) * 2, of_group = w.group / kPiece;
    const int64_t group_bytes = w.group_bytes(), between = rows.tall * kStep;
    const int8_t *digits[R];
    const int32_t *numbers[R];
    float units[R];
    for (int r = 0; r < R; r++) {
        const GridRow row(rows, first + r);
        digits[r] = row.digits, numbers[r] = row.numbers, units[r] = *row.unit;
    }
    Lanes total[R][C];
    for (int64_t from = 0; from < pieces; from += section) {
        __m512i sum[R][C][2];
        for (int r = 0; r < R; r++) {
            for (int c = 0; c < C; c++) sum[r][c][kHigh] = sum[r][c][kLow] = _mm512_setzero_si512();
        }
        int64_t inside = from % of_group, at_group = from / of_group * group_bytes;  // of a piece in its group
        for (int64_t piece = from; piece < std::min(from + section, pieces); piece++) {
            __m512i of_piece[R][C][2];
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
                for (int c = 0; c < C; c++) {
                    for (int plane : {kHigh, kLow}) of_piece[r][c][plane] = _mm512_set1_epi32(numbers[r][piece * 4 + plane]);
                }
            }
#pragma GCC unroll 4
            for (int k = 0; k < kPiece; k += 8) {
#pragma GCC unroll 4
                for (int c = 0; c < C; c++) {
                    const uint8_t *at = columns.panels[c] + at_group + kPanel * 2 * (MINIMUM ? 2 : 1) + (inside * kPiece + k) * kPanel / 2;
                    const __m512i bytes = _mm512_loadu_si512(at);
                    _mm_prefetch(reinterpret_cast<const char *>(at) + kAhead<C>, kWhere<C>);
                    const __m512i q[2] = {_mm512_and_si512(bytes, fifteen), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), fifteen)};
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) {
                        const int8_t *of_row = digits[r] + piece / 2 * 2 * between + piece % 2 * kPiece + k;
                        for (int plane : {kHigh, kLow}) {
                            for (int half = 0; half < 2; half++) {
                                int32_t x;
                                std::memcpy(&x, of_row + plane * between + 4 * half, sizeof x);
                                of_piece[r][c][plane] = _mm512_dpbusd_epi32(of_piece[r][c][plane], q[half], _mm512_set1_epi32(x));
                            }
                        }
                    }
                }
            }
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) {
                const __m256i *scales = reinterpret_cast<const __m256i *>(columns.panels[c] + at_group);
                const __m512i d = _mm512_cvtepu16_epi32(_mm256_loadu_si256(scales));
                const __m512i m = MINIMUM ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(scales + 1)) : d;
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    for (int plane : {kHigh, kLow}) {
                        sum[r][c][plane] = _mm512_dpwssd_epi32(sum[r][c][plane], of_piece[r][c][plane], d);
                        if constexpr (!MINIMUM) continue;
                        sum[r][c][plane] = _mm512_dpwssd_epi32(sum[r][c][plane], _mm512_set1_epi32(numbers[r][piece * 4 + 2 + plane]), m);
                    }
                }
            }
            if (++inside == of_group) inside = 0, at_group += group_bytes;
        }
        for (int r = 0; r < R; r++) {
            for (int c = 0; c < C; c++) {
                const Lanes both = grid_together(sum[r][c][kLow], sum[r][c][kHigh]);
                total[r][c] = from ? _mm512_add_ps(total[r][c], both) : both;
            }
        }
    }
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < C; c++) {
            put_grid(total[r][c], units[r], columns.units + c * kPanel, columns.out + (first + r) * columns.stride + c * kPanel,
                     columns.width - c * kPanel, columns.add);
        }
    }
}

struct Tiles {
    template <int R, int C>
    STRETTO_TARGET_BF16 static void run(const Rows &rows, int64_t first, const Packed &w, const Columns &columns) {
        if (w.minimum) return tile<R, C, true>(rows, first, w, columns);
        return tile<R, C, false>(rows, first, w, columns);
    }
};

}  // namespace

STRETTO_TARGET_BF16 void prepare_grid_avx512(const Rows &rows, int64_t r, const float *x, int64_t length) {
    const GridRow row(rows, r);
    const auto some = [&](int64_t from) STRETTO_INLINE_BF16 {
        const int64_t left = length - from;
        return _mm512_maskz_loadu_ps(left >= 16 ? 0xFFFF : left <= 0 ? 0 : __mmask16((1u << left) - 1), x + from);
    };
    __mmask16 wrong = 0;
    Lanes top = _mm512_setzero_ps();
    for (int64_t k = 0; k < length; k += 16) {
        const Lanes size = _mm512_abs_ps(some(k));
        wrong |= _mm512_cmp_ps_mask(size, _mm512_set1_ps(std::numeric_limits<float>::infinity()), _CMP_NLT_UQ);
        top = _mm512_max_ps(top, size);
    }
    const RowGrid grid(wrong ? std::numeric_limits<float>::infinity() : _mm512_reduce_max_ps(top));
    *row.unit = grid.unit;
    const Lanes inverse = _mm512_set1_ps(grid.inverse), of_base = _mm512_set1_ps(1.0f / kBase);
    for (int64_t piece = 0; piece < steps_of(rows.inner) * 2; piece++) {
        __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
        for (int64_t k = piece * kPiece; k < (piece + 1) * kPiece; k += 16) {
            const Lanes scaled = grid.inverse > 0.0f ? _mm512_mul_ps(some(k), inverse) : _mm512_setzero_ps();
            const __m512i q = _mm512_cvtps_epi32(scaled);
            const __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(q), of_base));
            const __m512i low = _mm512_add_epi32(_mm512_sub_epi32(q, _mm512_slli_epi32(high, 8)), high);
            _mm_storeu_si128(reinterpret_cast<__m128i *>(row.at(kHigh, k)), _mm512_cvtepi32_epi8(high));
            _mm_storeu_si128(reinterpret_cast<__m128i *>(row.at(kLow, k)), _mm512_cvtepi32_epi8(low));
            sums[kHigh] = _mm512_add_epi32(sums[kHigh], high), sums[kLow] = _mm512_add_epi32(sums[kLow], low);
        }
        for (int plane : {kHigh, kLow}) {
            const int32_t sum = _mm512_reduce_add_epi32(sums[plane]);
            row.start(plane, piece) = -8 * sum, row.sum(plane, piece) = sum;
        }
    }
}

STRETTO_TARGET_BF16 void multiply_grid_avx512(const Rows &rows, const Packed &w, int64_t first, int64_t last, float *out, int64_t stride,
                                              bool add) {
    multiply_blocks<Tiles>(rows, 8, w, first, last, out, stride, add);
}

}  // namespace stretto
#endif
