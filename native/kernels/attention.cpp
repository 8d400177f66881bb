// Which attention a level of instructions has, and attention of single rows for Python.
#include "attention.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <numeric>
#include <stdexcept>
#include <string>

#include "levels.hpp"
#include "team.hpp"

namespace nb = nanobind;
using namespace stretto;

namespace stretto {

AttendHead attention_kernel(const std::string &level) {
    require_level(level);
#if defined(__x86_64__)
    if (level == "amx") return kAttendAmx;
    if (level == "avx512bf16") return kAttendAvx512Bf16;
    if (level == "avx512") return kAttendAvx512;
    if (level == "avx2") return kAttendAvx2;
#endif
    return kAttendPlain;
}

bool attention_has(int64_t dim, bool packed) { return packed ? dim % 32 == 0 && dim <= 128 && dim > 0 : dim == 16 || dim == 32 || dim == 64 || dim == 80 || dim == 96 || dim == 128; }

}  // namespace stretto

namespace {

constexpr int64_t kShared = 512;  // tokens of all rows and KV heads below which a second thread costs more than it saves

void decode_attention(const std::string &level, int threads, uintptr_t query, int64_t row_stride, uintptr_t cache,
                      uintptr_t table, int64_t table_width, uintptr_t length, uintptr_t out, int64_t rows,
                      int64_t kv_heads, int64_t group, int64_t page_tokens, int64_t dim, bool is_bf16) {
    const AttentionCall call{reinterpret_cast<const void *>(query),
                             row_stride,
                             reinterpret_cast<const void *>(cache),
                             reinterpret_cast<const int64_t *>(table),
                             table_width,
                             reinterpret_cast<const int64_t *>(length),
                             reinterpret_cast<void *>(out),
                             rows,
                             kv_heads,
                             group,
                             page_tokens,
                             dim,
                             is_bf16};
    const AttendHead attend = attention_kernel(level);
    if (!attention_has(dim, false)) throw std::invalid_argument("head_dim " + std::to_string(dim) + " has no kernel");
    nb::gil_scoped_release release;
    const int64_t tokens = std::accumulate(call.length, call.length + rows, int64_t{0});
    const bool small = tokens * kv_heads < kShared;
    // Neighbouring heads to one thread, so that what it asked for ahead is its own; heads one by one where rows are too few.
    const int64_t heads = rows >= 4 * threads ? kv_heads : 1;
    share(small ? 1 : threads, rows * kv_heads / heads, [&](int64_t item) {
        for (int64_t i = item * heads; i < (item + 1) * heads; i++) attend(call, i / kv_heads, 1, i % kv_heads);
    });
}

}  // namespace

void bind_attention(nb::module_ &m) {
    m.def("best_level", &best_level);
    m.def("decode_attention", &decode_attention);
}
