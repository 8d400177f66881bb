// What lies between a decoder's products, for whoever works row by row in fp32.
#pragma once

#include <cstdint>
#include <string>

namespace stretto {

struct RowKernels {
    // Root-mean-square norm; `out` may be `x`.
    void (*norm)(const float *x, const float *weight, float *out, int64_t width, float epsilon);
    // Turn `count` heads in place; turns [dim]: cosine and sine of each pair of neighbours.
    void (*rotate)(float *heads, const float *turns, int64_t count, int64_t dim);
    // out = silu(gate) * up.
    void (*gate)(const float *gate, const float *up, float *out, int64_t width);
    // The place of the first largest value, or of the first that is no number.
    int64_t (*largest)(const float *values, int64_t count);
};

// The kernels of a level of instructions; throws as require_level.
const RowKernels &row_kernels(const std::string &level);

}  // namespace stretto
