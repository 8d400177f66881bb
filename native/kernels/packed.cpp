#include "packed.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "levels.hpp"
#include "narrow.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace stretto {

namespace {

// Where element k of four neighbours lies among its bf16 values.
constexpr int kPlace[4] = {0, 2, 1, 3};

struct Row {
    const int8_t *bytes;
    const uint16_t *halves;
    const float *scales, *sums;
};

Row parts(const Rows &rows, int64_t r) {
    const uint8_t *at = rows.row(r);
    const float *numbers = reinterpret_cast<const float *>(at + rows.values_bytes());
    return {reinterpret_cast<const int8_t *>(at), reinterpret_cast<const uint16_t *>(at), numbers,
            rows.whole() ? numbers + rows.groups() : numbers};
}

// The scale of a group whose largest magnitude is `most`, and its inverse. What is not finite makes the whole group NaN.
struct Scale {
    float scale, inverse;
    Scale(float most, float largest) {
        if (!(most < std::numeric_limits<float>::infinity())) {
            scale = std::numeric_limits<float>::quiet_NaN(), inverse = 0.0f;
        } else {
            scale = most / largest, inverse = most > 0.0f ? largest / most : 0.0f;
            if (!(inverse < std::numeric_limits<float>::infinity())) scale = inverse = 0.0f;  // as good as zero
        }
    }
};

// `x` in the order that the weights want, padded with zeros, or as it is; `length` becomes that of the result.
const float *sorted(const Rows &rows, const float *x, int64_t &length) {
    if (!rows.order) return x;
    thread_local std::vector<float> room;
    room.resize(static_cast<size_t>(rows.inner));
    for (int64_t i = 0; i < rows.inner; i++) room[i] = rows.order[i] < 0 ? 0.0f : x[rows.order[i]];
    length = rows.inner;
    return room.data();
}

void prepare_plain(const Rows &rows, int64_t r, const float *x, int64_t length) {
    x = sorted(rows, x, length);
    uint8_t *at = rows.row(r);
    float *numbers = reinterpret_cast<float *>(at + rows.values_bytes());
    const int group = rows.group;
    for (int64_t g = 0; g < rows.groups(); g++) {
        const auto value = [&](int i) {
            const float v = g * group + i < length ? x[g * group + i] : 0.0f;
            return rows.rounded ? from_bf16(to_bf16(v)) : v;
        };
        if (!rows.whole()) {
            float sum = 0.0f;
            for (int i = 0; i < group; i++) {
                const int64_t to = g * group + (i & ~3) + kPlace[i & 3];
                float rest = value(i);
                sum += rest;
                for (int plane = 0; plane < rows.planes(); plane++) {
                    const uint16_t part = to_bf16(rest);
                    reinterpret_cast<uint16_t *>(at)[plane * rows.inner + to] = part;
                    rest -= from_bf16(part);
                }
            }
            numbers[g] = sum;
            continue;
        }
        float most = 0.0f;
        for (int i = 0; i < group; i++) {
            const float size = std::fabs(value(i));
            most = size <= most || most != most ? most : size;  // a NaN stays
        }
        const Scale of(most, rows.largest(g));
        int8_t *bytes = reinterpret_cast<int8_t *>(at) + g * group;
        int64_t sum = 0;
        for (int i = 0; i < group; i++) {
            int q = int(std::lrintf(of.inverse == 0.0f ? 0.0f : value(i) * of.inverse));
            sum += q;
            for (int plane = rows.planes() - 1; plane >= 0; plane--) {
                const int8_t digit = int8_t(q);
                bytes[plane * rows.inner + i] = digit;
                q = (q - digit) >> 8;
            }
        }
        numbers[g] = of.scale;
        numbers[rows.groups() + g] = of.scale * float(sum);
    }
}

// Weights that are numbers as they are, by rows in one or three parts.
void multiply_numbers_plain(const Rows &rows, const Packed &w, int64_t first, int64_t last, float *out, int64_t stride, bool add) {
    for (int64_t panel = first; panel < last; panel++) {
        const int64_t width = std::min<int64_t>(kPanel, w.columns - panel * kPanel);
        const uint16_t *at = reinterpret_cast<const uint16_t *>(w.data + panel * w.panel_bytes());
        for (int64_t r = 0; r < rows.count; r++) {
            const Row row = parts(rows, r);
            for (int64_t c = 0; c < width; c++) {
                float sum[3] = {};
                for (int64_t k = 0; k < w.inner; k += 2) {
                    for (int i = 0; i < 2; i++) {
                        const float weight = from_bf16(at[k * kPanel + c * 2 + i]);
                        for (int p = 0; p < rows.planes(); p++) sum[p] += weight * from_bf16(row.halves[p * w.inner + k + i]);
                    }
                }
                const float total = sum[0] + (sum[1] + sum[2]);
                float *to = out + r * stride + panel * kPanel + c;
                *to = add ? *to + total : total;
            }
        }
    }
}

void multiply_plain(const Rows &rows, const Packed &w, int64_t first, int64_t last, float *out, int64_t stride, bool add) {
    if (w.bits == 16) return multiply_numbers_plain(rows, w, first, last, out, stride, add);
    const int planes = rows.planes();
    for (int64_t panel = first; panel < last; panel++) {
        const int64_t width = std::min<int64_t>(kPanel, w.columns - panel * kPanel);
        for (int64_t r = 0; r < rows.count; r++) {
            const Row row = parts(rows, r);
            const uint8_t *at = w.data + panel * w.panel_bytes();
            float total[kPanel] = {};
            for (int64_t g = 0; g < w.groups(); g++) {
                const uint16_t *d = reinterpret_cast<const uint16_t *>(at), *m = d + kPanel;
                at += kPanel * 2 * (w.minimum ? 2 : 1);
                float sum[kPanel] = {};
                int32_t whole[3][kPanel] = {};
                for (int k = 0; k < w.group; k++) {
                    const int64_t inner = g * w.group + k, place = (inner & ~int64_t(3)) + kPlace[inner & 3];
                    const uint8_t *bytes = at + (w.bits == 4 ? k / 8 * 64 : k / 4 * 64) + (k & 3);
                    for (int c = 0; c < kPanel; c++) {
                        const int byte = bytes[4 * c];
                        const int q = w.bits == 8 ? byte : k & 4 ? byte >> 4 : byte & 15;
                        if (rows.form == Form::halves) {
                            sum[c] += float(q) * from_bf16(row.halves[place]);
                        } else {
                            for (int p = 0; p < planes; p++) whole[p][c] += q * row.bytes[p * rows.inner + inner];
                        }
                    }
                }
                at += int64_t(w.group) * kPanel * w.bits / 8;
                for (int c = 0; c < kPanel; c++) {
                    const float scale = from_half(d[c]);
                    const float minimum = w.minimum ? from_half(m[c]) : scale * (w.bits == 4 ? -8.0f : -128.0f);
                    float product = sum[c];
                    if (rows.form == Form::bytes) product = row.scales[g] * float(whole[0][c]);
                    if (rows.form == Form::planes) {
                        product = (float(whole[0][c]) * 65536.0f + (float(whole[1][c]) * 256.0f + float(whole[2][c]))) * row.scales[g];
                    }
                    total[c] += scale * product;
                    total[c] += minimum * row.sums[g];
                }
            }
            float *to = out + r * stride + panel * kPanel;
            for (int64_t c = 0; c < width; c++) to[c] = add ? to[c] + total[c] : total[c];
        }
    }
}

const Kernels kPlain{prepare_plain, multiply_plain};

#if defined(__x86_64__)
#define STRETTO_TARGET_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,f16c,fma")))

using Lanes = __m512;

constexpr int kAhead = 1536;  // bytes of weights that are asked for ahead of their use

STRETTO_TARGET_BF16 inline Lanes halves(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}

STRETTO_TARGET_BF16 inline __m512i pair(const uint16_t *x) {
    uint32_t both;
    std::memcpy(&both, x, sizeof both);
    return _mm512_set1_epi32(int(both));
}

STRETTO_TARGET_BF16 inline Lanes dot(Lanes sum, __m512i w, const uint16_t *x) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(pair(x)));
}

STRETTO_TARGET_BF16 inline Lanes widened(__m256i halves) {
    return reinterpret_cast<Lanes>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Making a row ready; whole numbers come out as in prepare_plain.
STRETTO_TARGET_BF16 Lanes some(const float *x, int64_t from, int64_t length, bool rounded) {
    const int64_t left = length - from;
    const __mmask16 mask = left >= 16 ? 0xFFFF : left <= 0 ? 0 : __mmask16((1u << left) - 1);
    Lanes value = _mm512_maskz_loadu_ps(mask, x + from);
    if (rounded) {
        value = widened(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
    }
    return value;
}

STRETTO_TARGET_BF16 void prepare_bf16(const Rows &rows, int64_t r, const float *x, int64_t length) {
    x = sorted(rows, x, length);
    uint8_t *at = rows.row(r);
    float *numbers = reinterpret_cast<float *>(at + rows.values_bytes());
    const int group = rows.group;
    const __m256i order = _mm256_set_epi16(15, 13, 14, 12, 11, 9, 10, 8, 7, 5, 6, 4, 3, 1, 2, 0);
    for (int64_t g = 0; g < rows.groups(); g++) {
        const int64_t first = g * group;
        if (!rows.whole()) {
            Lanes sum = _mm512_setzero_ps();
            for (int i = 0; i < group; i += 16) {
                Lanes rest = some(x, first + i, length, rows.rounded);
                sum = _mm512_add_ps(sum, rest);
                for (int plane = 0; plane < rows.planes(); plane++) {
                    const __m256i halves = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(rest));
                    uint16_t *to = reinterpret_cast<uint16_t *>(at) + plane * rows.inner + first + i;
                    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), _mm256_permutexvar_epi16(order, halves));
                    rest = _mm512_sub_ps(rest, widened(halves));
                }
            }
            numbers[g] = _mm512_reduce_add_ps(sum);
            continue;
        }
        Lanes top = _mm512_setzero_ps();
        __mmask16 wrong = 0;
        for (int i = 0; i < group; i += 16) {
            const Lanes value = _mm512_abs_ps(some(x, first + i, length, rows.rounded));
            wrong |= _mm512_cmp_ps_mask(value, _mm512_set1_ps(std::numeric_limits<float>::infinity()), _CMP_NLT_UQ);
            top = _mm512_max_ps(top, value);
        }
        const float most = wrong ? std::numeric_limits<float>::infinity() : _mm512_reduce_max_ps(top);
        const Scale of(most, rows.largest(g));
        int8_t *bytes = reinterpret_cast<int8_t *>(at) + first;
        __m512i sum = _mm512_setzero_si512();
        for (int i = 0; i < group; i += 16) {
            const Lanes value = some(x, first + i, length, rows.rounded);
            const Lanes scaled = of.inverse == 0.0f ? _mm512_setzero_ps() : _mm512_mul_ps(value, _mm512_set1_ps(of.inverse));
            __m512i q = _mm512_cvtps_epi32(scaled);
            sum = _mm512_add_epi32(sum, q);
            for (int plane = rows.planes() - 1; plane >= 0; plane--) {
                const __m128i digit = _mm512_cvtepi32_epi8(q);
                _mm_storeu_si128(reinterpret_cast<__m128i *>(bytes + plane * rows.inner + i), digit);
                q = _mm512_srai_epi32(_mm512_sub_epi32(q, _mm512_cvtepi8_epi32(digit)), 8);
            }
        }
        const __m512i low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(sum));
        const __m512i high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(sum, 1));
        numbers[g] = of.scale;
        numbers[rows.groups() + g] = of.scale * float(_mm512_reduce_add_epi64(_mm512_add_epi64(low, high)));
    }
}

// bf16 of 0 .. 15, twice, since the fifth bit of an index is a neighbour's.
STRETTO_TARGET_BF16 inline __m512i table_of_nibbles() {
    alignas(64) uint16_t values[32];
    for (int i = 0; i < 32; i++) values[i] = to_bf16(float(i & 15));
    return _mm512_load_si512(values);
}

template <int R, int C>
STRETTO_TARGET_BF16 inline void put(const Lanes (&total)[R][C], float *const *out, int64_t width, bool add) {
    for (int c = 0; c < C; c++) {
        const int64_t left = width - c * kPanel;
        const __mmask16 mask = left >= kPanel ? 0xFFFF : __mmask16((1u << left) - 1);
        for (int r = 0; r < R; r++) {
            float *to = out[r] + c * kPanel;
            const Lanes before = add ? _mm512_maskz_loadu_ps(mask, to) : _mm512_setzero_ps();
            _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(before, total[r][c]));
        }
    }
}

template <int BITS, bool MINIMUM>
STRETTO_TARGET_BF16 inline Lanes minimum_of(const uint16_t *d, Lanes scale) {
    if constexpr (MINIMUM) return halves(d + kPanel);
    return _mm512_mul_ps(scale, _mm512_set1_ps(BITS == 4 ? -8.0f : -128.0f));
}

// R rows by C panels of 4-bit weights, activations in bf16.
template <int R, int C, bool MINIMUM>
STRETTO_TARGET_BF16 void tile_halves(const Row *rows, const Packed &w, const uint8_t *const *panels, float *const *out,
                                     int64_t width, bool add) {
    const __m512i table = table_of_nibbles();
    const int64_t group_bytes = w.group_bytes();
    Lanes total[R][C];
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < C; c++) total[r][c] = _mm512_setzero_ps();
    }
    for (int64_t g = 0; g < w.groups(); g++) {
        Lanes sum[R][C];
        for (int r = 0; r < R; r++) {
            for (int c = 0; c < C; c++) sum[r][c] = _mm512_setzero_ps();
        }
        for (int k = 0; k < w.group; k += 8) {
            for (int c = 0; c < C; c++) {
                const uint8_t *at = panels[c] + g * group_bytes + kPanel * 2 * (MINIMUM ? 2 : 1) + k * 8;
                const __m512i bytes = _mm512_loadu_si512(at);
                _mm_prefetch(reinterpret_cast<const char *>(at) + kAhead, _MM_HINT_T0);
                // Sixteen-bit lanes index by their low four bits: elements 0 and 2 of each column, then 1 and 3, and so on.
                const __m512i q0 = _mm512_permutexvar_epi16(bytes, table);
                const __m512i q1 = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 8), table);
                const __m512i q2 = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table);
                const __m512i q3 = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 12), table);
                for (int r = 0; r < R; r++) {
                    const uint16_t *x = rows[r].halves + g * w.group + k;
                    sum[r][c] = dot(sum[r][c], q0, x);
                    sum[r][c] = dot(sum[r][c], q1, x + 2);
                    sum[r][c] = dot(sum[r][c], q2, x + 4);
                    sum[r][c] = dot(sum[r][c], q3, x + 6);
                }
            }
        }
        for (int c = 0; c < C; c++) {
            const uint16_t *d = reinterpret_cast<const uint16_t *>(panels[c] + g * group_bytes);
            const Lanes scale = halves(d), minimum = minimum_of<4, MINIMUM>(d, scale);
            for (int r = 0; r < R; r++) {
                total[r][c] = _mm512_fmadd_ps(scale, sum[r][c], total[r][c]);
                total[r][c] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(rows[r].sums[g]), total[r][c]);
            }
        }
    }
    put<R, C>(total, out, width, add);
}

// R rows by C panels, activations in PLANES bytes an element: whole numbers inside a group.
template <int R, int C, int BITS, bool MINIMUM, int PLANES>
STRETTO_TARGET_BF16 void tile_bytes(const Row *rows, const Packed &w, const uint8_t *const *panels, float *const *out,
                                    int64_t width, bool add) {
    const __m512i fifteen = _mm512_set1_epi8(15);
    constexpr int kStep = BITS == 4 ? 8 : 4;  // inner elements of 64 bytes
    const int64_t group_bytes = w.group_bytes(), inner = w.inner;
    Lanes total[R][C];
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < C; c++) total[r][c] = _mm512_setzero_ps();
    }
    for (int64_t g = 0; g < w.groups(); g++) {
        __m512i sum[PLANES][R][C];
        for (int p = 0; p < PLANES; p++) {
            for (int r = 0; r < R; r++) {
                for (int c = 0; c < C; c++) sum[p][r][c] = _mm512_setzero_si512();
            }
        }
        for (int k = 0; k < w.group; k += kStep) {
            for (int c = 0; c < C; c++) {
                const uint8_t *at = panels[c] + g * group_bytes + kPanel * 2 * (MINIMUM ? 2 : 1) + k / kStep * 64;
                const __m512i bytes = _mm512_loadu_si512(at);
                _mm_prefetch(reinterpret_cast<const char *>(at) + kAhead, _MM_HINT_T0);
                const __m512i q0 = BITS == 4 ? _mm512_and_si512(bytes, fifteen) : bytes;
                const __m512i q1 = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), fifteen);
                for (int r = 0; r < R; r++) {
                    for (int p = 0; p < PLANES; p++) {
                        int32_t x[2];
                        std::memcpy(x, rows[r].bytes + p * inner + g * w.group + k, BITS == 4 ? 8 : 4);
                        sum[p][r][c] = _mm512_dpbusd_epi32(sum[p][r][c], q0, _mm512_set1_epi32(x[0]));
                        if constexpr (BITS == 4) sum[p][r][c] = _mm512_dpbusd_epi32(sum[p][r][c], q1, _mm512_set1_epi32(x[1]));
                    }
                }
            }
        }
        for (int c = 0; c < C; c++) {
            const uint16_t *d = reinterpret_cast<const uint16_t *>(panels[c] + g * group_bytes);
            const Lanes scale = halves(d), minimum = minimum_of<BITS, MINIMUM>(d, scale);
            for (int r = 0; r < R; r++) {
                Lanes whole = _mm512_cvtepi32_ps(sum[0][r][c]);
                if constexpr (PLANES == 3) {
                    const Lanes rest = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[1][r][c]), _mm512_set1_ps(256.0f),
                                                       _mm512_cvtepi32_ps(sum[2][r][c]));
                    whole = _mm512_fmadd_ps(whole, _mm512_set1_ps(65536.0f), rest);
                }
                const Lanes product = _mm512_mul_ps(whole, _mm512_set1_ps(rows[r].scales[g]));
                total[r][c] = _mm512_fmadd_ps(scale, product, total[r][c]);
                total[r][c] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(rows[r].sums[g]), total[r][c]);
            }
        }
    }
    put<R, C>(total, out, width, add);
}

// R rows in PARTS bf16 numbers an element by C panels of bf16 weights: one chain a part.
template <int R, int C, int PARTS>
STRETTO_TARGET_BF16 void tile_numbers(const Row *rows, const Packed &w, const uint8_t *const *panels, float *const *out,
                                      int64_t width, bool add) {
    Lanes sum[PARTS][R][C];
    for (int p = 0; p < PARTS; p++) {
        for (int r = 0; r < R; r++) {
            for (int c = 0; c < C; c++) sum[p][r][c] = _mm512_setzero_ps();
        }
    }
    for (int64_t k = 0; k < w.inner; k += 2) {
        for (int c = 0; c < C; c++) {
            const uint8_t *at = panels[c] + k * 2 * kPanel;
            const __m512i pairs = _mm512_loadu_si512(at);
            _mm_prefetch(reinterpret_cast<const char *>(at) + kAhead, _MM_HINT_T0);
            for (int r = 0; r < R; r++) {
                for (int p = 0; p < PARTS; p++) sum[p][r][c] = dot(sum[p][r][c], pairs, rows[r].halves + p * w.inner + k);
            }
        }
    }
    Lanes total[R][C];
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < C; c++) {
            total[r][c] = sum[0][r][c];
            if constexpr (PARTS == 3) total[r][c] = _mm512_add_ps(total[r][c], _mm512_add_ps(sum[1][r][c], sum[2][r][c]));
        }
    }
    put<R, C>(total, out, width, add);
}

template <int R, int C>
STRETTO_TARGET_BF16 void tile(Form form, const Row *rows, const Packed &w, const uint8_t *const *panels, float *const *out,
                              int64_t width, bool add) {
    if (w.bits == 16) {
        return form == Form::thirds ? tile_numbers<R, C, 3>(rows, w, panels, out, width, add)
                                    : tile_numbers<R, C, 1>(rows, w, panels, out, width, add);
    }
    if (form == Form::halves) {
        return w.minimum ? tile_halves<R, C, true>(rows, w, panels, out, width, add)
                         : tile_halves<R, C, false>(rows, w, panels, out, width, add);
    }
    if (form == Form::planes) {
        if (w.bits == 8) return tile_bytes<R, C, 8, false, 3>(rows, w, panels, out, width, add);
        return w.minimum ? tile_bytes<R, C, 4, true, 3>(rows, w, panels, out, width, add)
                         : tile_bytes<R, C, 4, false, 3>(rows, w, panels, out, width, add);
    }
    if (w.bits == 8) return tile_bytes<R, C, 8, false, 1>(rows, w, panels, out, width, add);
    return w.minimum ? tile_bytes<R, C, 4, true, 1>(rows, w, panels, out, width, add)
                     : tile_bytes<R, C, 4, false, 1>(rows, w, panels, out, width, add);
}

// A block of rows at once, so that weights are unpacked once for it; for few rows, several panels, so that enough sums are under way.
STRETTO_TARGET_BF16 void multiply_bf16(const Rows &rows, const Packed &w, int64_t first, int64_t last, float *out,
                                       int64_t stride, bool add) {
    constexpr int kTallest = 8;
    const int tallest = rows.planes() == 3 ? 6 : kTallest;
    Row row[kTallest];
    float *to[kTallest];
    const uint8_t *panels[4];
    for (int64_t panel = first, wide; panel < last; panel += wide) {
        wide = rows.count == 1 && last - panel >= 4 ? 4 : rows.count < 4 && last - panel >= 2 ? 2 : 1;
        for (int c = 0; c < wide; c++) panels[c] = w.data + (panel + c) * w.panel_bytes();
        const int64_t width = std::min<int64_t>(wide * kPanel, w.columns - panel * kPanel);
        for (int64_t r = 0, tall; r < rows.count; r += tall) {
            const int64_t rest = rows.count - r;
            tall = wide == 4 ? 1 : wide == 2 ? std::min<int64_t>(2, rest) : rest >= tallest ? tallest : rest >= 4 ? 4 : std::min<int64_t>(2, rest);
            if (wide == 1 && tallest == 6 && rest == 8) tall = 4;
            for (int i = 0; i < tall; i++) {
                row[i] = parts(rows, r + i);
                to[i] = out + (r + i) * stride + panel * kPanel;
            }
            const auto run = tall == 8   ? tile<8, 1>
                             : tall == 6 ? tile<6, 1>
                             : tall == 4 ? tile<4, 1>
                             : tall == 2 ? (wide == 2 ? tile<2, 2> : tile<2, 1>)
                             : wide == 4 ? tile<1, 4>
                             : wide == 2 ? tile<1, 2>
                                         : tile<1, 1>;
            run(rows.form, row, w, panels, to, width, add);
        }
    }
}

const Kernels kBf16{prepare_bf16, multiply_bf16};
#endif

}  // namespace

void unpack_column(const Packed &w, int64_t column, float *out, int64_t length) {
    const int64_t lane = column % kPanel;
    const uint8_t *at = w.data + column / kPanel * w.panel_bytes();
    if (w.bits == 16) {
        const uint16_t *numbers = reinterpret_cast<const uint16_t *>(at) + lane * 2;
        for (int64_t k = 0; k < length; k++) {
            const int64_t place = (k & ~int64_t(3)) + kPlace[k & 3];
            out[k] = from_bf16(numbers[(place & ~int64_t(1)) * kPanel + (place & 1)]);
        }
        return;
    }
    for (int64_t g = 0; g * w.group < length; g++, at += w.group_bytes()) {
        const uint16_t *numbers = reinterpret_cast<const uint16_t *>(at);
        const float scale = from_half(numbers[lane]);
        const float minimum = w.minimum ? from_half(numbers[kPanel + lane]) : scale * (w.bits == 4 ? -8.0f : -128.0f);
        const uint8_t *bytes = at + kPanel * 2 * (w.minimum ? 2 : 1) + 4 * lane;
        const int64_t count = std::min<int64_t>(w.group, length - g * w.group);
        for (int64_t k = 0; k < count; k++) {
            const int byte = bytes[(w.bits == 4 ? k / 8 * 64 : k / 4 * 64) + (k & 3)];
            const int q = w.bits == 8 ? byte : k & 4 ? byte >> 4 : byte & 15;
            out[g * w.group + k] = float(q) * scale + minimum;
        }
    }
}

const Kernels &packed_kernels(const std::string &level) {
#if defined(__x86_64__)
    if (level == "avx512bf16") return kBf16;
#endif
    if (level == "plain" || level == "avx2" || level == "avx512") return kPlain;
    throw std::invalid_argument("level " + level + " is not known here");
}

}  // namespace stretto
