// The tile of a matrix product by AMX: 32 by 32 accumulators in four of the eight tile registers, two tiles of A and two of B in the others, so
// that each loaded tile is used twice.
#include "kernels.hpp"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace probe {

#if defined(__x86_64__) && defined(__linux__)

namespace {

constexpr size_t kSide = 16, kTileBytes = 64;

struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

bool ask() {
    constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // of EDX: bf16, tiles, int8
    constexpr long kAsk = 0x1023, kTileData = 18;                 // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kNeeded) != kNeeded) { return false; }
    return syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
}

// Instructions as assembly, so that no compiler flag is needed. Sums in tiles 0 to 3, A in 4 and 5, B in 6 and 7.
#define LOAD(tile, from, stride) asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"(size_t(stride)) : "memory")
#define STORE(tile, to, stride) asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(size_t(stride)) : "memory")
#define MULTIPLY(name) \
    asm volatile(name " %tmm6, %tmm4, %tmm0\n\t" name " %tmm7, %tmm4, %tmm1\n\t" name " %tmm6, %tmm5, %tmm2\n\t" name " %tmm7, %tmm5, %tmm3")

template <bool Int8, typename A, typename B, typename C>
void multiply(const A *a, const B *b, size_t inner, C *c, int repeats) {
    constexpr size_t kStep = kTileBytes / sizeof(A), kWide = kAmxSide * sizeof(C), kGroup = 4 / sizeof(A);
    const Shapes shapes;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
    const size_t stride = inner * sizeof(A);
    C *below = c + kSide * kAmxSide;
    for (int repeat = 0; repeat < repeats; ++repeat) {
        LOAD(0, c, kWide);
        LOAD(1, c + kSide, kWide);
        LOAD(2, below, kWide);
        LOAD(3, below + kSide, kWide);
        for (size_t k = 0; k < inner; k += kStep) {
            const B *at = b + k * kAmxSide;
            LOAD(4, a + k, stride);
            LOAD(5, a + kSide * inner + k, stride);
            LOAD(6, at, kAmxSide * 4);
            LOAD(7, at + kSide * kGroup, kAmxSide * 4);
            if constexpr (Int8) {
                MULTIPLY("tdpbusd");
            } else {
                MULTIPLY("tdpbf16ps");
            }
        }
        STORE(0, c, kWide);
        STORE(1, c + kSide, kWide);
        STORE(2, below, kWide);
        STORE(3, below + kSide, kWide);
    }
    asm volatile("tilerelease");
}

} // namespace

bool has_amx() {
    static const bool has = ask();
    return has;
}

void amx_bf16(const uint16_t *a, const uint16_t *b, size_t inner, float *c, int repeats) { multiply<false>(a, b, inner, c, repeats); }
void amx_int8(const uint8_t *a, const int8_t *b, size_t inner, int32_t *c, int repeats) { multiply<true>(a, b, inner, c, repeats); }

#else

bool has_amx() { return false; }
void amx_bf16(const uint16_t *, const uint16_t *, size_t, float *, int) {}
void amx_int8(const uint8_t *, const int8_t *, size_t, int32_t *, int) {}

#endif

} // namespace probe
