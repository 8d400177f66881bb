// Attention by AVX2, and for any machine.
#include "attention_kernels.hpp"

namespace {

STRETTO_X86(STRETTO_ATTEND(avx2, STRETTO_TARGET_AVX2, 8, false))
STRETTO_ATTEND(plain, , 4, false)

}  // namespace

#if defined(__x86_64__)
const AttendHead stretto::kAttendAvx2 = attend_level<Level_avx2, Level_avx2>;
#endif
const AttendHead stretto::kAttendPlain = attend_level<Level_plain, Level_plain>;
