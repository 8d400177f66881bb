// Products of whole numbers by AVX2.
#if defined(__x86_64__)
#include "packed_avx2.hpp"
#include "packed_grid.hpp"

namespace stretto {

namespace {

// The sum of a piece's digits times q - 8 fits 16 bits, and so does each of the two that a column's pairs of products are added into, the first
// of which begins with what the eights take off. One instruction scales both and adds them.
template <bool MINIMUM>
struct GridTile {
    static constexpr int kTall = 2;

    template <int R>
    STRETTO_TARGET_AVX2 static void run(const Rows &rows, int64_t first, const Packed &w, const PanelColumns &columns) {
        const int64_t pieces = w.inner / kPiece, section = section_steps(w.inner) * 2, of_group = w.group / kPiece;
        const int64_t between = rows.tall * kStep;
        const int8_t *of_row[R];
        const int32_t *numbers[R];
        float units[R];
        for (int r = 0; r < R; r++) {
            const GridRow row(rows, first + r);
            of_row[r] = row.digits, numbers[r] = row.numbers, units[r] = *row.unit;
        }
        const uint8_t *at = columns.panel, *group = at;
        int64_t inside = 0;  // of a group: the piece's number
        Eight total[R][kHalves];
        for (int64_t from = 0; from < pieces; from += section) {
            __m256i sum[R][kHalves][2];
#pragma GCC unroll 2
            for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
                for (int h = 0; h < kHalves; h++) sum[r][h][kHigh] = sum[r][h][kLow] = _mm256_setzero_si256();
            }
            for (int64_t piece = from; piece < std::min(from + section, pieces); piece++) {
                if (inside == 0) group = at, at += kPanel * 2 * (MINIMUM ? 2 : 1);
                if (++inside == of_group) inside = 0;
                __m256i of_piece[R][kHalves][2][1];
                const int8_t *digits[R];
#pragma GCC unroll 2
                for (int r = 0; r < R; r++) {
                    digits[r] = of_row[r] + piece / 2 * 2 * between + piece % 2 * kPiece;
#pragma GCC unroll 2
                    for (int plane = 0; plane < 2; plane++) {
                        of_piece[r][0][plane][0] = of_piece[r][1][plane][0] = _mm256_set1_epi32(numbers[r][piece * 4 + plane] & 0xFFFF);
                    }
                }
                add_piece<R, kHalves, 2, 4>(digits, between, at, 0, of_piece);
                at += kPiece * kPanel / 2;
                const __m128i *scales = reinterpret_cast<const __m128i *>(group);
#pragma GCC unroll 2
                for (int h = 0; h < kHalves; h++) {
                    const __m256i one = _mm256_cvtepu16_epi32(_mm_loadu_si128(scales + h)), d = _mm256_or_si256(one, _mm256_slli_epi32(one, 16));
                    const __m256i m = MINIMUM ? _mm256_cvtepu16_epi32(_mm_loadu_si128(scales + kHalves + h)) : one;
#pragma GCC unroll 2
                    for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
                        for (int plane = 0; plane < 2; plane++) {
                            __m256i &to = sum[r][h][plane];
                            to = _mm256_add_epi32(to, _mm256_madd_epi16(of_piece[r][h][plane][0], d));
                            if constexpr (!MINIMUM) continue;
                            to = _mm256_add_epi32(to, _mm256_madd_epi16(_mm256_set1_epi32(numbers[r][piece * 4 + 2 + plane]), m));
                        }
                    }
                }
            }
#pragma GCC unroll 2
            for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
                for (int h = 0; h < kHalves; h++) {
                    const Eight low = _mm256_cvtepi32_ps(sum[r][h][kLow]);
                    const Eight both = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][h][kHigh]), _mm256_set1_ps(kBase), low);
                    total[r][h] = from ? _mm256_add_ps(total[r][h], both) : both;
                }
            }
        }
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
            for (int h = 0; h < kHalves; h++) {
                float *to = columns.out + (first + r) * columns.stride + h * 8;
                const int64_t width = columns.width - h * 8;
                const Eight before = columns.add ? take_eight(to, width) : _mm256_setzero_ps();
                const Eight scaled = _mm256_mul_ps(total[r][h], _mm256_set1_ps(units[r]));
                put_eight(_mm256_fmadd_ps(scaled, _mm256_loadu_ps(columns.units + h * 8), before), to, width);
            }
        }
    }
};

STRETTO_TARGET_AVX2 int32_t sum_of(__m256i q) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xB1)));
}

}  // namespace

STRETTO_TARGET_AVX2 void prepare_grid_avx2(const Rows &rows, int64_t r, const float *x, int64_t length) {
    const GridRow row(rows, r);
    const RowGrid grid(largest_of(x, 0, length, length));
    *row.unit = grid.unit;
    const Eight inverse = _mm256_set1_ps(grid.inverse), of_base = _mm256_set1_ps(1.0f / kBase);
    for (int64_t piece = 0; piece < steps_of(rows.inner) * 2; piece++) {
        const int64_t k = piece * kPiece;
        __m256i digits[2][4], sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        for (int i = 0; i < 4; i++) {
            const Eight scaled = grid.inverse > 0.0f ? _mm256_mul_ps(some(x, k + 8 * i, length), inverse) : _mm256_setzero_ps();
            const __m256i q = _mm256_cvtps_epi32(scaled);
            const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_cvtepi32_ps(q), of_base));
            digits[kHigh][i] = high;
            digits[kLow][i] = _mm256_add_epi32(_mm256_sub_epi32(q, _mm256_slli_epi32(high, 8)), high);
            for (int plane : {kHigh, kLow}) sums[plane] = _mm256_add_epi32(sums[plane], digits[plane][i]);
        }
        for (int plane : {kHigh, kLow}) {
            store_bytes(row.at(plane, k), digits[plane]);
            const int32_t sum = sum_of(sums[plane]);
            row.start(plane, piece) = -8 * sum, row.sum(plane, piece) = sum;
        }
    }
}

void multiply_grid_avx2(const Rows &rows, const Packed &w, int64_t first, int64_t last, float *out, int64_t stride, bool add) {
    if (w.minimum) return multiply_panels<GridTile<true>>(rows, w, first, last, out, stride, add);
    multiply_panels<GridTile<false>>(rows, w, first, last, out, stride, add);
}

}  // namespace stretto
#endif
