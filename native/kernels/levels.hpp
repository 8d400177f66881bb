// The levels of instructions that kernels are compiled for.
#pragma once

#include <string>

namespace stretto {

#if defined(__x86_64__)
#define STRETTO_X86(...) __VA_ARGS__
#else
#define STRETTO_X86(...)
#endif
#define STRETTO_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define STRETTO_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))

// The best of "avx512bf16", "avx512", "avx2" and "plain" on this machine.
inline std::string best_level() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        return __builtin_cpu_supports("avx512bf16") ? "avx512bf16" : "avx512";
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return "avx2";
#endif
    return "plain";
}

}  // namespace stretto
