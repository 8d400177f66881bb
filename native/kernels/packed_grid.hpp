// Products of whole numbers from end to end: activations on one grid a row, weights on one grid a column.
//
// A weight is units[column] * w with w = d * (q - 8) + m, whole numbers that fit 16 bits; an activation is unit * x, where x has two
// digits of base 255: x = 255 * high + low, each from -127 to 127. A row's sum with a column is 255 * H + L, where H and L are the sums of
// w times the high and the low digits. Both are exact, in whatever order and by whatever instruction they are made, so that all levels give
// the same bits for any number of rows; what may come out in rounding happens once, at the end.
//
// Long rows are cut into sections, as few as there must be, of no more than kSection elements: the sums of a section fit 32 bits because the
// grid of the weights is made so coarse that they do (`largest_weight`). The sections' results are added up one after another in fp32.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "packed.hpp"

namespace stretto {

enum { kHigh, kLow };              // digits
constexpr int kPiece = 32;         // elements that share d and m at least
constexpr int kStep = 64;          // elements of a tile's row
constexpr int64_t kSection = 8192;
constexpr float kBase = 255.0f, kLargest = 255.0f * 127.0f + 127.0f;

inline int64_t steps_of(int64_t inner) { return (inner + kStep - 1) / kStep; }

// Steps of a section, all of one length but the last.
inline int64_t section_steps(int64_t inner) {
    const int64_t steps = steps_of(inner), sections = (inner + kSection - 1) / kSection;
    return (steps + sections - 1) / sections;
}

// |w| at most, so that the sums of a section fit 32 bits.
inline int32_t largest_weight(int64_t inner) {
    return int32_t(std::min<int64_t>(32767, std::numeric_limits<int32_t>::max() / (section_steps(inner) * kStep * 127)));
}

// Where the parts of row r lie. The digits of a block of rows are tiles, two for each step, of high digits and of low ones: 64 elements a
// row, row after row, zeros behind a row's end. Then come each row's numbers: for each piece and digit -8 times the sum of its digits, and that
// sum; the unit.
struct GridRow {
    int8_t *digits;   // high, of the first step
    int64_t between;  // from high digits to low ones, and on to the next step
    int32_t *numbers;
    float *unit;

    GridRow(const Rows &rows, int64_t r) {
        const int64_t steps = steps_of(rows.inner), place = r % Rows::kTall;
        int8_t *block = reinterpret_cast<int8_t *>(rows.block(r));
        between = rows.tall * kStep;
        digits = block + place * kStep;
        numbers = reinterpret_cast<int32_t *>(block + 2 * steps * between + place * Rows::grid_numbers_bytes(rows.inner));
        unit = reinterpret_cast<float *>(numbers + 8 * steps);
    }

    int8_t *at(int plane, int64_t k) const { return digits + (k / kStep * 2 + plane) * between + k % kStep; }
    int32_t &start(int plane, int64_t piece) const { return numbers[piece * 4 + plane]; }
    int32_t &sum(int plane, int64_t piece) const { return numbers[piece * 4 + 2 + plane]; }
};

// The grid of a row whose largest magnitude is `most`, infinity if something in it is not finite.
struct RowGrid {
    float unit, inverse;
    explicit RowGrid(float most) {
        if (!(most < std::numeric_limits<float>::infinity())) {
            unit = std::numeric_limits<float>::quiet_NaN(), inverse = 0.0f;
            return;
        }
        unit = most / kLargest;
        if (!(unit >= std::numeric_limits<float>::min())) unit = 0.0f;  // as good as zero
        inverse = unit > 0.0f ? 1.0f / unit : 0.0f;
    }
};

// Levels: each makes rows ready and multiplies as `Kernels` say, for rows and weights on grids.
void prepare_grid_plain(const Rows &rows, int64_t row, const float *x, int64_t length);
void multiply_grid_plain(const Rows &rows, const Packed &w, int64_t first, int64_t last, float *out, int64_t stride, bool add);
#if defined(__x86_64__)
void prepare_grid_avx2(const Rows &rows, int64_t row, const float *x, int64_t length);
void multiply_grid_avx2(const Rows &rows, const Packed &w, int64_t first, int64_t last, float *out, int64_t stride, bool add);
void prepare_grid_avx512(const Rows &rows, int64_t row, const float *x, int64_t length);
void multiply_grid_avx512(const Rows &rows, const Packed &w, int64_t first, int64_t last, float *out, int64_t stride, bool add);
void multiply_grid_amx(const Rows &rows, const Packed &w, int64_t first, int64_t last, float *out, int64_t stride, bool add);
#endif

// Turn fp16 d and m of `w`, of 4 bits, into whole numbers where they lie, and give each lane of its panels a unit.
void put_on_grid(const Packed &w, float *units);

}  // namespace stretto
