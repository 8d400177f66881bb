// Packed products of many rows by AMX: tiles of sixteen rows by sixteen columns, bytes into whole numbers.
//
// Inside a group sums are exact whichever instruction makes them, and groups are added up as all levels do it, so a row's result is the same
// to the last bit as that of the AVX-512 level, which does what has few rows. Tiles cannot be scaled, so the sums of each group go through memory:
// that and the scaling take three quarters of the time, and the multiplying itself the rest.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>

#include "amx_tiles.hpp"
#include "buffer.hpp"
#include "packed.hpp"
#include "packed_vectors.hpp"

namespace stretto {

namespace {

constexpr int64_t kFewest = 8, kFewestBytes = 16;  // rows below which vectors are as fast; with weights of 8 bits

// Tiles by their numbers: the sums of up to three planes, rows, weights.
enum { kSums = 0, kRows = 3, kWeights = 4 };

// SUM += rows (signed bytes) times weights (unsigned).
template <int SUM>
inline void multiply_tiles() {
    multiply_bytes<SUM, kRows, kWeights>();
}

// The shapes for blocks of `height` rows and `depth` inner elements at once.
TileShapes shapes_of(int height, int depth) {
    TileShapes shapes;
    for (int tile = kSums; tile <= kRows; tile++) shapes.rows[tile] = uint8_t(height);
    shapes.row_bytes[kRows] = uint16_t(depth);
    shapes.rows[kWeights] = uint8_t(depth / 4);
    return shapes;
}

// How many bytes of a row a tile holds: 32 elements as twelves, else no more than a group.
int depth_of(const Rows &rows) { return !rows.twelves && rows.group % 64 ? 32 : 64; }

// One panel made ready, and where its results go: weights as bytes, four inner elements of sixteen columns in 64 of them, groups
// `group_bytes` apart; for twelves each 32 elements times sixteen, then as they are. For each group sixteen scales and sixteen minima.
// `ahead` is the panel after it as it is in memory, `ahead_bytes` a group of it, or null.
struct Panel {
    const uint8_t *weights;
    int64_t group_bytes;
    const float *numbers;
    float *out;
    int64_t stride, width;
    bool add;
    const uint8_t *ahead;
    int64_t ahead_bytes;

    // Ask for group g of the panel after this one, so that it comes from memory while this one is multiplied. Always inlined: calls of
    // a function that does nothing but ask are thrown away by GCC as having no effect.
    STRETTO_INLINE_BF16 inline void ask_ahead(int64_t g) const {
        if (!ahead) return;
        for (int64_t i = 0; i < ahead_bytes; i += 64) _mm_prefetch(reinterpret_cast<const char *>(ahead + g * ahead_bytes + i), _MM_HINT_T0);
    }
};

template <int BITS, bool MINIMUM>
STRETTO_TARGET_BF16 void unpack(const Packed &w, bool twelves, const uint8_t *data, uint8_t *weights, float *numbers) {
    const __m512i fifteen = _mm512_set1_epi8(15);
    for (int64_t g = 0; g < w.groups(); g++, data += w.group_bytes()) {
        const uint16_t *d = reinterpret_cast<const uint16_t *>(data);
        const Lanes scale = halves(d);
        _mm512_store_ps(numbers + 2 * g * kPanel, scale);
        _mm512_store_ps(numbers + (2 * g + 1) * kPanel, minimum_of<BITS, MINIMUM>(d, scale));
        if constexpr (BITS == 8) continue;  // its bytes lie well where they are
        const uint8_t *at = data + w.numbers_bytes();
        for (int k = 0; k < w.group; k += 32) {
            for (int i = 0; i < 4; i++, at += 64, weights += 128) {
                const __m512i both = _mm512_loadu_si512(at);
                const __m512i low = _mm512_and_si512(both, fifteen), high = _mm512_and_si512(_mm512_srli_epi16(both, 4), fifteen);
                if (twelves) {
                    _mm512_store_si512(weights, _mm512_slli_epi16(low, 4));
                    _mm512_store_si512(weights + 64, _mm512_andnot_si512(fifteen, both));
                    _mm512_store_si512(weights + 512, low);
                    _mm512_store_si512(weights + 576, high);
                } else {
                    _mm512_store_si512(weights, low);
                    _mm512_store_si512(weights + 64, high);
                }
            }
            if (twelves) weights += 512;
        }
    }
}

// The sums of a group, those of each plane or digit a tile, to `to`. Planes or digits lie `between` bytes apart in a row, the `pieces` of a
// group `step` bytes, and their weights `weights_step`.
template <int SUMS>
STRETTO_INLINE_BF16 inline void sum_group(const int8_t *values, int64_t stride, int64_t between, int64_t step, int pieces,
                                          const uint8_t *weights, int64_t weights_step, int32_t *to) {
    clear_tile<kSums>();
    if constexpr (SUMS > 1) clear_tile<kSums + 1>();
    if constexpr (SUMS > 2) clear_tile<kSums + 2>();
    for (int piece = 0; piece < pieces; piece++, values += step, weights += weights_step) {
        load_tile<kWeights>(weights, 64);
        load_tile<kRows>(values, stride);
        multiply_tiles<kSums>();
        if constexpr (SUMS > 1) {
            load_tile<kRows>(values + between, stride);
            multiply_tiles<kSums + 1>();
        }
        if constexpr (SUMS > 2) {
            load_tile<kRows>(values + 2 * between, stride);
            multiply_tiles<kSums + 2>();
        }
    }
    store_tile<kSums>(to);
    if constexpr (SUMS > 1) store_tile<kSums + 1>(to + kTile * kTile);
    if constexpr (SUMS > 2) store_tile<kSums + 2>(to + 2 * kTile * kTile);
}

// What the sums of digits of 12 bits stand for together.
template <int SUMS>
STRETTO_TARGET_BF16 inline Lanes twelves_together(const __m512i (&sums)[SUMS]) {
    const Lanes first = _mm512_cvtepi32_ps(sums[0]);
    if constexpr (SUMS == 1) return first;
    return _mm512_fmadd_ps(first, _mm512_set1_ps(4096.0f), _mm512_cvtepi32_ps(sums[1]));
}

// A block of `height` rows, at most R, from row `first` on, by one panel. The tiles of a group are under way while the one before it is
// added up. Groups take turns in two buffers, each with instructions of its own: a processor guesses by the instruction which store a load
// waits for, and with one instruction for both would wait for the tiles under way.
template <int R, int SUMS, bool TWELVES>
STRETTO_TARGET_BF16 void multiply_block(const Rows &rows, int64_t first, int height, const Panel &panel) {
    using Sums = int32_t[SUMS][kTile][kTile];
    alignas(64) Sums even, odd;
    const int8_t *values = rows.bytes_of(first);
    const float *numbers = rows.numbers(first);
    const int64_t groups = rows.groups(), stride = rows.stride();
    const int depth = depth_of(rows), pieces = rows.group / (TWELVES ? 32 : depth);
    const int64_t between = TWELVES ? 64 : rows.inner, step = TWELVES ? 64 * SUMS : depth;
    Lanes total[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) total[r] = _mm512_setzero_ps();
    const auto sum = [&](int64_t g, Sums &to) STRETTO_INLINE_BF16 {
        panel.ask_ahead(g);
        sum_group<SUMS>(values + g * pieces * step, stride, between, step, pieces, panel.weights + g * panel.group_bytes,
                        depth * kPanel, to[0][0]);
    };
    const auto add = [&](int64_t g, const Sums &sums) STRETTO_INLINE_BF16 {
        const Lanes scale = _mm512_load_ps(panel.numbers + 2 * g * kPanel);
        const Lanes minimum = _mm512_load_ps(panel.numbers + (2 * g + 1) * kPanel);
        const float *row_scales = numbers + 2 * g * rows.tall, *row_sums = row_scales + rows.tall;
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            __m512i of_row[SUMS];
#pragma GCC unroll 3
            for (int i = 0; i < SUMS; i++) of_row[i] = _mm512_load_si512(sums[i][r]);
            Lanes whole;
            if constexpr (TWELVES) {
                whole = twelves_together(of_row);
            } else {
                whole = together(of_row);
            }
            total[r] = add_group(total[r], whole, scale, minimum, row_scales[r], row_sums[r]);
        }
    };
    sum(0, even);
    for (int64_t g = 0; g < groups; g += 2) {
        if (g + 1 < groups) sum(g + 1, odd);
        add(g, even);
        if (g + 1 == groups) break;
        if (g + 2 < groups) sum(g + 2, even);
        add(g + 1, odd);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        if (r < height) put(total[r], panel.out + (first + r) * panel.stride, panel.width, panel.add);
    }
}

template <int SUMS, bool TWELVES>
STRETTO_TARGET_BF16 void multiply_sums(const Rows &rows, const Packed &w, int64_t first, int64_t last, float *out, int64_t stride,
                                       bool add) {
    static thread_local Buffer<uint8_t> weights_room;
    static thread_local Buffer<float> numbers_room;
    uint8_t *weights = w.bits == 8 ? nullptr : weights_room.get(w.inner * kPanel * (TWELVES ? 2 : 1));
    float *numbers = numbers_room.get(w.groups() * 2 * kPanel);
    const auto make_ready = w.bits == 8 ? unpack<8, false> : w.minimum ? unpack<4, true> : unpack<4, false>;
    int shaped = 0;
    for (int64_t p = first; p < last; p++) {
        const uint8_t *data = w.data + p * w.panel_bytes();
        make_ready(w, TWELVES, data, weights, numbers);
        Panel panel{w.bits == 8 ? data + w.numbers_bytes() : weights,
                          w.bits == 8 ? w.group_bytes() : int64_t(w.group) * kPanel * (TWELVES ? 2 : 1),
                          numbers,
                          out + p * kPanel,
                          stride,
                          std::min<int64_t>(kPanel, w.columns - p * kPanel),
                          add,
                          p + 1 < w.panels() ? data + w.panel_bytes() : nullptr,
                          w.group_bytes()};
        for (int64_t r = 0; r < rows.count; r += rows.tall) {
            const int height = int(std::min<int64_t>(rows.tall, rows.count - r));
            if (height != shaped) shapes_of(height, depth_of(rows)).use();
            shaped = height;
            const auto run = height <= 8 ? multiply_block<8, SUMS, TWELVES> : multiply_block<16, SUMS, TWELVES>;
            run(rows, r, height, panel);
            panel.ahead = nullptr;
        }
    }
    TileShapes::release();
}

STRETTO_TARGET_BF16 void multiply_amx(const Rows &rows, const Packed &w, int64_t first, int64_t last, float *out, int64_t stride, bool add) {
    if (rows.grid) return multiply_grid_amx(rows, w, first, last, out, stride, add);
    if (rows.twelves == 2) return multiply_sums<2, true>(rows, w, first, last, out, stride, add);
    if (rows.twelves == 1) return multiply_sums<1, true>(rows, w, first, last, out, stride, add);
    if (!rows.whole || rows.count < (w.bits == 8 ? kFewestBytes : kFewest)) return kPackedAvx512.multiply(rows, w, first, last, out, stride, add);
    if (rows.planes == 3) return multiply_sums<3, false>(rows, w, first, last, out, stride, add);
    if (rows.planes == 2) return multiply_sums<2, false>(rows, w, first, last, out, stride, add);
    return multiply_sums<1, false>(rows, w, first, last, out, stride, add);
}

}  // namespace

// Rows are made ready as on the AVX-512 level, which also makes those for tiles.
const Kernels kPackedAmx{[](const Rows &rows, int64_t r, const float *x, int64_t length) { kPackedAvx512.prepare(rows, r, x, length); },
                         multiply_amx, kFewest, 256};

}  // namespace stretto
#endif
