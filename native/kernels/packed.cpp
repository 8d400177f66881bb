#include "packed.hpp"

#include <algorithm>
#include <cmath>

#include "levels.hpp"
#include "narrow.hpp"
#include "packed_grid.hpp"
#include "packed_rows.hpp"

namespace stretto {

namespace {

// A row of weights of 16 bits' kind: each element as one or three bf16 numbers.
void prepare_parts(const Rows &rows, int64_t r, const float *x, int64_t length) {
    uint16_t *halves = reinterpret_cast<uint16_t *>(rows.values(r));
    for (int64_t k = 0; k < rows.inner; k++) {
        float rest = k < length ? x[k] : 0.0f;
        for (int plane = 0; plane < rows.planes; plane++) {
            const uint16_t part = to_bf16(rest);
            halves[plane * rows.inner + (k & ~int64_t(3)) + kPlace[k & 3]] = part;
            rest -= from_bf16(part);
        }
    }
}

void prepare_plain(const Rows &rows, int64_t r, const float *x, int64_t length) {
    if (rows.grid) return prepare_grid_plain(rows, r, x, length);
    x = sorted(rows, x, length);
    if (!rows.whole) return prepare_parts(rows, r, x, length);
    float *numbers = rows.numbers(r);
    const int group = rows.group;
    for (int64_t g = 0; g < rows.groups(); g++) {
        const auto value = [&](int i) {
            return g * group + i < length ? x[g * group + i] : 0.0f;
        };
        float most = 0.0f;
        for (int i = 0; i < group; i++) {
            const float size = std::fabs(value(i));
            most = size <= most || most != most ? most : size;  // a NaN stays
        }
        const Scale of(most, rows.largest(g));
        int8_t *bytes = reinterpret_cast<int8_t *>(rows.values(r)) + g * group;
        int64_t sum = 0;
        for (int i = 0; i < group; i++) {
            int q = int(std::lrintf(of.inverse == 0.0f ? 0.0f : value(i) * of.inverse));
            sum += q;
            for (int plane = rows.planes - 1; plane >= 0; plane--) {
                const int8_t digit = int8_t(q);
                bytes[plane * rows.inner + i] = digit;
                q = (q - digit) >> 8;
            }
        }
        numbers[2 * g * rows.tall] = of.scale;
        numbers[(2 * g + 1) * rows.tall] = of.scale * float(sum);
    }
}

// Weights that are numbers as they are, by rows in one or three parts.
void multiply_numbers_plain(const Rows &rows, const Packed &w, int64_t first, int64_t last, float *out, int64_t stride, bool add) {
    for (int64_t panel = first; panel < last; panel++) {
        const int64_t width = std::min<int64_t>(kPanel, w.columns - panel * kPanel);
        const uint16_t *at = reinterpret_cast<const uint16_t *>(w.data + panel * w.panel_bytes());
        for (int64_t r = 0; r < rows.count; r++) {
            const uint16_t *halves = rows.halves_of(r);
            for (int64_t c = 0; c < width; c++) {
                float sum[3] = {};
                for (int64_t k = 0; k < w.inner; k += 2) {
                    for (int i = 0; i < 2; i++) {
                        const float weight = from_bf16(at[k * kPanel + c * 2 + i]);
                        for (int p = 0; p < rows.planes; p++) sum[p] += weight * from_bf16(halves[p * w.inner + k + i]);
                    }
                }
                const float total = sum[0] + (sum[1] + sum[2]);
                float *to = out + r * stride + panel * kPanel + c;
                *to = add ? *to + total : total;
            }
        }
    }
}

// What the sums of `planes` planes stand for together.
float together(const int32_t (&sum)[3], int planes) {
    if (planes == 1) return float(sum[0]);
    if (planes == 2) return float(sum[0]) * 256.0f + float(sum[1]);
    return float(sum[0]) * 65536.0f + (float(sum[1]) * 256.0f + float(sum[2]));
}

void multiply_plain(const Rows &rows, const Packed &w, int64_t first, int64_t last, float *out, int64_t stride, bool add) {
    if (rows.grid) return multiply_grid_plain(rows, w, first, last, out, stride, add);
    if (w.bits == 16) return multiply_numbers_plain(rows, w, first, last, out, stride, add);
    for (int64_t panel = first; panel < last; panel++) {
        const int64_t width = std::min<int64_t>(kPanel, w.columns - panel * kPanel);
        for (int64_t r = 0; r < rows.count; r++) {
            const int8_t *values = rows.bytes_of(r);
            const float *numbers = rows.numbers(r);
            const uint8_t *at = w.data + panel * w.panel_bytes();
            float total[kPanel] = {};
            for (int64_t g = 0; g < w.groups(); g++) {
                const uint16_t *d = reinterpret_cast<const uint16_t *>(at), *m = d + kPanel;
                at += w.numbers_bytes();
                int32_t sum[kPanel][3] = {};
                for (int k = 0; k < w.group; k++) {
                    const uint8_t *bytes = at + (w.bits == 4 ? k / 8 * 64 : k / 4 * 64) + (k & 3);
                    for (int c = 0; c < kPanel; c++) {
                        const int byte = bytes[4 * c];
                        const int q = w.bits == 8 ? byte : k & 4 ? byte >> 4 : byte & 15;
                        for (int p = 0; p < rows.planes; p++) sum[c][p] += q * values[p * rows.inner + g * w.group + k];
                    }
                }
                at += int64_t(w.group) * kPanel * w.bits / 8;
                for (int c = 0; c < kPanel; c++) {
                    const float scale = from_half(d[c]);
                    const float minimum = w.minimum ? from_half(m[c]) : scale * (w.bits == 4 ? -8.0f : -128.0f);
                    total[c] = std::fma(scale, together(sum[c], rows.planes) * numbers[2 * g * rows.tall], total[c]);
                    total[c] = std::fma(minimum, numbers[(2 * g + 1) * rows.tall], total[c]);
                }
            }
            float *to = out + r * stride + panel * kPanel;
            for (int64_t c = 0; c < width; c++) to[c] = add ? to[c] + total[c] : total[c];
        }
    }
}

const Kernels kPlain{prepare_plain, multiply_plain};

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
    require_level(level);
#if defined(__x86_64__)
    if (level == "amx") return kPackedAmx;
    if (level == "avx512bf16") return kPackedAvx512;
    if (level == "avx512" || level == "avx2") return kPackedAvx2;
#endif
    return kPlain;
}

}  // namespace stretto
