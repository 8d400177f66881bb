// Attention by AVX-512, with and without products of bf16 pairs.
#if defined(__x86_64__)
#include "attention_kernels.hpp"

namespace {

STRETTO_ATTEND(avx512bf16, STRETTO_TARGET_AVX512, 16, true)
STRETTO_ATTEND(avx512, STRETTO_TARGET_AVX512, 16, false)

}  // namespace

const AttendHead stretto::kAttendAvx512Bf16 = attend_level<Level_avx512bf16, Level_avx512>;
const AttendHead stretto::kAttendAvx512 = attend_level<Level_avx512, Level_avx512>;
#endif
