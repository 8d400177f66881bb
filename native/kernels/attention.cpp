// Attention of single new tokens over a paged KV cache: one online softmax for each row and KV head, over the block table as it
// is, so nothing is gathered, padded or masked. The order of every sum depends on the row's own length alone, never on who else
// shares the batch. One thread: reading keys and values at the memory's full bandwidth takes no more.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace nb = nanobind;

namespace {

#define STRETTO_INLINE inline __attribute__((always_inline))

constexpr int kBlock = 64;       // scores held at once; a multiple of every number of lanes
constexpr int kMostQueries = 4;  // queries of one KV head that share a read of its keys

// Vectors of L floats, as wide as the registers of a level: 16 for AVX-512, 8 for AVX2, 4 for any x86-64 and arm64.
template <int L>
struct Types;
#define STRETTO_TYPES(L)                                          \
    template <>                                                   \
    struct Types<L> {                                             \
        typedef float Vector __attribute__((vector_size(4 * L))); \
        typedef int32_t Integers __attribute__((vector_size(4 * L))); \
        typedef uint32_t Words __attribute__((vector_size(4 * L))); \
        typedef uint16_t Halves __attribute__((vector_size(2 * L))); \
    };
STRETTO_TYPES(16)
STRETTO_TYPES(8)
STRETTO_TYPES(4)

template <int L>
struct Simd {
    using Vector = typename Types<L>::Vector;
    using Integers = typename Types<L>::Integers;
    using Words = typename Types<L>::Words;
    using Halves = typename Types<L>::Halves;

    static STRETTO_INLINE Vector load(const float *p) {
        Vector v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }

    static STRETTO_INLINE Vector load(const uint16_t *p) {
        Halves h;
        std::memcpy(&h, p, sizeof h);
        const Words w = __builtin_convertvector(h, Words) << 16;
        Vector v;
        std::memcpy(&v, &w, sizeof v);
        return v;
    }

    // Lane t of the result is the sum of the lanes of v[t]: a tree in which each level halves the number of vectors.
    static STRETTO_INLINE Vector sums(Vector (&v)[L]) {
        halve<L / 2>(v);
        return v[0];
    }

    template <int Distance>
    static STRETTO_INLINE void halve(Vector (&v)[L]) {
        Integers from, to;
#pragma GCC unroll 16
        for (int lane = 0; lane < L; lane++) {
            from[lane] = lane & Distance ? L + lane : lane;
            to[lane] = from[lane] ^ Distance;
        }
#pragma GCC unroll 8
        for (int t = 0; t < Distance; t++) {
            v[t] = __builtin_shuffle(v[t], v[t + Distance], from) + __builtin_shuffle(v[t], v[t + Distance], to);
        }
        if constexpr (Distance > 1) halve<Distance / 2>(v);
    }

    static STRETTO_INLINE float sum(Vector v) {
        float total = 0.0f;
        for (int lane = 0; lane < L; lane++) total += v[lane];
        return total;
    }

    // e^x for x <= 0: 2^n times a polynomial (coefficients of the Cephes library's expf), relative error under 2e-7.
    static STRETTO_INLINE Vector exponential(Vector x) {
        const Vector lowest = Vector{} - 87.0f;
        x = x < lowest ? lowest : x;
        const Vector scaled = x * 1.44269504088896341f - 0.5f;
        const Integers n = __builtin_convertvector(scaled, Integers);  // towards zero, so to the nearest for x <= 0
        const Vector whole = __builtin_convertvector(n, Vector);
        const Vector r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
        Vector y = Vector{} + 1.9875691500e-4f;
        y = y * r + 1.3981999507e-3f;
        y = y * r + 8.3334519073e-3f;
        y = y * r + 4.1665795894e-2f;
        y = y * r + 1.6666665459e-1f;
        y = y * r + 5.0000001201e-1f;
        y = y * r * r + r + 1.0f;
        const Integers power = (n + 127) << 23;
        Vector factor;
        std::memcpy(&factor, &power, sizeof factor);
        return y * factor;
    }
};

struct Call {
    const void *query;     // [rows, heads, D], `row_stride` elements from row to row
    int64_t row_stride;
    const void *cache;     // [pages, 2 * kv_heads, page_tokens, D]: key heads of a page, then its value heads
    const int64_t *table;  // [rows, table_width]
    int64_t table_width;
    const int64_t *length;  // [rows], at least 1
    void *out;              // [rows, heads, D]
    int64_t rows, kv_heads, group, page_tokens;
};

    static STRETTO_INLINE void store(float *p, float value) { *p = value; }

STRETTO_INLINE void store(uint16_t *p, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits += 0x7FFFu + ((bits >> 16) & 1u);  // to the nearest, ties to even
    *p = static_cast<uint16_t>(bits >> 16);
}

// QUERIES queries of one row that share KV head `head`; `first` is the number of the first of them in the row.
template <typename T, int DIM, int QUERIES, int LANES>
STRETTO_INLINE void attend(const Call &call, int64_t row, int64_t head, int64_t first) {
    using S = Simd<LANES>;
    using Vector = typename S::Vector;
    constexpr int kParts = DIM / LANES;
    const T *cache = static_cast<const T *>(call.cache);
    const T *query = static_cast<const T *>(call.query) + row * call.row_stride + first * DIM;
    const int64_t *table = call.table + row * call.table_width;
    const int64_t length = call.length[row], page_tokens = call.page_tokens, heads = 2 * call.kv_heads;
    const float scale = 1.0f / std::sqrt(static_cast<float>(DIM));

    Vector q[QUERIES][kParts], mixed[QUERIES][kParts];
    float most[QUERIES], total[QUERIES];
    alignas(64) float score[QUERIES][kBlock];
    for (int g = 0; g < QUERIES; g++) {
        for (int j = 0; j < kParts; j++) {
            q[g][j] = S::load(query + g * DIM + j * LANES) * scale;
            mixed[g][j] = Vector{};
        }
        most[g] = -std::numeric_limits<float>::infinity();
        total[g] = 0.0f;
    }

    for (int64_t at = 0; at < length;) {
        const int64_t offset = at % page_tokens, page = table[at / page_tokens];
        const int64_t left = std::min(length - at, page_tokens - offset);
        const int count = static_cast<int>(std::min<int64_t>(left, kBlock));
        const T *keys = cache + ((page * heads + head) * page_tokens + offset) * DIM;
        const T *values = cache + ((page * heads + call.kv_heads + head) * page_tokens + offset) * DIM;

        const int padded = (count + LANES - 1) / LANES * LANES;
        for (int i = 0; i < padded; i += LANES) {
            Vector dots[QUERIES][LANES];
            for (int t = 0; t < LANES; t++) {
                const T *key = keys + std::min(i + t, count - 1) * DIM;
                Vector k[kParts];
                for (int j = 0; j < kParts; j++) k[j] = S::load(key + j * LANES);
                for (int g = 0; g < QUERIES; g++) {
                    Vector dot = q[g][0] * k[0];
                    for (int j = 1; j < kParts; j++) dot += q[g][j] * k[j];
                    dots[g][t] = dot;
                }
            }
            for (int g = 0; g < QUERIES; g++) {
                const Vector found = S::sums(dots[g]);
                std::memcpy(&score[g][i], &found, sizeof found);
            }
        }
        for (int g = 0; g < QUERIES; g++) {
            float top = most[g];
            for (int i = 0; i < count; i++) top = score[g][i] > top ? score[g][i] : top;
            const float shrink = std::exp(most[g] - top);
            most[g] = top;
            for (int i = 0; i < padded; i += LANES) {
                const Vector p = S::exponential(S::load(&score[g][i]) - top);
                std::memcpy(&score[g][i], &p, sizeof p);
            }
            for (int i = count; i < padded; i++) score[g][i] = 0.0f;
            Vector sums = Vector{};
            for (int i = 0; i < padded; i += LANES) sums += S::load(&score[g][i]);
            total[g] = total[g] * shrink + S::sum(sums);
            for (int j = 0; j < kParts; j++) mixed[g][j] *= shrink;
        }
        for (int i = 0; i < count; i++) {
            for (int j = 0; j < kParts; j++) {
                const Vector v = S::load(values + i * DIM + j * LANES);
                for (int g = 0; g < QUERIES; g++) mixed[g][j] += v * score[g][i];
            }
        }
        at += count;
    }

    T *out = static_cast<T *>(call.out) + (row * call.kv_heads * call.group + first) * DIM;
    for (int g = 0; g < QUERIES; g++) {
        const float share = 1.0f / total[g];
        for (int j = 0; j < kParts; j++) {
            const Vector result = mixed[g][j] * share;
            for (int lane = 0; lane < LANES; lane++) store(out + g * DIM + j * LANES + lane, result[lane]);
        }
    }
}

template <typename T, int DIM, int LANES>
STRETTO_INLINE void attend_all(const Call &call) {
    for (int64_t row = 0; row < call.rows; row++) {
        for (int64_t head = 0; head < call.kv_heads; head++) {
            for (int64_t done = 0; done < call.group;) {
                const int64_t first = head * call.group + done, left = call.group - done;
                const int queries = static_cast<int>(left < kMostQueries ? left : kMostQueries);
                switch (queries) {
                    case 1: attend<T, DIM, 1, LANES>(call, row, head, first); break;
                    case 2: attend<T, DIM, 2, LANES>(call, row, head, first); break;
                    case 3: attend<T, DIM, 3, LANES>(call, row, head, first); break;
                    default: attend<T, DIM, 4, LANES>(call, row, head, first); break;
                }
                done += queries;
            }
        }
    }
}

template <typename T, int LANES>
STRETTO_INLINE void attend_dim(const Call &call, int64_t dim) {
    switch (dim) {
        case 16: return attend_all<T, 16, LANES>(call);
        case 32: return attend_all<T, 32, LANES>(call);
        case 64: return attend_all<T, 64, LANES>(call);
        case 80: return attend_all<T, 80, LANES>(call);
        case 96: return attend_all<T, 96, LANES>(call);
        case 128: return attend_all<T, 128, LANES>(call);
        default: throw std::invalid_argument("head_dim " + std::to_string(dim) + " has no kernel");
    }
}

template <int LANES>
STRETTO_INLINE void attend_type(const Call &call, int64_t dim, bool is_bf16) {
    if (is_bf16) {
        attend_dim<uint16_t, LANES>(call, dim);
    } else {
        attend_dim<float, LANES>(call, dim);
    }
}

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))) void attend_avx512(const Call &c, int64_t d, bool b) {
    attend_type<16>(c, d, b);
}
__attribute__((target("avx2,fma"))) void attend_avx2(const Call &c, int64_t d, bool b) {
    attend_type<8>(c, d, b);
}
#endif
void attend_plain(const Call &c, int64_t d, bool b) { attend_type<4>(c, d, b); }

std::string best_level() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        return "avx512";
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
    return "plain";
}

void decode_attention(const std::string &level, uintptr_t query, int64_t row_stride, uintptr_t cache, uintptr_t table,
                      int64_t table_width, uintptr_t length, uintptr_t out, int64_t rows, int64_t kv_heads,
                      int64_t group, int64_t page_tokens, int64_t dim, bool is_bf16) {
    const Call call{reinterpret_cast<const void *>(query),  row_stride,
                    reinterpret_cast<const void *>(cache),  reinterpret_cast<const int64_t *>(table),
                    table_width,                            reinterpret_cast<const int64_t *>(length),
                    reinterpret_cast<void *>(out),          rows,
                    kv_heads,                               group,
                    page_tokens};
    nb::gil_scoped_release release;
#if defined(__x86_64__)
    if (level == "avx512") return attend_avx512(call, dim, is_bf16);
    if (level == "avx2") return attend_avx2(call, dim, is_bf16);
#endif
    if (level == "plain") return attend_plain(call, dim, is_bf16);
    throw std::invalid_argument("level " + level + " is not known here");
}

}  // namespace

void bind_attention(nb::module_ &m) {
    m.def("best_level", &best_level);
    m.def("decode_attention", &decode_attention);
}
