// Matrices kept in 4, 8 or 16 bits, and products with them.
//
// A weight of 4 or 8 bits is d * q + m, with a scale d (and a minimum m, where there is one) for each output column and each group
// of inner elements, both fp16 as in GGUF; one of 16 bits is a bf16 number. Sixteen output columns make a panel and are the lanes of every vector; the inner dimension is
// never split, and each row's sum runs in one order whatever the number of rows, columns and threads: group by group; within a
// group, one chain for the high and one for the low parts of the activations.
//
// A panel is one stream: for each group sixteen d, sixteen m, then the weights, eight inner elements of sixteen columns in 64 (4 bits)
// or 128 bytes (8 bits). Byte 4 c + i of the first 64 holds element i of column c, with 4 bits in the low half and element 4 + i in the
// high half; with 8 bits elements 4 to 7 follow in the next 64. With 16 bits there are no d and m, and 64 bytes hold elements 0 and 2
// of each column, the next 64 elements 1 and 3, and so on.
#pragma once

#include <cstddef>
#include <cstdint>
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

    int64_t panels() const { return (columns + kPanel - 1) / kPanel; }
    int64_t groups() const { return inner / group; }
    int64_t numbers_bytes() const { return bits == 16 ? 0 : kPanel * 2 * (minimum ? 2 : 1); }  // of a group's d and m
    int64_t group_bytes() const { return numbers_bytes() + int64_t(group) * kPanel * bits / 8; }
    int64_t panel_bytes() const { return groups() * group_bytes(); }
    int64_t bytes() const { return panels() * panel_bytes(); }
};

// How activations enter a product.
enum class Path {
    exact,  // in 24 bits of the largest of a group: fp32 for all that matters
    bf16,   // rounded to bf16
    fast,   // in 8 bits of the largest of a group
};

// What a row of activations is made into. Whole numbers are products of bytes: inside a group their sums have no error at all.
enum class Form {
    planes,  // three signed bytes an element, the most significant first, and a scale for each group
    halves,  // bf16
    thirds,  // three bf16 numbers whose sum is the element, the largest first
    bytes,   // one signed byte, and a scale for each group
};

// 8-bit weights are no small bf16 numbers, so rounded activations meet them in planes too. Weights of 16 bits are never multiplied
// as whole numbers: their fast path is that of bf16.
inline Form form_of(Path path, int bits) {
    if (bits == 16) return path == Path::exact ? Form::thirds : Form::halves;
    if (path == Path::fast) return Form::bytes;
    return path == Path::exact || bits == 8 ? Form::planes : Form::halves;
}

// Rows of activations made ready for products with weights of one kind.
struct Rows {
    Form form;
    bool rounded;  // to bf16 beforehand
    int64_t count, inner;
    int group;
    const int32_t *order;
    const uint8_t *steps;
    uint8_t *data;

    Rows(Path path, int64_t count, const Packed &w, uint8_t *data)
        : form(form_of(path, w.bits)),
          rounded(path == Path::bf16),
          count(count),
          inner(w.inner),
          group(w.group),
          order(w.order),
          steps(w.steps),
          data(data) {}

    bool whole() const { return form == Form::planes || form == Form::bytes; }
    int64_t groups() const { return inner / group; }
    // The values, plane by plane; then for each group a scale (of whole numbers) and the sum of what the values stand for. Within
    // four neighbours halves and thirds lie in the order 0, 2, 1, 3.
    int planes() const { return form == Form::planes || form == Form::thirds ? 3 : 1; }
    int64_t values_bytes() const { return inner * planes() * (whole() ? 1 : 2); }
    int64_t row_bytes() const {
        const int64_t bytes = values_bytes() + groups() * 4 * (whole() ? 2 : 1);
        return (bytes + 63) / 64 * 64;
    }
    float largest(int64_t g) const {
        if (form == Form::planes) return float(0x7F7F00);  // three signed digits of base 256 hold it, and rounding
        return steps ? float(steps[g]) : 127.0f;
    }
    uint8_t *row(int64_t i) const { return data + i * row_bytes(); }
};

// A column as fp32: `length` numbers, of which the first `inner` may be asked for.
void unpack_column(const Packed &w, int64_t column, float *out, int64_t length);

struct Kernels {
    // Make one row ready: x [inner of the caller], zeros behind it up to rows.inner.
    void (*prepare)(const Rows &rows, int64_t row, const float *x, int64_t length);
    // out[r][c] (+)= row r . column c for all rows and the columns of panels [first, last); `out` has `stride` floats a row.
    void (*multiply)(const Rows &rows, const Packed &w, int64_t first, int64_t last, float *out, int64_t stride, bool add);
};

// The kernels of a level: "avx512bf16" (which needs AVX-512 BF16 and VNNI), or "plain" for any machine.
const Kernels &packed_kernels(const std::string &level);

}  // namespace stretto
