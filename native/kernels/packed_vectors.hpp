// What the AVX-512 and AMX levels of packed products share; for x86-64 alone.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "packed.hpp"

namespace stretto {

#define STRETTO_AVX512_BF16 "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,f16c,fma"
#define STRETTO_TARGET_BF16 __attribute__((target(STRETTO_AVX512_BF16)))

using Lanes = __m512;

// One panel's numbers of a group, from fp16.
STRETTO_TARGET_BF16 inline Lanes halves(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}

template <int BITS, bool MINIMUM>
STRETTO_TARGET_BF16 inline Lanes minimum_of(const uint16_t *d, Lanes scale) {
    if constexpr (MINIMUM) return halves(d + kPanel);
    return _mm512_mul_ps(scale, _mm512_set1_ps(BITS == 4 ? -8.0f : -128.0f));
}

// What the sums of planes of whole numbers stand for together.
template <int PLANES>
STRETTO_TARGET_BF16 inline Lanes together(const __m512i (&sums)[PLANES]) {
    const Lanes first = _mm512_cvtepi32_ps(sums[0]);
    if constexpr (PLANES == 1) return first;
    if constexpr (PLANES == 2) return _mm512_fmadd_ps(first, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(sums[1]));
    if constexpr (PLANES == 3) {
        const Lanes rest = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[1]), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(sums[2]));
        return _mm512_fmadd_ps(first, _mm512_set1_ps(65536.0f), rest);
    }
}

// total + what a group adds to it: `whole`, the sum of its products, with the scales and minima of sixteen columns and the scale and sum
// of the row's own group. All levels do this in one order, so that their results are the same to the last bit.
STRETTO_TARGET_BF16 inline Lanes add_group(Lanes total, Lanes whole, Lanes scale, Lanes minimum, float row_scale, float row_sum) {
    total = _mm512_fmadd_ps(scale, _mm512_mul_ps(whole, _mm512_set1_ps(row_scale)), total);
    return _mm512_fmadd_ps(minimum, _mm512_set1_ps(row_sum), total);
}

// The first `width` of sixteen columns of a row's result.
STRETTO_TARGET_BF16 inline void put(Lanes total, float *to, int64_t width, bool add) {
    const __mmask16 mask = width >= kPanel ? 0xFFFF : __mmask16((1u << width) - 1);
    const Lanes before = add ? _mm512_maskz_loadu_ps(mask, to) : _mm512_setzero_ps();
    _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(before, total));
}

}  // namespace stretto
