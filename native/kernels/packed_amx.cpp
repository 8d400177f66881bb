// Packed products of many rows by AMX: tiles of sixteen rows by sixteen columns, bytes into whole numbers.
//
// Inside a group sums are exact whichever instruction makes them, and groups are added up as all levels do it, so a row's result is the same
// to the last bit as that of the AVX-512 level, which does what has few rows. Tiles cannot be scaled, so the sums of each group go through memory:
// that and the scaling take three quarters of the time, and the multiplying itself the rest.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>

#include "buffer.hpp"
#include "packed.hpp"
#include "packed_vectors.hpp"

namespace stretto {

namespace {

#define STRETTO_INLINE_BF16 __attribute__((target(STRETTO_AVX512_BF16), always_inline))

constexpr int64_t kFewest = 8;  // rows below which vectors are as fast
constexpr int kTile = 16;       // rows of a tile, and its columns

// Tiles by their numbers: the sums of up to three planes, rows, weights.
enum { kSums = 0, kRows = 3, kWeights = 4 };

// Instructions on tiles, as assembly: the compiler's own take a tile's number as it is spelled, which in a template is no number.
template <int TILE>
inline void load_tile(const void *from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
inline void store_tile(void *to) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(int64_t(kTile * 4)), "i"(TILE) : "memory");
}
template <int TILE>
inline void clear_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}
// SUM += rows (signed bytes) times weights (unsigned).
template <int SUM>
inline void multiply_tiles() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(kRows), "i"(kWeights));
}

// The shapes of all tiles, for blocks of `height` rows and `depth` inner elements at once.
struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64};
    uint8_t rows[16] = {};

    Shapes(int height, int depth) {
        for (int tile = kSums; tile <= kRows; tile++) rows[tile] = uint8_t(height);
        row_bytes[kRows] = uint16_t(depth);
        rows[kWeights] = uint8_t(depth / 4);
    }
    void use() const { asm volatile("ldtilecfg %0" ::"m"(*this)); }
    static void release() { asm volatile("tilerelease"); }
};

// How many inner elements a tile holds: it ends with a group at the latest.
int depth_of(const Packed &w) { return w.group % 64 ? 32 : 64; }

// One panel made ready, and where its results go: weights as bytes, four inner elements of sixteen columns in 64 of them, groups
// `group_bytes` apart; for each group sixteen scales and sixteen minima.
struct Panel {
    const uint8_t *weights;
    int64_t group_bytes;
    const float *numbers;
    float *out;
    int64_t stride, width;
    bool add;
};

template <int BITS, bool MINIMUM>
STRETTO_TARGET_BF16 void unpack(const Packed &w, const uint8_t *data, uint8_t *weights, float *numbers) {
    const __m512i fifteen = _mm512_set1_epi8(15);
    for (int64_t g = 0; g < w.groups(); g++, data += w.group_bytes()) {
        const uint16_t *d = reinterpret_cast<const uint16_t *>(data);
        const Lanes scale = halves(d);
        _mm512_store_ps(numbers + 2 * g * kPanel, scale);
        _mm512_store_ps(numbers + (2 * g + 1) * kPanel, minimum_of<BITS, MINIMUM>(d, scale));
        if constexpr (BITS == 8) continue;  // its bytes lie well where they are
        const uint8_t *at = data + w.numbers_bytes();
        for (int k = 0; k < w.group; k += 8, at += 64, weights += 128) {
            const __m512i both = _mm512_loadu_si512(at);
            _mm512_store_si512(weights, _mm512_and_si512(both, fifteen));
            _mm512_store_si512(weights + 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), fifteen));
        }
    }
}

// The sums of a group's planes, each a tile, to `to`.
template <int PLANES>
STRETTO_INLINE_BF16 inline void sum_group(const Rows &rows, const int8_t *values, int64_t stride, int depth, const uint8_t *weights, int32_t *to) {
    clear_tile<kSums>();
    if constexpr (PLANES > 1) clear_tile<kSums + 1>();
    if constexpr (PLANES > 2) clear_tile<kSums + 2>();
    for (int k = 0; k < rows.group; k += depth) {
        load_tile<kWeights>(weights + k * kPanel, 64);
        load_tile<kRows>(values + k, stride);
        multiply_tiles<kSums>();
        if constexpr (PLANES > 1) {
            load_tile<kRows>(values + rows.inner + k, stride);
            multiply_tiles<kSums + 1>();
        }
        if constexpr (PLANES > 2) {
            load_tile<kRows>(values + 2 * rows.inner + k, stride);
            multiply_tiles<kSums + 2>();
        }
    }
    store_tile<kSums>(to);
    if constexpr (PLANES > 1) store_tile<kSums + 1>(to + kTile * kTile);
    if constexpr (PLANES > 2) store_tile<kSums + 2>(to + 2 * kTile * kTile);
}

// A block of `height` rows, at most R, from row `first` on, by one panel. The tiles of a group are under way while the one before it is
// added up. Groups take turns in two buffers, each with instructions of its own: a processor guesses by the instruction which store a load
// waits for, and with one instruction for both would wait for the tiles under way.
template <int R, int PLANES>
STRETTO_TARGET_BF16 void multiply_block(const Rows &rows, int64_t first, int height, int depth, const Panel &panel) {
    using Sums = int32_t[PLANES][kTile][kTile];
    alignas(64) Sums even, odd;
    const int8_t *values = rows.bytes_of(first);
    const float *numbers = rows.numbers(first);
    const int64_t groups = rows.groups(), stride = rows.stride();
    Lanes total[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) total[r] = _mm512_setzero_ps();
    const auto sum = [&](int64_t g, Sums &to) STRETTO_INLINE_BF16 {
        sum_group<PLANES>(rows, values + g * rows.group, stride, depth, panel.weights + g * panel.group_bytes, to[0][0]);
    };
    const auto add = [&](int64_t g, const Sums &sums) STRETTO_INLINE_BF16 {
        const Lanes scale = _mm512_load_ps(panel.numbers + 2 * g * kPanel);
        const Lanes minimum = _mm512_load_ps(panel.numbers + (2 * g + 1) * kPanel);
        const float *row_scales = numbers + 2 * g * rows.tall, *row_sums = row_scales + rows.tall;
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            __m512i planes[PLANES];
#pragma GCC unroll 3
            for (int p = 0; p < PLANES; p++) planes[p] = _mm512_load_si512(sums[p][r]);
            total[r] = add_group(total[r], together(planes), scale, minimum, row_scales[r], row_sums[r]);
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

template <int PLANES>
STRETTO_TARGET_BF16 void multiply_planes(const Rows &rows, const Packed &w, int64_t first, int64_t last, float *out, int64_t stride,
                                         bool add) {
    static thread_local Buffer<uint8_t> weights_room;
    static thread_local Buffer<float> numbers_room;
    uint8_t *weights = w.bits == 8 ? nullptr : weights_room.get(w.inner * kPanel);
    float *numbers = numbers_room.get(w.groups() * 2 * kPanel);
    const auto make_ready = w.bits == 8 ? unpack<8, false> : w.minimum ? unpack<4, true> : unpack<4, false>;
    const int depth = depth_of(w);
    int shaped = 0;
    for (int64_t p = first; p < last; p++) {
        const uint8_t *data = w.data + p * w.panel_bytes();
        make_ready(w, data, weights, numbers);
        const Panel panel{w.bits == 8 ? data + w.numbers_bytes() : weights,
                          w.bits == 8 ? w.group_bytes() : int64_t(w.group) * kPanel,
                          numbers,
                          out + p * kPanel,
                          stride,
                          std::min<int64_t>(kPanel, w.columns - p * kPanel),
                          add};
        for (int64_t r = 0; r < rows.count; r += rows.tall) {
            const int height = int(std::min<int64_t>(rows.tall, rows.count - r));
            if (height != shaped) Shapes(height, depth).use();
            shaped = height;
            const auto run = height <= 8 ? multiply_block<8, PLANES> : multiply_block<16, PLANES>;
            run(rows, r, height, depth, panel);
        }
    }
    Shapes::release();
}

STRETTO_TARGET_BF16 void multiply_amx(const Rows &rows, const Packed &w, int64_t first, int64_t last, float *out, int64_t stride, bool add) {
    if (!rows.whole || rows.count < kFewest) return kPackedAvx512.multiply(rows, w, first, last, out, stride, add);
    if (rows.planes == 3) return multiply_planes<3>(rows, w, first, last, out, stride, add);
    if (rows.planes == 2) return multiply_planes<2>(rows, w, first, last, out, stride, add);
    return multiply_planes<1>(rows, w, first, last, out, stride, add);
}

}  // namespace

// Rows are made ready as on the AVX-512 level.
const Kernels kPackedAmx{[](const Rows &rows, int64_t r, const float *x, int64_t length) { kPackedAvx512.prepare(rows, r, x, length); },
                         multiply_amx};

}  // namespace stretto
#endif
