// fp16 and bf16, bit by bit: for the plain level, and for everybody where speed does not matter.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace stretto {

inline float from_half(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = h >> 10 & 31u, fraction = h & 1023u;
    uint32_t bits;
    if (exponent == 0) {
        const float value = std::ldexp(float(fraction), -24);
        return sign ? -value : value;
    }
    bits = sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return uint16_t(bits >> 16 | 0x40u);  // NaN stays NaN
    bits += 0x7FFFu + (bits >> 16 & 1u);
    return uint16_t(bits >> 16);
}

inline float from_bf16(uint16_t h) {
    const uint32_t bits = uint32_t(h) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// To the nearest, ties to even; what is too large becomes infinity.
inline uint16_t to_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
    bits &= 0x7FFFFFFFu;
    if (bits > 0x7F800000u) return uint16_t(sign | 0x7E00u);
    if (bits >= 0x477FF000u) return uint16_t(sign | 0x7C00u);
    if (bits < 0x38800000u) {  // below the smallest normal number
        float size;
        std::memcpy(&size, &bits, sizeof size);
        return uint16_t(sign | uint16_t(std::nearbyint(size * 16777216.0f)));
    }
    bits += 0xFFFu + (bits >> 13 & 1u);
    return uint16_t(sign | ((bits >> 13) - (112u << 10)));
}

}  // namespace stretto
