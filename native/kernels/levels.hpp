// The levels of instructions that kernels are compiled for.
#pragma once

#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace stretto {

#if defined(__x86_64__)
#define STRETTO_X86(...) __VA_ARGS__
#else
#define STRETTO_X86(...)
#endif
#define STRETTO_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define STRETTO_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))

// Whether tiles of bytes and of bf16 can be multiplied here; asks the system to keep this process's tiles, which it must before the first is touched.
inline bool ask_for_amx() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // of EDX: products of bf16, tiles, products of bytes
    constexpr long kAsk = 0x1023, kTileData = 18;             // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kNeeded) != kNeeded) return false;
    return syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
#else
    return false;
#endif
}

// The best of "amx", "avx512bf16", "avx512", "avx2" and "plain" on this machine.
inline std::string best_level() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) return "avx512";
        return ask_for_amx() ? "amx" : "avx512bf16";
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return "avx2";
#endif
    return "plain";
}

// Throws std::invalid_argument for what is no level, or one that this machine does not run: its instructions would end the process.
inline void require_level(const std::string &level) {
    static const std::string best = best_level();
    bool here = false;
    for (const char *each : {"amx", "avx512bf16", "avx512", "avx2", "plain"}) {
        here |= best == each;
        if (here && level == each) return;
    }
    throw std::invalid_argument("level is " + level + "; this machine runs up to " + best);
}

}  // namespace stretto
