// Products of whole numbers: weights are put on their grid, and what any machine can run.
#include "packed_grid.hpp"

#include <cmath>

#include "narrow.hpp"

namespace stretto {

void prepare_grid_plain(const Rows &rows, int64_t r, const float *x, int64_t length) {
    const GridRow row(rows, r);
    float most = 0.0f;
    for (int64_t k = 0; k < length; k++) {
        const float size = std::fabs(x[k]);
        most = size <= most || most != most ? most : size;  // a NaN stays
    }
    const RowGrid grid(most);
    *row.unit = grid.unit;
    for (int64_t piece = 0; piece < steps_of(rows.inner) * 2; piece++) {
        int32_t sums[2] = {};
        for (int64_t k = piece * kPiece; k < (piece + 1) * kPiece; k++) {
            const float scaled = k < length && grid.inverse > 0.0f ? x[k] * grid.inverse : 0.0f;
            const int32_t q = int32_t(std::lrintf(scaled));
            const int32_t high = int32_t(std::lrintf(float(q) * (1.0f / kBase))), low = q - 255 * high;
            *row.at(kHigh, k) = int8_t(high), *row.at(kLow, k) = int8_t(low);
            sums[kHigh] += high, sums[kLow] += low;
        }
        for (int plane : {kHigh, kLow}) row.start(plane, piece) = -8 * sums[plane], row.sum(plane, piece) = sums[plane];
    }
}

void multiply_grid_plain(const Rows &rows, const Packed &w, int64_t first, int64_t last, float *out, int64_t stride, bool add) {
    const int64_t pieces = w.inner / kPiece, section = section_steps(w.inner) * 2, of_group = w.group / kPiece;
    for (int64_t panel = first; panel < last; panel++) {
        const int64_t width = std::min<int64_t>(kPanel, w.columns - panel * kPanel);
        for (int64_t r = 0; r < rows.count; r++) {
            const GridRow row(rows, r);
            const uint8_t *at = w.data + panel * w.panel_bytes();
            const int16_t *numbers = nullptr;
            float total[kPanel] = {};
            for (int64_t from = 0; from < pieces; from += section) {
                int32_t sum[2][kPanel] = {};
                for (int64_t piece = from; piece < std::min(from + section, pieces); piece++, at += kPiece * kPanel / 2) {
                    if (piece % of_group == 0) numbers = reinterpret_cast<const int16_t *>(at), at += w.numbers_bytes();
                    int32_t of_piece[2][kPanel] = {};
                    for (int k = 0; k < kPiece; k++) {
                        const uint8_t *bytes = at + k / 8 * 64 + (k & 3);
                        const int shift = k & 4;
                        const int32_t digits[2] = {*row.at(kHigh, piece * kPiece + k), *row.at(kLow, piece * kPiece + k)};
                        for (int c = 0; c < kPanel; c++) {
                            const int32_t q = (bytes[4 * c] >> shift & 15) - 8;
                            for (int plane : {kHigh, kLow}) of_piece[plane][c] += q * digits[plane];
                        }
                    }
                    for (int plane : {kHigh, kLow}) {
                        for (int c = 0; c < kPanel; c++) {
                            const int32_t more = w.minimum ? numbers[kPanel + c] * row.sum(plane, piece) : 0;
                            sum[plane][c] += numbers[c] * of_piece[plane][c] + more;
                        }
                    }
                }
                for (int c = 0; c < kPanel; c++) {
                    const float both = std::fma(float(sum[kHigh][c]), kBase, float(sum[kLow][c]));
                    total[c] = from ? total[c] + both : both;
                }
            }
            float *to = out + r * stride + panel * kPanel;
            for (int64_t c = 0; c < width; c++) {
                to[c] = std::fma(total[c] * *row.unit, w.units[panel * kPanel + c], add ? to[c] : 0.0f);
            }
        }
    }
}

void put_on_grid(const Packed &w, float *units) {
    uint8_t *data = const_cast<uint8_t *>(w.data);
    const double largest = largest_weight(w.inner) - 5;  // less what rounding may add
    for (int64_t column = 0; column < w.panels() * kPanel; column++) {
        const int64_t lane = column % kPanel;
        uint8_t *panel = data + column / kPanel * w.panel_bytes();
        const auto numbers = [&](int64_t g) { return reinterpret_cast<uint16_t *>(panel + g * w.group_bytes()) + lane; };
        const auto middle = [&](const uint16_t *at) {  // what q = 8 stands for
            return w.minimum ? double(from_half(at[kPanel])) + 8.0 * double(from_half(*at)) : 0.0;
        };
        double most = 0.0;
        for (int64_t g = 0; g < w.groups(); g++) {
            const double size = 8.0 * std::fabs(double(from_half(*numbers(g)))) + std::fabs(middle(numbers(g)));
            most = size <= most ? most : size;  // what is no number stays
        }
        const bool finite = most < std::numeric_limits<double>::infinity();
        const float unit = finite ? float(most / largest) : std::numeric_limits<float>::quiet_NaN();
        for (int64_t g = 0; g < w.groups(); g++) {
            uint16_t *at = numbers(g);
            const double whole[2] = {double(from_half(*at)), middle(at)};
            for (int i = 0; i < (w.minimum ? 2 : 1); i++) {
                at[i * kPanel] = uint16_t(int16_t(unit > 0.0f ? std::lrint(whole[i] / double(unit)) : 0));
            }
        }
        units[column] = unit;
    }
}

}  // namespace stretto
