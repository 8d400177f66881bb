// What a decoder layer does between its products, one pass over the data each: rotary positions, writing keys and values into the
// cache, the gated activation. Rows are independent, and large calls are shared among threads row by row.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>

#include "elementwise.hpp"
#include "levels.hpp"
#include "simd.hpp"
#include "team.hpp"

namespace nb = nanobind;
using namespace stretto;

namespace {

constexpr int64_t kShared = 1 << 13;  // elements below which a second thread costs more than it saves

STRETTO_INLINE float widened(float x) { return x; }

STRETTO_INLINE float widened(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

struct Rotation {
    void *heads;          // [rows, count, dim], `row_stride` elements from row to row; turned in place
    int64_t row_stride;
    const float *turns;   // [rows, dim]: cosine and sine of each pair
    int64_t count, dim;
};

template <typename T, int LANES>
STRETTO_INLINE void rotate_row(const Rotation &call, int64_t row) {
    using S = Simd<LANES>;
    T *head = static_cast<T *>(call.heads) + row * call.row_stride;
    const float *turns = call.turns + row * call.dim;
    typename S::Integers even, odd, partner, negative;
    for (int lane = 0; lane < LANES; lane++) {
        even[lane] = lane & ~1;
        odd[lane] = lane | 1;
        partner[lane] = lane ^ 1;
        negative[lane] = lane & 1 ? 0 : INT32_MIN;
    }
    for (int64_t h = 0; h < call.count; h++, head += call.dim) {
        int64_t i = 0;
        for (; i + LANES <= call.dim; i += LANES) {
            const auto turn = S::load(turns + i);
            const auto x = S::load(head + i);
            const auto sine = S::flip(__builtin_shuffle(turn, odd), negative);
            S::store(head + i, x * __builtin_shuffle(turn, even) + __builtin_shuffle(x, partner) * sine);
        }
        for (; i < call.dim; i += 2) {
            const float x = widened(head[i]), y = widened(head[i + 1]);
            store(head + i, x * turns[i] - y * turns[i + 1]);
            store(head + i + 1, y * turns[i] + x * turns[i + 1]);
        }
    }
}

struct Activation {
    const void *both;  // [rows, 2 * width]: gates, then what they let through
    void *out;         // [rows, width]
    int64_t width;
};

template <typename T, int LANES>
STRETTO_INLINE void gate_values(const T *gate, const T *up, T *out, int64_t width) {
    using S = Simd<LANES>;
    const auto one = typename S::Vector{} + 1.0f;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        const auto g = S::load(gate + i);
        const auto e = S::exponential(g < 0.0f ? g : -g);  // never above 1, so nothing overflows
        S::store(out + i, g * (g < 0.0f ? e : one) / (e + 1.0f) * S::load(up + i));
    }
    for (; i < width; i++) {
        const float g = widened(gate[i]);
        store(out + i, g / (1.0f + std::exp(-g)) * widened(up[i]));
    }
}

template <typename T, int LANES>
STRETTO_INLINE void gate_row(const Activation &call, int64_t row) {
    const T *gate = static_cast<const T *>(call.both) + row * 2 * call.width;
    gate_values<T, LANES>(gate, gate + call.width, static_cast<T *>(call.out) + row * call.width, call.width);
}

STRETTO_INLINE void norm_row(const float *x, const float *weight, float *out, int64_t width, float epsilon) {
    float sums[16] = {};  // at every level, so that the levels agree
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) {
        for (int lane = 0; lane < 16; lane++) sums[lane] += x[i + lane] * x[i + lane];
    }
    for (; i < width; i++) sums[i & 15] += x[i] * x[i];
    for (int half = 8; half > 0; half /= 2) {
        for (int lane = 0; lane < half; lane++) sums[lane] += sums[lane + half];
    }
    const float scale = 1.0f / std::sqrt(sums[0] / static_cast<float>(width) + epsilon);
    for (i = 0; i < width; i++) out[i] = x[i] * scale * weight[i];
}

template <int LANES>
STRETTO_INLINE int64_t largest_of(const float *values, int64_t count) {
    using S = Simd<LANES>;
    typename S::Vector top = typename S::Vector{} - std::numeric_limits<float>::infinity();
    typename S::Integers numbers{};  // all ones as long as every value was a number
    numbers = ~numbers;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const auto v = S::load(values + i);
        top = v > top ? v : top;
        numbers &= v == v;
    }
    bool sound = true;
    float most = -std::numeric_limits<float>::infinity();
    for (int lane = 0; lane < LANES; lane++) {
        sound &= numbers[lane] != 0;
        most = top[lane] > most ? top[lane] : most;
    }
    for (; i < count; i++) {
        sound &= values[i] == values[i];
        most = values[i] > most ? values[i] : most;
    }
    for (i = 0; i < count; i++) {
        if (sound ? values[i] == most : values[i] != values[i]) return i;
    }
    return 0;
}

#define STRETTO_ROW_KERNELS(NAME, TARGET, LANES)                                                                             \
    TARGET void row_norm_##NAME(const float *x, const float *w, float *o, int64_t n, float e) { norm_row(x, w, o, n, e); }   \
    TARGET void row_rotate_##NAME(float *h, const float *t, int64_t count, int64_t dim) {                                    \
        rotate_row<float, LANES>(Rotation{h, 0, t, count, dim}, 0);                                                          \
    }                                                                                                                        \
    TARGET void row_gate_##NAME(const float *g, const float *u, float *o, int64_t n) { gate_values<float, LANES>(g, u, o, n); } \
    TARGET int64_t row_largest_##NAME(const float *v, int64_t n) { return largest_of<LANES>(v, n); }                         \
    const RowKernels k_##NAME{row_norm_##NAME, row_rotate_##NAME, row_gate_##NAME, row_largest_##NAME};

STRETTO_X86(STRETTO_ROW_KERNELS(avx512, STRETTO_TARGET_AVX512, 16))
STRETTO_X86(STRETTO_ROW_KERNELS(avx2, STRETTO_TARGET_AVX2, 8))
STRETTO_ROW_KERNELS(plain, , 4)

#define STRETTO_LEVELS(NAME, ROW, CALL)                                                                        \
    template <int LANES>                                                                                       \
    STRETTO_INLINE void NAME##_type(const CALL &call, int64_t row, bool is_bf16) {                             \
        is_bf16 ? ROW<uint16_t, LANES>(call, row) : ROW<float, LANES>(call, row);                              \
    }                                                                                                          \
    STRETTO_X86(STRETTO_TARGET_AVX512 void NAME##_avx512(const CALL &c, int64_t row, bool b) { NAME##_type<16>(c, row, b); }) \
    STRETTO_X86(STRETTO_TARGET_AVX2 void NAME##_avx2(const CALL &c, int64_t row, bool b) { NAME##_type<8>(c, row, b); })      \
    void NAME##_plain(const CALL &c, int64_t row, bool b) { NAME##_type<4>(c, row, b); }                       \
    auto NAME##_of(const std::string &level) {                                                                 \
        require_level(level);                                                                                  \
        STRETTO_X86(if (level == "amx" || level == "avx512bf16" || level == "avx512") return NAME##_avx512;)                     \
        STRETTO_X86(if (level == "avx2") return NAME##_avx2;)                                                  \
        return NAME##_plain;                                                                                   \
    }

STRETTO_LEVELS(rotate, rotate_row, Rotation)
STRETTO_LEVELS(gate, gate_row, Activation)

int team(int threads, int64_t elements) { return elements < kShared ? 1 : threads; }

void rotate(const std::string &level, int threads, uintptr_t heads, int64_t row_stride, uintptr_t turns, int64_t rows,
            int64_t count, int64_t dim, bool is_bf16) {
    const Rotation call{reinterpret_cast<void *>(heads), row_stride, reinterpret_cast<const float *>(turns), count, dim};
    const auto work = rotate_of(level);
    nb::gil_scoped_release release;
    share(team(threads, rows * count * dim), rows, [&](int64_t row) { work(call, row, is_bf16); });
}

void gated_silu(const std::string &level, int threads, uintptr_t both, uintptr_t out, int64_t rows, int64_t width,
                bool is_bf16) {
    const Activation call{reinterpret_cast<const void *>(both), reinterpret_cast<void *>(out), width};
    const auto work = gate_of(level);
    nb::gil_scoped_release release;
    share(team(threads, rows * width), rows, [&](int64_t row) { work(call, row, is_bf16); });
}

// Copies each of [rows, count] runs of `bytes` bytes to run `to` of a cache.
void scatter(int threads, uintptr_t from, int64_t row_stride, uintptr_t cache, uintptr_t to, int64_t rows, int64_t count,
             int64_t bytes) {
    const char *source = reinterpret_cast<const char *>(from);
    char *target = reinterpret_cast<char *>(cache);
    const int64_t *places = reinterpret_cast<const int64_t *>(to);
    nb::gil_scoped_release release;
    share(team(threads, rows * count * bytes / 2), rows, [&](int64_t row) {
        for (int64_t i = 0; i < count; i++) {
            std::memcpy(target + places[row * count + i] * bytes, source + row * row_stride + i * bytes, bytes);
        }
    });
}

}  // namespace

namespace stretto {

const RowKernels &row_kernels(const std::string &level) {
    require_level(level);
    STRETTO_X86(if (level == "amx" || level == "avx512bf16" || level == "avx512") return k_avx512;)
    STRETTO_X86(if (level == "avx2") return k_avx2;)
    return k_plain;
}

}  // namespace stretto

void bind_elementwise(nb::module_ &m) {
    m.def("rotate", &rotate);
    m.def("gated_silu", &gated_silu);
    m.def("scatter", &scatter);
}
