// Portable vectors for kernels that are compiled once for each level of instructions and picked at run time.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "narrow.hpp"

namespace stretto {

#define STRETTO_INLINED __attribute__((always_inline))
#define STRETTO_INLINE inline STRETTO_INLINED

// Vectors of L floats, as wide as the registers of a level: 16 for AVX-512, 8 for AVX2, 4 for any x86-64 and arm64.
template <int L>
struct Types;
#define STRETTO_TYPES(L)                                          \
    template <>                                                   \
    struct Types<L> {                                             \
        typedef float Vector __attribute__((vector_size(4 * L))); \
        typedef int32_t Integers __attribute__((vector_size(4 * L))); \
        typedef uint32_t Words __attribute__((vector_size(4 * L))); \
        typedef uint16_t Halves __attribute__((vector_size(2 * L))); \
        typedef uint8_t Bytes __attribute__((vector_size(L))); \
    };
STRETTO_TYPES(16)
STRETTO_TYPES(8)
STRETTO_TYPES(4)

template <int L>
struct Simd {
    using Vector = typename Types<L>::Vector;
    using Integers = typename Types<L>::Integers;
    using Words = typename Types<L>::Words;
    using Halves = typename Types<L>::Halves;
    using Bytes = typename Types<L>::Bytes;

    static STRETTO_INLINE Vector load(const float *p) {
        Vector v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }

    static STRETTO_INLINE Vector load(const uint16_t *p) {
        Halves h;
        std::memcpy(&h, p, sizeof h);
        Words w;
#if defined(__x86_64__)
        if constexpr (L >= 8) {  // which the compiler would do in halves
            asm("vpmovzxwd %1, %0" : "=v"(w) : "vm"(h));
        } else
#endif
            w = __builtin_convertvector(h, Words);
        w <<= 16;
        Vector v;
        std::memcpy(&v, &w, sizeof v);
        return v;
    }

    static STRETTO_INLINE Vector load_fp16(const uint16_t *p) {
        Halves h;
        std::memcpy(&h, p, sizeof h);
        Vector v;
#if defined(__x86_64__)
        if constexpr (L >= 8) {  // as assembly, for the reason given below
            asm("vcvtph2ps %1, %0" : "=v"(v) : "v"(h));
            return v;
        }
#endif
        for (int lane = 0; lane < L; lane++) v[lane] = from_half(h[lane]);
        return v;
    }

    // The low and the high halves of L bytes as numbers from 0 to 15.
    static STRETTO_INLINE void load_nibbles(const uint8_t *p, Vector &low, Vector &high) {
        Bytes b;
        std::memcpy(&b, p, sizeof b);
        const Integers wide = __builtin_convertvector(b, Integers);
        low = __builtin_convertvector(wide & 15, Vector);
        high = __builtin_convertvector(wide >> 4, Vector);
    }

#if defined(__x86_64__)
    // total + the products of neighbouring bf16 pairs of two vectors (vdpbf16ps; written as assembly because an intrinsic cannot
    // stand in a template that is inlined into functions of several targets).
    static STRETTO_INLINE Vector add_bf16_pairs(Vector total, Vector a, Vector b) {
        asm("vdpbf16ps %2, %1, %0" : "+v"(total) : "v"(a), "v"(b));
        return total;
    }
#endif

    static STRETTO_INLINE void store(float *p, Vector v) { std::memcpy(p, &v, sizeof v); }

    static STRETTO_INLINE void store(uint16_t *p, Vector v) {
        Words bits;
        std::memcpy(&bits, &v, sizeof bits);
        bits += 0x7FFFu + ((bits >> 16) & 1u);  // to the nearest, ties to even
        const Halves h = __builtin_convertvector(bits >> 16, Halves);
        std::memcpy(p, &h, sizeof h);
    }

    // v with the bits of `mask` turned over: INT32_MIN changes a lane's sign.
    static STRETTO_INLINE Vector flip(Vector v, Integers mask) {
        Integers bits;
        std::memcpy(&bits, &v, sizeof bits);
        bits ^= mask;
        std::memcpy(&v, &bits, sizeof v);
        return v;
    }

    // Lane t of the result is the sum of the lanes of v[t]: a tree in which each level halves the number of vectors.
    static STRETTO_INLINE Vector sums(Vector (&v)[L]) {
        halve<L / 2>(v);
        return v[0];
    }

    template <int Distance>
    static STRETTO_INLINE void halve(Vector (&v)[L]) {
        Integers from, to;
#pragma GCC unroll 16
        for (int lane = 0; lane < L; lane++) {
            from[lane] = lane & Distance ? L + lane : lane;
            to[lane] = from[lane] ^ Distance;
        }
#pragma GCC unroll 8
        for (int t = 0; t < Distance; t++) {
            v[t] = __builtin_shuffle(v[t], v[t + Distance], from) + __builtin_shuffle(v[t], v[t + Distance], to);
        }
        if constexpr (Distance > 1) halve<Distance / 2>(v);
    }

    // Lane i of v[t] becomes lane t of v[i].
    template <int Distance = L / 2>
    static STRETTO_INLINE void turn(Vector (&v)[L]) {
        Integers near, far;
#pragma GCC unroll 16
        for (int lane = 0; lane < L; lane++) {
            near[lane] = lane & Distance ? L + lane - Distance : lane;
            far[lane] = lane & Distance ? L + lane : lane + Distance;
        }
#pragma GCC unroll 16
        for (int t = 0; t < L; t++) {
            if (t & Distance) continue;
            const Vector a = v[t], b = v[t + Distance];
            v[t] = __builtin_shuffle(a, b, near);
            v[t + Distance] = __builtin_shuffle(a, b, far);
        }
        if constexpr (Distance > 1) turn<Distance / 2>(v);
    }

    static STRETTO_INLINE float sum(Vector v) { return fold<L / 2>(v, [](Vector a, Vector b) STRETTO_INLINED { return a + b; })[0]; }
    static STRETTO_INLINE float largest(Vector v) {
        return fold<L / 2>(v, [](Vector a, Vector b) STRETTO_INLINED { return a > b ? a : b; })[0];
    }

    // All lanes together: halves of what is left, until one is left.
    template <int Distance, typename Join>
    static STRETTO_INLINE Vector fold(Vector v, const Join &join) {
        Integers from;
#pragma GCC unroll 16
        for (int lane = 0; lane < L; lane++) from[lane] = lane ^ Distance;
        v = join(v, __builtin_shuffle(v, from));
        if constexpr (Distance > 1) return fold<Distance / 2>(v, join);
        return v;
    }

    // e^x for x <= 0: 2^n times a polynomial (coefficients of the Cephes library's expf), relative error under 2e-7.
    static STRETTO_INLINE Vector exponential(Vector x) {
        const Vector lowest = Vector{} - 87.0f;
        x = x < lowest ? lowest : x;
        const Vector scaled = x * 1.44269504088896341f - 0.5f;
        const Integers n = __builtin_convertvector(scaled, Integers);  // towards zero, so to the nearest for x <= 0
        const Vector whole = __builtin_convertvector(n, Vector);
        const Vector r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
        Vector y = Vector{} + 1.9875691500e-4f;
        y = y * r + 1.3981999507e-3f;
        y = y * r + 8.3334519073e-3f;
        y = y * r + 4.1665795894e-2f;
        y = y * r + 1.6666665459e-1f;
        y = y * r + 5.0000001201e-1f;
        y = y * r * r + r + 1.0f;
        const Integers power = (n + 127) << 23;
        Vector factor;
        std::memcpy(&factor, &power, sizeof factor);
        return y * factor;
    }
};

STRETTO_INLINE void store(float *p, float value) { *p = value; }

STRETTO_INLINE void store(uint16_t *p, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits += 0x7FFFu + ((bits >> 16) & 1u);  // to the nearest, ties to even
    *p = static_cast<uint16_t>(bits >> 16);
}

}  // namespace stretto
