// Tiles of AMX: their shapes, and instructions on them; for x86-64 alone.
#pragma once

#include <cstdint>

namespace stretto {

constexpr int kTile = 16;  // rows of a tile, and its columns of four bytes

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
// SUM += A (signed bytes) times B (unsigned), into whole numbers.
template <int SUM, int A, int B>
inline void multiply_bytes() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
}
// The same, B with signs as well.
template <int SUM, int A, int B>
inline void multiply_signed() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
}
// SUM += A times B, both bf16, into fp32.
template <int SUM, int A, int B>
inline void multiply_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
}

// The shapes of all tiles: full ones, until somebody makes them smaller.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};

    void use() const { asm volatile("ldtilecfg %0" ::"m"(*this)); }
    static void release() { asm volatile("tilerelease"); }
};

}  // namespace stretto
