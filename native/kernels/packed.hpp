// Matrices kept in 4, 8 or 16 bits, and products with them.
//
// A weight of 4 or 8 bits is d * q + m, with a scale d (and a minimum m, where there is one) for each output column and each group
// of inner elements, both fp16 as in GGUF; one of 16 bits is a bf16 number. Sixteen output columns make a panel and are the lanes of every vector; the inner dimension is
// never split, and each row's sum runs in one order whatever the number of rows, columns and threads: group by group.
//
// A panel is one stream: for each group sixteen d, sixteen m, then the weights, eight inner elements of sixteen columns in 64 (4 bits)
// or 128 bytes (8 bits). Byte 4 c + i of the first 64 holds element i of column c, with 4 bits in the low half and element 4 + i in the
// high half; with 8 bits elements 4 to 7 follow in the next 64. With 16 bits there are no d and m, and 64 bytes hold elements 0 and 2
// of each column, the next 64 elements 1 and 3, and so on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>

namespace stretto {

constexpr int kPanel = 16;

struct Packed {
    const uint8_t *data;
    int64_t columns, inner;  // inner is a multiple of `group`
    int group;               // a multiple of 32
    int bits;                // 4, 8 or 16
    bool minimum;            // whether each group has an m; else m is -8 d (4 bits) or 0 (8 bits, signed)
    // Mixed precision, for which inner elements are sorted: element i of a row is number order[i] of what the caller gives, or 0
    // where that is negative; null where nothing is sorted. On the fast path group g keeps steps[g] steps to either side of zero;
    // null: 127 everywhere.
    const int32_t *order = nullptr;
    const uint8_t *steps = nullptr;
    // One grid for a whole column, of weights of 4 bits: d and m are whole numbers of 16 bits, a weight is
    // units[column] * (d * (q - 8) + m), and there is a unit for every lane of every panel. Null: d and m are fp16. See packed_grid.hpp.
    const float *units = nullptr;

    int64_t panels() const { return (columns + kPanel - 1) / kPanel; }
    int64_t groups() const { return inner / group; }
    int64_t numbers_bytes() const { return bits == 16 ? 0 : kPanel * 2 * (minimum ? 2 : 1); }  // of a group's d and m
    int64_t group_bytes() const { return numbers_bytes() + int64_t(group) * kPanel * bits / 8; }
    int64_t panel_bytes() const { return groups() * group_bytes(); }
    int64_t bytes() const { return panels() * panel_bytes(); }
    // The columns of a panel, and all behind them.
    Packed from(int64_t panel) const {
        Packed rest = *this;
        rest.data += panel * panel_bytes();
        rest.columns -= panel * kPanel;
        if (units) rest.units += panel * kPanel;
        return rest;
    }
};

// How activations enter a product.
enum class Path {
    exact,  // in 24 bits of the largest of a group: fp32 for all that matters
    bf16,   // in 12 bits of the largest of a group, in 16 of a row on a grid; rounded to bf16 where weights are
    fast,   // in 8 bits of the largest of a group
};

// Rows of activations made ready for products with weights of one kind.
//
// For weights of 4 and 8 bits an element becomes a whole number, in 24 (exact), 12 (bf16: the error of a sum is a fifth of what rounding to
// bf16 would give) or 8 bits (fast) of the largest of its group: `planes` signed bytes, the most significant first. Products of bytes are
// whole numbers, so inside a group their sums have no error at all, and it does not matter which instructions add them up.
//
// For tiles, numbers of 24 or 12 bits that meet 4-bit weights are kept as `twelves` instead: digits of 12 bits, each of which is sixteen times a
// signed byte and one of 0 .. 15. Of 32 elements first come the 32 bytes, then the 32 rests. One product of bytes with weights times
// sixteen, and with the weights, is a product with 12 bits.
//
// Weights of 16 bits meet three bf16 numbers whose sum is the element, the largest first (exact), or one; within four neighbours these
// lie in the order 0, 2, 1, 3. By AVX2 the exact ones meet fp32 instead, as it is.
//
// `tall` rows make a block: first their values, row by row and plane by plane, each row on a cache line; then, of whole numbers, for
// each group the scales of all rows and the sums of what their values stand for.
struct Rows {
    static constexpr int kTall = 16;

    bool grid;    // on one grid a row, to meet weights of that kind; see packed_grid.hpp
    bool whole;   // whole numbers, else bf16
    int planes;   // of a row
    int twelves;  // digits of 12 bits in place of planes, or 0
    int64_t count, inner;
    int group;
    const int32_t *order;
    const uint8_t *steps;
    int tall;
    uint8_t *data = nullptr;

    // `tiles_from`: from how many rows on they are made for tiles.
    Rows(Path path, int64_t count, const Packed &w, int64_t tiles_from)
        : grid(w.units != nullptr),
          whole(w.bits != 16),
          planes(path == Path::exact ? 3 : path == Path::bf16 && whole ? 2 : 1),
          twelves(!grid && w.bits == 4 && planes > 1 && count >= tiles_from ? planes - 1 : 0),
          count(count),
          inner(w.inner),
          group(w.group),
          order(w.order),
          steps(w.steps),
          tall(int(count < kTall ? count : kTall)) {}

    int64_t groups() const { return inner / group; }
    int64_t stride() const { return lines(inner * (twelves ? 2 * twelves : planes * (whole ? 1 : 2))); }  // bytes from row to row of a block
    int64_t block_bytes() const { return grid ? tall * grid_row_bytes(inner) : tall * stride() + (whole ? lines(groups() * 2 * tall * 4) : 0); }
    // With room behind the last numbers, so that a whole block of them can be read from anywhere.
    int64_t bytes() const { return count ? (count + tall - 1) / tall * block_bytes() + kTall * 4 : 0; }

    float largest(int64_t g) const {
        if (planes == 3) return float(0x7F7F00);  // three signed digits of base 256 hold it, and rounding
        if (planes == 2) return 2047.0f;
        return steps ? float(steps[g]) : 127.0f;
    }
    uint8_t *block(int64_t r) const { return data + r / kTall * block_bytes(); }  // fewer than kTall rows are one block
    uint8_t *values(int64_t r) const { return block(r) + r % kTall * stride(); }
    const int8_t *bytes_of(int64_t r) const { return reinterpret_cast<const int8_t *>(values(r)); }
    const uint16_t *halves_of(int64_t r) const { return reinterpret_cast<const uint16_t *>(values(r)); }
    // Where a row's numbers begin: the scale of group g is number 2 g tall, the sum number (2 g + 1) tall.
    float *numbers(int64_t r) const {
        return reinterpret_cast<float *>(block(r) + tall * stride()) + r % kTall;
    }
    // Rows from `first` on, which must begin a block.
    Rows from(int64_t first, int64_t rows) const {
        Rows some = *this;
        some.count = rows;
        some.data = block(first);
        return some;
    }

    // Of a row on a grid: both digits of each element, and its numbers; see packed_grid.hpp.
    static int64_t grid_row_bytes(int64_t inner) { return (inner + 63) / 64 * 64 * 2 + grid_numbers_bytes(inner); }
    static int64_t grid_numbers_bytes(int64_t inner) {
        const int64_t steps = (inner + 63) / 64;
        return lines(steps * 2 * 4 * 4 + 4);
    }

  private:
    static int64_t lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }
};

// A column as fp32: `length` numbers, of which the first `inner` may be asked for; not of a matrix on grids.
void unpack_column(const Packed &w, int64_t column, float *out, int64_t length);

struct Kernels {
    // Make one row ready: x [inner of the caller], zeros behind it up to rows.inner.
    void (*prepare)(const Rows &rows, int64_t row, const float *x, int64_t length);
    // out[r][c] (+)= row r . column c for all rows and the columns of panels [first, last); `out` has `stride` floats a row.
    void (*multiply)(const Rows &rows, const Packed &w, int64_t first, int64_t last, float *out, int64_t stride, bool add);
    int64_t tiles_from = std::numeric_limits<int64_t>::max();  // see Rows
    int64_t grid_rows = 64;  // see row_block

    // Rows of a product at once: their activations stay in a core's own cache.
    int64_t row_block(const Packed &w) const { return w.units ? grid_rows : 64; }
};

// The kernels of a level: "amx", "avx512bf16" (which needs AVX-512 BF16 and VNNI), "avx2", which is also that of "avx512", or "plain" for any
// machine.
const Kernels &packed_kernels(const std::string &level);

#if defined(__x86_64__)
extern const Kernels kPackedAvx2, kPackedAvx512, kPackedAmx;
#endif

}  // namespace stretto
