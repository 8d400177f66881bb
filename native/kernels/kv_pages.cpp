#include "kv_pages.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "narrow.hpp"

namespace stretto {

namespace {

inline float number(float x) { return x; }
inline float number(uint16_t x) { return from_bf16(x); }

template <typename T>
void pack_channels(const T *from, int64_t dim, bool keys, uint8_t *to) {
    uint8_t *numbers = to + packed_keys_bytes(dim);
    std::memset(to, 0, static_cast<size_t>(packed_keys_bytes(dim)));
    for (int64_t d = 0; d < dim; d++) {
        float low = number(from[d]), high = low;
        bool finite = true;
        for (int64_t t = 0; t < kPagePositions; t++) {
            const float x = number(from[t * dim + d]);
            low = std::min(low, x), high = std::max(high, x);
            finite &= std::isfinite(x);
        }
        if (!finite) low = std::numeric_limits<float>::quiet_NaN();  // the channel is lost, and says so
        const uint16_t minimum = to_half(low), scale = to_half((high - from_half(minimum)) / 15.0f);
        std::memcpy(numbers + 2 * d, &scale, 2);
        std::memcpy(numbers + 2 * (dim + d), &minimum, 2);
        const float m = from_half(minimum), inverse = scale ? 1.0f / from_half(scale) : 0.0f;
        for (int64_t t = 0; t < kPagePositions; t++) {
            const float steps = std::nearbyint((number(from[t * dim + d]) - m) * inverse);
            const uint8_t q = steps > 0.0f ? uint8_t(std::min(steps, 15.0f)) : 0;
            const int64_t half = keys ? kPagePositions / 2 : dim / 2, at = keys ? t : d;
            const int64_t byte = keys ? d * half + at % half : t * half + at % half;
            to[byte] |= uint8_t(q << (at < half ? 0 : 4));
        }
    }
}

}  // namespace

void pack_page(const float *from, int64_t dim, bool keys, uint8_t *to) { pack_channels(from, dim, keys, to); }
void pack_page(const uint16_t *from, int64_t dim, bool keys, uint8_t *to) { pack_channels(from, dim, keys, to); }

}  // namespace stretto
