// Products of whole numbers by AMX: tiles of sixteen rows by sixteen columns by 64 elements.
//
// A weight is made into two bytes, 256 * high + low, and meets the digits of the activations in tiles that are added up over a whole section,
// with nothing to be done in between: two products of bytes a step, and two more where a row has high digits. A panel is unpacked
// once for all rows of a call, so tiles pay from some number of rows on.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>

#include "amx_tiles.hpp"
#include "buffer.hpp"
#include "packed_grid.hpp"
#include "packed_vectors.hpp"

namespace stretto {

namespace {

constexpr int64_t kFewest = 9;  // rows below which vectors are as fast
constexpr int64_t kStepBytes = 2 * kStep * kPanel;

// Tiles by their numbers: the sums of high and of low digits with high and with low bytes of weights; digits; bytes.
enum { kSums = 0, kDigits = 4, kBytes = 6 };

TileShapes shapes_of(int height) {
    TileShapes shapes;
    for (int tile = kSums; tile < kBytes; tile++) shapes.rows[tile] = uint8_t(height);
    return shapes;
}

// Low bytes of a step's weights, four inner elements of sixteen columns in 64 of them, and behind them the high ones. What is behind an
// odd number of pieces is left as it is: rows have zeros there.
template <bool MINIMUM>
STRETTO_TARGET_BF16 void unpack(const Packed &w, const uint8_t *panel, uint8_t *to) {
    const __m512i fifteen = _mm512_set1_epi16(15), below = _mm512_set1_epi16(255);
    const auto pairs = [](const uint8_t *at) STRETTO_INLINE_BF16 {
        const __m512i one = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(at)));
        return _mm512_or_si512(one, _mm512_slli_epi32(one, 16));
    };
    const int64_t pieces = w.inner / kPiece, of_group = w.group / kPiece;
    const uint8_t *group = panel, *at = group + w.numbers_bytes();
    for (int64_t piece = 0, inside = 0; piece < pieces; piece++, inside++) {
        if (inside == of_group) inside = 0, group = at, at += w.numbers_bytes();
        uint8_t *low = to + piece / 2 * kStepBytes + piece % 2 * (kPiece * kPanel), *high = low + kStep * kPanel;
        const __m512i d = pairs(group);
        __m512i start = _mm512_slli_epi16(_mm512_sub_epi16(_mm512_setzero_si512(), d), 3);  // of q = 0
        if constexpr (MINIMUM) start = _mm512_add_epi16(start, pairs(group + kPanel * 2));
        const auto weights = [&](__m512i q) STRETTO_INLINE_BF16 {
            return _mm512_add_epi16(_mm512_mullo_epi16(q, d), start);
        };
        for (int i = 0; i < 4; i++, at += 64) {
            const __m512i bytes = _mm512_loadu_si512(at);
            _mm_prefetch(reinterpret_cast<const char *>(at) + w.panel_bytes(), _MM_HINT_T1);
            const __m512i even[2] = {weights(_mm512_and_si512(bytes, fifteen)),
                                     weights(_mm512_and_si512(_mm512_srli_epi16(bytes, 4), fifteen))};
            const __m512i odd[2] = {weights(_mm512_and_si512(_mm512_srli_epi16(bytes, 8), fifteen)), weights(_mm512_srli_epi16(bytes, 12))};
            for (int half = 0; half < 2; half++, low += 64, high += 64) {
                // 0xCA: the second where the first has ones, else the third
                _mm512_store_si512(low, _mm512_ternarylogic_epi64(below, even[half], _mm512_slli_epi16(odd[half], 8), 0xCA));
                _mm512_store_si512(high, _mm512_ternarylogic_epi64(below, _mm512_srli_epi16(even[half], 8), odd[half], 0xCA));
            }
        }
    }
}

// As tiles lie in memory: digit by digit, with high bytes of weights and with low ones.
using Sums = int32_t[2][2][kTile][kTile];

// Of the digits of a block of rows over the steps [first, last).
void sum_steps(const int8_t *digits, int64_t between, const uint8_t *weights, int64_t first, int64_t last, Sums &to) {
    clear_tile<kSums>();
    clear_tile<kSums + 1>();
    clear_tile<kSums + 2>();
    clear_tile<kSums + 3>();
    for (int64_t step = first; step < last; step++) {
        const int8_t *at = digits + 2 * step * between;
        load_tile<kDigits + kHigh>(at, kStep);
        load_tile<kBytes + kLow>(weights + step * kStepBytes, kStep);
        multiply_bytes<kSums + 1, kDigits + kHigh, kBytes + kLow>();
        load_tile<kBytes + kHigh>(weights + step * kStepBytes + kStep * kPanel, kStep);
        multiply_signed<kSums, kDigits + kHigh, kBytes + kHigh>();
        load_tile<kDigits + kLow>(at + between, kStep);
        multiply_bytes<kSums + 3, kDigits + kLow, kBytes + kLow>();
        multiply_signed<kSums + 2, kDigits + kLow, kBytes + kHigh>();
    }
    store_tile<kSums>(to[kHigh][kHigh]);
    store_tile<kSums + 1>(to[kHigh][kLow]);
    store_tile<kSums + 2>(to[kLow][kHigh]);
    store_tile<kSums + 3>(to[kLow][kLow]);
}

// The sums of a digit of row r with whole weights; wrong in between, they are right where they fit 32 bits again.
STRETTO_INLINE_BF16 inline __m512i joined(const Sums &sums, int digit, int r) {
    const __m512i high = _mm512_slli_epi32(_mm512_load_si512(sums[digit][kHigh][r]), 8);
    return _mm512_add_epi32(high, _mm512_load_si512(sums[digit][kLow][r]));
}

}  // namespace

STRETTO_TARGET_BF16 void multiply_grid_amx(const Rows &rows, const Packed &w, int64_t first, int64_t last, float *out, int64_t stride,
                                           bool add) {
    if (rows.count < kFewest) return multiply_grid_avx512(rows, w, first, last, out, stride, add);
    static thread_local Buffer<uint8_t> weights_room;
    const int64_t steps = steps_of(w.inner), section = section_steps(w.inner), between = rows.tall * kStep;
    const int64_t apart = Rows::grid_numbers_bytes(w.inner) / 4;  // units of neighbouring rows
    uint8_t *weights = weights_room.get(steps * kStepBytes);
    alignas(64) Sums sums;
    alignas(64) float totals[kTile][kPanel];
    int shaped = 0;
    for (int64_t panel = first; panel < last; panel++) {
        (w.minimum ? unpack<true> : unpack<false>)(w, w.data + panel * w.panel_bytes(), weights);
        const float *units = w.units + panel * kPanel;
        const int64_t width = w.columns - panel * kPanel;
        for (int64_t begin = 0; begin < rows.count; begin += kTile) {
            const int height = int(std::min<int64_t>(kTile, rows.count - begin));
            if (height != shaped) shapes_of(height).use();
            shaped = height;
            const GridRow row(rows, begin);
            for (int64_t from = 0; from < steps; from += section) {
                const int64_t end = std::min(from + section, steps);
                sum_steps(row.digits, between, weights, from, end, sums);
                for (int r = 0; r < height; r++) {
                    const Lanes both = grid_together(joined(sums, kLow, r), joined(sums, kHigh, r));
                    const Lanes total = from ? _mm512_add_ps(_mm512_load_ps(totals[r]), both) : both;
                    if (end < steps) {
                        _mm512_store_ps(totals[r], total);
                    } else {
                        put_grid(total, row.unit[r * apart], units, out + (begin + r) * stride + panel * kPanel, width, add);
                    }
                }
            }
        }
    }
    TileShapes::release();
}

}  // namespace stretto
#endif
