// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011), the same words as stretto.core.random.words.
#pragma once

#include <array>
#include <cstdint>

namespace stretto {

using Words = std::array<uint32_t, 4>;

inline Words philox(uint64_t seed, uint64_t stream, uint64_t index) {
    uint32_t c0 = uint32_t(index), c1 = uint32_t(index >> 32), c2 = uint32_t(stream), c3 = uint32_t(stream >> 32);
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        uint64_t low = uint64_t(c0) * 0xD2511F53u, high = uint64_t(c2) * 0xCD9E8D57u;
        uint32_t next0 = uint32_t(high >> 32) ^ c1 ^ k0, next2 = uint32_t(low >> 32) ^ c3 ^ k1;
        c0 = next0, c1 = uint32_t(high), c2 = next2, c3 = uint32_t(low);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return {c0, c1, c2, c3};
}

} // namespace stretto
