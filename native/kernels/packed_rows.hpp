// What the levels of packed products share in making rows ready.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "packed.hpp"

namespace stretto {

// Where element k of four neighbours lies among its bf16 values.
constexpr int kPlace[4] = {0, 2, 1, 3};

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
inline const float *sorted(const Rows &rows, const float *x, int64_t &length) {
    if (!rows.order) return x;
    thread_local std::vector<float> room;
    room.resize(static_cast<size_t>(rows.inner));
    for (int64_t i = 0; i < rows.inner; i++) room[i] = rows.order[i] < 0 ? 0.0f : x[rows.order[i]];
    length = rows.inner;
    return room.data();
}

}  // namespace stretto
