// Packed products by AVX2.
//
// Without instructions that add four products of bytes into 32 bits, pairs of products are added in 16: weights of 4 bits, or half a weight
// of 8, times digits of 8 bits fit for 32 inner elements, a piece, after which both sums of a column go into one of 32 bits.
#if defined(__x86_64__)
#include "packed_avx2.hpp"

#include "narrow.hpp"
#include "packed_grid.hpp"
#include "packed_rows.hpp"

namespace stretto {

namespace {

// A row that meets weights of 16 bits: fp32 (exact), or bf16 where they lie within four neighbours.
STRETTO_TARGET_AVX2 void prepare_numbers(const Rows &rows, int64_t r, const float *x, int64_t length) {
    if (rows.planes == 3) {
        float *to = reinterpret_cast<float *>(rows.values(r));
        for (int64_t k = 0; k < rows.inner; k += 8) _mm256_storeu_ps(to + k, some(x, k, length));
        return;
    }
    uint16_t *to = reinterpret_cast<uint16_t *>(rows.values(r));
    for (int64_t k = 0; k < rows.inner; k++) to[(k & ~int64_t(3)) + kPlace[k & 3]] = to_bf16(k < length ? x[k] : 0.0f);
}

// Whole numbers come out as in prepare_plain.
STRETTO_TARGET_AVX2 void prepare_avx2(const Rows &rows, int64_t r, const float *x, int64_t length) {
    if (rows.grid) return prepare_grid_avx2(rows, r, x, length);
    x = sorted(rows, x, length);
    if (!rows.whole) return prepare_numbers(rows, r, x, length);
    float *numbers = rows.numbers(r);
    int8_t *bytes = reinterpret_cast<int8_t *>(rows.values(r));
    for (int64_t g = 0; g < rows.groups(); g++) {
        const int64_t first = g * rows.group, last = first + rows.group;
        const Scale of(largest_of(x, first, last, length), rows.largest(g));
        const Eight inverse = _mm256_set1_ps(of.inverse);
        __m256i sum = _mm256_setzero_si256();  // of 64 bits
        for (int64_t k = first; k < last; k += kPiece) {
            __m256i q[4], of_piece = _mm256_setzero_si256();
            for (int i = 0; i < 4; i++) {
                const Eight scaled = of.inverse == 0.0f ? _mm256_setzero_ps() : _mm256_mul_ps(some(x, k + 8 * i, length), inverse);
                q[i] = _mm256_cvtps_epi32(scaled);
                of_piece = _mm256_add_epi32(of_piece, q[i]);
            }
            sum = _mm256_add_epi64(sum, _mm256_cvtepi32_epi64(_mm256_castsi256_si128(of_piece)));
            sum = _mm256_add_epi64(sum, _mm256_cvtepi32_epi64(_mm256_extracti128_si256(of_piece, 1)));
            for (int plane = rows.planes - 1; plane >= 0; plane--) {
                __m256i digits[4];
                for (int i = 0; i < 4; i++) {
                    digits[i] = _mm256_srai_epi32(_mm256_slli_epi32(q[i], 24), 24);
                    q[i] = _mm256_srai_epi32(_mm256_sub_epi32(q[i], digits[i]), 8);
                }
                store_bytes(bytes + plane * rows.inner + k, digits);
            }
        }
        const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        numbers[2 * g * rows.tall] = of.scale;
        numbers[(2 * g + 1) * rows.tall] = of.scale * float(int64_t(_mm_cvtsi128_si64(two)) + int64_t(_mm_extract_epi64(two, 1)));
    }
}

// Half a panel's numbers of a group, from fp16.
STRETTO_TARGET_AVX2 inline Eight halves(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }

// What the sums of planes of whole numbers stand for together.
template <int PLANES>
STRETTO_TARGET_AVX2 inline Eight together(const __m256i (&sums)[PLANES]) {
    const Eight first = _mm256_cvtepi32_ps(sums[0]), base = _mm256_set1_ps(256.0f);
    if constexpr (PLANES == 1) return first;
    if constexpr (PLANES == 2) return _mm256_fmadd_ps(first, base, _mm256_cvtepi32_ps(sums[1]));
    if constexpr (PLANES == 3) {
        const Eight rest = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[1]), base, _mm256_cvtepi32_ps(sums[2]));
        return _mm256_fmadd_ps(first, _mm256_set1_ps(65536.0f), rest);
    }
}

STRETTO_TARGET_AVX2 inline void put(Eight total, const PanelColumns &columns, int64_t row, int half) {
    float *to = columns.out + row * columns.stride + half * 8;
    const int64_t width = columns.width - half * 8;
    put_eight(columns.add ? _mm256_add_ps(take_eight(to, width), total) : total, to, width);
}

// Activations in PLANES bytes an element by weights of 4 or 8 bits: whole numbers inside a group. As many rows and halves of a panel at once
// as leave their sums, and what these are made of, in sixteen registers.
template <int BITS, bool MINIMUM, int PLANES>
struct BytesTile {
    static constexpr int kParts = BITS / 4;  // of a weight, each of which has sums of its own
    static constexpr int kAtOnce = kParts * PLANES <= 2 ? kHalves : 1;
    static constexpr int kTall = kParts * PLANES == 1 ? 4 : kParts * PLANES == 6 ? 1 : 2;
    static constexpr int64_t kNumbers = kPanel * 2 * (MINIMUM ? 2 : 1);  // bytes

    template <int R>
    STRETTO_TARGET_AVX2 static void run(const Rows &rows, int64_t first, const Packed &w, const PanelColumns &columns) {
        const int8_t *digits[R];
        const float *numbers[R];
        Eight total[R][kHalves];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            digits[r] = rows.bytes_of(first + r);
            numbers[r] = rows.numbers(first + r);
            total[r][0] = total[r][1] = _mm256_setzero_ps();
        }
        const uint8_t *group = columns.panel;
        for (int64_t g = 0; g < w.groups(); g++, group += w.group_bytes()) {
            __m256i whole[R][kHalves][PLANES];
            for (int k = 0; k < w.group; k += kPiece) {
                const uint8_t *at = group + kNumbers + k * kPanel * BITS / 8;
                add_piece_at<R, 0>(digits, w.inner, at, k == 0, whole);
                if constexpr (kAtOnce == 1) add_piece_at<R, 1>(digits, w.inner, at, k == 0, whole);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) digits[r] += kPiece;
            }
            const uint16_t *d = reinterpret_cast<const uint16_t *>(group);
#pragma GCC unroll 2
            for (int h = 0; h < kHalves; h++) {
                const Eight scale = halves(d + 8 * h);
                const Eight minimum = MINIMUM ? halves(d + kPanel + 8 * h) : _mm256_mul_ps(scale, _mm256_set1_ps(BITS == 4 ? -8.0f : -128.0f));
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) {
                    const float *of_group = numbers[r] + 2 * g * rows.tall;
                    const Eight scaled = _mm256_mul_ps(together(whole[r][h]), _mm256_set1_ps(of_group[0]));
                    total[r][h] = _mm256_fmadd_ps(scale, scaled, total[r][h]);
                    total[r][h] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(of_group[rows.tall]), total[r][h]);
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
            for (int h = 0; h < kHalves; h++) put(total[r][h], columns, first + r, h);
        }
    }

  private:
    // A piece's products into `whole`, which they begin if it is a group's `first`, by the halves from number HALF on.
    template <int R, int HALF>
    STRETTO_INLINE_AVX2 static void add_piece_at(const int8_t *const (&digits)[R], int64_t inner, const uint8_t *at, bool first,
                                                 __m256i (&whole)[R][kHalves][PLANES]) {
        __m256i sum[R][kAtOnce][PLANES][kParts];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
            for (int h = 0; h < kAtOnce; h++) {
#pragma GCC unroll 3
                for (int p = 0; p < PLANES; p++) sum[r][h][p][0] = sum[r][h][p][kParts - 1] = _mm256_setzero_si256();
            }
        }
        add_piece<R, kAtOnce, PLANES, BITS>(digits, inner, at, HALF, sum);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
            for (int h = 0; h < kAtOnce; h++) {
#pragma GCC unroll 3
                for (int p = 0; p < PLANES; p++) {
                    __m256i more = _mm256_madd_epi16(sum[r][h][p][0], _mm256_set1_epi16(1));
                    if constexpr (kParts == 2) more = _mm256_add_epi32(more, _mm256_madd_epi16(sum[r][h][p][1], _mm256_set1_epi16(16)));
                    whole[r][HALF + h][p] = first ? more : _mm256_add_epi32(whole[r][HALF + h][p], more);
                }
            }
        }
    }
};

// bf16 weights, each sum in two chains: elements 0 and 1 of each four, and 2 and 3.
template <bool EXACT>
struct NumbersTile {
    static constexpr int kTall = 2;

    template <int R>
    STRETTO_TARGET_AVX2 static void run(const Rows &rows, int64_t first, const Packed &w, const PanelColumns &columns) {
        const uint8_t *values[R];
        Eight sum[R][kHalves][2];
        for (int r = 0; r < R; r++) {
            values[r] = rows.values(first + r);
            for (int h = 0; h < kHalves; h++) sum[r][h][0] = sum[r][h][1] = _mm256_setzero_ps();
        }
        for (int64_t k = 0; k < w.inner; k += 2) {
            const uint8_t *at = columns.panel + k * 2 * kPanel;
            _mm_prefetch(reinterpret_cast<const char *>(at) + kAsked, _MM_HINT_T0);
#pragma GCC unroll 2
            for (int h = 0; h < kHalves; h++) {
                const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(at) + h);
                const Eight near = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), far = upper(pairs);
#pragma GCC unroll 2
                for (int r = 0; r < R; r++) {
                    Eight x[2];
                    if constexpr (EXACT) {
                        const float *of_row = reinterpret_cast<const float *>(values[r]) + (k & ~int64_t(3)) + (k >> 1 & 1);
                        x[0] = _mm256_broadcast_ss(of_row), x[1] = _mm256_broadcast_ss(of_row + 2);
                    } else {
                        const __m256i both = four(reinterpret_cast<const int8_t *>(values[r]) + 2 * k);
                        x[0] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16)), x[1] = upper(both);
                    }
                    sum[r][h][0] = _mm256_fmadd_ps(near, x[0], sum[r][h][0]);
                    sum[r][h][1] = _mm256_fmadd_ps(far, x[1], sum[r][h][1]);
                }
            }
        }
        for (int r = 0; r < R; r++) {
            for (int h = 0; h < kHalves; h++) put(_mm256_add_ps(sum[r][h][0], sum[r][h][1]), columns, first + r, h);
        }
    }

  private:
    STRETTO_TARGET_AVX2 static Eight upper(__m256i pairs) {
        return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xFFFF0000u))));
    }
};

template <int BITS, bool MINIMUM>
void multiply_planes(const Rows &rows, const Packed &w, int64_t first, int64_t last, float *out, int64_t stride, bool add) {
    const auto multiply = rows.planes == 3   ? multiply_panels<BytesTile<BITS, MINIMUM, 3>>
                          : rows.planes == 2 ? multiply_panels<BytesTile<BITS, MINIMUM, 2>>
                                             : multiply_panels<BytesTile<BITS, MINIMUM, 1>>;
    multiply(rows, w, first, last, out, stride, add);
}

void multiply_avx2(const Rows &rows, const Packed &w, int64_t first, int64_t last, float *out, int64_t stride, bool add) {
    const auto multiply = rows.grid          ? multiply_grid_avx2
                          : w.bits == 8      ? multiply_planes<8, false>
                          : w.bits == 4      ? (w.minimum ? multiply_planes<4, true> : multiply_planes<4, false>)
                          : rows.planes == 3 ? multiply_panels<NumbersTile<true>>
                                             : multiply_panels<NumbersTile<false>>;
    multiply(rows, w, first, last, out, stride, add);
}

}  // namespace

const Kernels kPackedAvx2{prepare_avx2, multiply_avx2};

}  // namespace stretto
#endif
