// The measuring loops and their timing. See kernels.hpp for what a tile is.
#include "kernels.hpp"
#include "processes.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nb = nanobind;

namespace probe {
namespace {

float widen(uint16_t bf16) {
    const uint32_t bits = uint32_t(bf16) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

int32_t quad(uint32_t packed) { return int32_t(packed); }

// --- plain: eight columns at a time, so that the accumulators fit into sixteen registers of four

template <int Group, typename A, typename B, typename C, typename Multiply>
void tile_plain(const A *a, const B *b, size_t inner, C *c, Multiply multiply) {
    constexpr int kSlice = 8;
    for (int first = 0; first < kColumns; first += kSlice) {
        C sum[kRows][kSlice] = {};
        for (size_t step = 0; step < inner / Group; ++step) {
            for (int row = 0; row < kRows; ++row) {
                for (int column = 0; column < kSlice; ++column) {
                    for (int g = 0; g < Group; ++g) {
                        sum[row][column] += multiply(a[(step * kRows + size_t(row)) * Group + size_t(g)],
                                                     b[(step * kColumns + size_t(first + column)) * Group + size_t(g)]);
                    }
                }
            }
        }
        for (int row = 0; row < kRows; ++row) {
            for (int column = 0; column < kSlice; ++column) { c[row * kColumns + first + column] += sum[row][column]; }
        }
    }
}

// Four columns in one register of the baseline's own vector unit (SSE2, NEON), which the compiler does not find by itself.
void fp32_plain(const float *a, const float *b, size_t inner, float *c) {
    typedef float Four __attribute__((vector_size(16)));
    for (int first = 0; first < kColumns; first += 8) {
        Four sum[kRows][2] = {};
        for (size_t step = 0; step < inner; ++step) {
            Four left, right;
            std::memcpy(&left, b + step * kColumns + first, 16);
            std::memcpy(&right, b + step * kColumns + first + 4, 16);
#pragma GCC unroll 6
            for (int row = 0; row < kRows; ++row) {
                sum[row][0] += a[step * kRows + size_t(row)] * left;
                sum[row][1] += a[step * kRows + size_t(row)] * right;
            }
        }
        for (int row = 0; row < kRows; ++row) {
            for (int column = 0; column < 8; ++column) {
                c[row * kColumns + first + column] += sum[row][column / 4][column % 4];
            }
        }
    }
}

uint64_t read_plain(const uint64_t *words, size_t count) {
    uint64_t sum = 0;
    for (size_t i = 0; i < count; ++i) { sum += words[i]; }
    return sum;
}

#if defined(__x86_64__)

uint32_t bits_of(const void *at) {
    uint32_t bits;
    std::memcpy(&bits, at, 4);
    return bits;
}

// --- avx2: sixteen columns at a time, two registers for each of six rows

#define AVX2 __attribute__((target("avx2,fma")))

AVX2 uint64_t read_avx2(const uint64_t *words, size_t count) {
    __m256i sum[4] = {};
    size_t i = 0;
    for (; i + 16 <= count; i += 16) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            sum[j] = _mm256_add_epi64(sum[j], _mm256_loadu_si256(reinterpret_cast<const __m256i *>(words + i) + j));
        }
    }
    uint64_t lanes[4];
    const __m256i all = _mm256_add_epi64(_mm256_add_epi64(sum[0], sum[1]), _mm256_add_epi64(sum[2], sum[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(lanes), all);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3] + read_plain(words + i, count - i);
}

AVX2 void copy_avx2(const uint64_t *from, uint64_t *to, size_t count) {
    size_t i = 0;
    for (; i + 4 <= count; i += 4) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + i),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + i)));
    }
    std::memcpy(to + i, from + i, (count - i) * 8);
}

AVX2 void fp32_avx2(const float *a, const float *b, size_t inner, float *c) {
    for (int first = 0; first < kColumns; first += 16) {
        __m256 sum[kRows][2] = {};
        for (size_t step = 0; step < inner; ++step) {
            const __m256 left = _mm256_loadu_ps(b + step * kColumns + first);
            const __m256 right = _mm256_loadu_ps(b + step * kColumns + first + 8);
#pragma GCC unroll 6
            for (int row = 0; row < kRows; ++row) {
                const __m256 x = _mm256_broadcast_ss(a + step * kRows + row);
                sum[row][0] = _mm256_fmadd_ps(x, left, sum[row][0]);
                sum[row][1] = _mm256_fmadd_ps(x, right, sum[row][1]);
            }
        }
        for (int row = 0; row < kRows; ++row) {
            float *at = c + row * kColumns + first;
            _mm256_storeu_ps(at, _mm256_add_ps(_mm256_loadu_ps(at), sum[row][0]));
            _mm256_storeu_ps(at + 8, _mm256_add_ps(_mm256_loadu_ps(at + 8), sum[row][1]));
        }
    }
}

// Without a bf16 dot product, a pair is two fp32 numbers: the high half as it stands, the low half shifted up.
AVX2 void bf16_avx2(const uint16_t *a, const uint16_t *b, size_t inner, float *c) {
    const __m256i high = _mm256_set1_epi32(int(0xffff0000u));
    for (int first = 0; first < kColumns; first += 8) {
        __m256 sum[kRows] = {};
        for (size_t step = 0; step < inner / 2; ++step) {
            const __m256i pair =
                _mm256_loadu_si256(reinterpret_cast<const __m256i *>(b + (step * kColumns + size_t(first)) * 2));
            const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
            const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(pair, high));
#pragma GCC unroll 6
            for (int row = 0; row < kRows; ++row) {
                const __m256i x = _mm256_set1_epi32(int(bits_of(a + (step * kRows + size_t(row)) * 2)));
                sum[row] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), even, sum[row]);
                sum[row] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(x, high)), odd, sum[row]);
            }
        }
        for (int row = 0; row < kRows; ++row) {
            float *at = c + row * kColumns + first;
            _mm256_storeu_ps(at, _mm256_add_ps(_mm256_loadu_ps(at), sum[row]));
        }
    }
}

// maddubs adds two products in 16 bits: exact while the callers keep |a * b| within 2^14.
AVX2 void int8_avx2(const uint8_t *a, const int8_t *b, size_t inner, int32_t *c) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int first = 0; first < kColumns; first += 16) {
        __m256i sum[kRows][2] = {};
        for (size_t step = 0; step < inner / 4; ++step) {
            const auto *at = reinterpret_cast<const __m256i *>(b + (step * kColumns + size_t(first)) * 4);
            const __m256i left = _mm256_loadu_si256(at), right = _mm256_loadu_si256(at + 1);
#pragma GCC unroll 6
            for (int row = 0; row < kRows; ++row) {
                const __m256i x = _mm256_set1_epi32(quad(bits_of(a + (step * kRows + size_t(row)) * 4)));
                sum[row][0] = _mm256_add_epi32(sum[row][0], _mm256_madd_epi16(_mm256_maddubs_epi16(x, left), ones));
                sum[row][1] = _mm256_add_epi32(sum[row][1], _mm256_madd_epi16(_mm256_maddubs_epi16(x, right), ones));
            }
        }
        for (int row = 0; row < kRows; ++row) {
            auto *at = reinterpret_cast<__m256i *>(c + row * kColumns + first);
            _mm256_storeu_si256(at, _mm256_add_epi32(_mm256_loadu_si256(at), sum[row][0]));
            _mm256_storeu_si256(at + 1, _mm256_add_epi32(_mm256_loadu_si256(at + 1), sum[row][1]));
        }
    }
}

// --- avx512: all columns at once, two registers for each of six rows

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vnni,avx512bf16")))

AVX512 uint64_t read_avx512(const uint64_t *words, size_t count) {
    __m512i sum[4] = {};
    size_t i = 0;
    for (; i + 32 <= count; i += 32) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            sum[j] = _mm512_add_epi64(sum[j], _mm512_loadu_si512(words + i + 8 * j));
        }
    }
    uint64_t lanes[8], total = 0;
    _mm512_storeu_si512(lanes, _mm512_add_epi64(_mm512_add_epi64(sum[0], sum[1]), _mm512_add_epi64(sum[2], sum[3])));
    for (uint64_t lane : lanes) { total += lane; }
    return total + read_plain(words + i, count - i);
}

AVX512 void copy_avx512(const uint64_t *from, uint64_t *to, size_t count) {
    size_t i = 0;
    for (; i + 8 <= count; i += 8) { _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i)); }
    std::memcpy(to + i, from + i, (count - i) * 8);
}

#define TILE_AVX512(name, A, B, C, vector, zero, group, broadcast, multiply, load, add, store)                         \
    AVX512 void name(const A *a, const B *b, size_t inner, C *c) {                                                     \
        vector sum[kRows][2];                                                                                          \
        for (auto &row : sum) { row[0] = row[1] = zero; }                                                              \
        for (size_t step = 0; step < inner / group; ++step) {                                                          \
            const B *at = b + step * kColumns * group;                                                                 \
            const auto left = _mm512_loadu_si512(at), right = _mm512_loadu_si512(at + 16 * group);                     \
            _Pragma("GCC unroll 6") for (int row = 0; row < kRows; ++row) {                                            \
                const auto x = _mm512_set1_epi32(int(bits_of(a + (step * kRows + size_t(row)) * group)));              \
                sum[row][0] = multiply(sum[row][0], broadcast(x), broadcast(left));                                    \
                sum[row][1] = multiply(sum[row][1], broadcast(x), broadcast(right));                                   \
            }                                                                                                          \
        }                                                                                                              \
        for (int row = 0; row < kRows; ++row) {                                                                        \
            for (int half = 0; half < 2; ++half) {                                                                     \
                C *at = c + row * kColumns + 16 * half;                                                                \
                store(at, add(load(at), sum[row][half]));                                                              \
            }                                                                                                          \
        }                                                                                                              \
    }

#define FMA(sum, x, y) _mm512_fmadd_ps(x, y, sum)
#define AS_PAIRS(x) __m512bh(x)
#define AS_BYTES(x) x
TILE_AVX512(fp32_avx512, float, float, float, __m512, _mm512_setzero_ps(), 1, _mm512_castsi512_ps, FMA, _mm512_loadu_ps,
            _mm512_add_ps, _mm512_storeu_ps)
TILE_AVX512(bf16_avx512, uint16_t, uint16_t, float, __m512, _mm512_setzero_ps(), 2, AS_PAIRS, _mm512_dpbf16_ps,
            _mm512_loadu_ps, _mm512_add_ps, _mm512_storeu_ps)
TILE_AVX512(int8_avx512, uint8_t, int8_t, int32_t, __m512i, _mm512_setzero_si512(), 4, AS_BYTES, _mm512_dpbusd_epi32,
            _mm512_loadu_si512, _mm512_add_epi32, _mm512_storeu_si512)

#endif

} // namespace

Level best_level() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni") &&
        __builtin_cpu_supports("avx512bf16")) {
        return Level::avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) { return Level::avx2; }
#endif
    return Level::plain;
}

#if defined(__x86_64__)
#define AT_LEVEL(avx512_call, avx2_call)                                                                               \
    if (level == Level::avx512) { return avx512_call; }                                                                \
    if (level == Level::avx2) { return avx2_call; }
#else
#define AT_LEVEL(avx512_call, avx2_call)
#endif

uint64_t read_words(Level level, const uint64_t *words, size_t count) {
    AT_LEVEL(read_avx512(words, count), read_avx2(words, count))
    return read_plain(words, count);
}

void copy_words(Level level, const uint64_t *from, uint64_t *to, size_t count) {
    AT_LEVEL(copy_avx512(from, to, count), copy_avx2(from, to, count))
    std::memcpy(to, from, count * 8);
}

void tile_fp32(Level level, const float *a, const float *b, size_t inner, float *c) {
    AT_LEVEL(fp32_avx512(a, b, inner, c), fp32_avx2(a, b, inner, c))
    fp32_plain(a, b, inner, c);
}

void tile_bf16(Level level, const uint16_t *a, const uint16_t *b, size_t inner, float *c) {
    AT_LEVEL(bf16_avx512(a, b, inner, c), bf16_avx2(a, b, inner, c))
    tile_plain<2>(a, b, inner, c, [](uint16_t x, uint16_t y) { return widen(x) * widen(y); });
}

void tile_int8(Level level, const uint8_t *a, const int8_t *b, size_t inner, int32_t *c) {
    AT_LEVEL(int8_avx512(a, b, inner, c), int8_avx2(a, b, inner, c))
    tile_plain<4>(a, b, inner, c, [](uint8_t x, int8_t y) { return int32_t(x) * int32_t(y); });
}

} // namespace probe

namespace {

using probe::kColumns;
using probe::kRows;
using probe::Level;
using probe::Clock;

const char *kLevels[] = {"plain", "avx2", "avx512"};

Level level_of(const std::string &name) {
    for (int i = 0; i <= int(probe::best_level()); ++i) {
        if (name == kLevels[i]) { return Level(i); }
    }
    throw std::invalid_argument("level is " + name + "; this machine runs up to " + kLevels[int(probe::best_level())]);
}

// Seconds from the moment when all threads stand ready until the last has finished work(thread).
double timed(int threads, const std::function<void(int)> &work) {
    if (threads < 1 || threads > 4096) { throw std::invalid_argument("threads must be 1 to 4096"); }
    std::atomic<int> ready{0};
    std::atomic<bool> go{false};
    std::vector<std::thread> team;
    for (int t = 1; t < threads; ++t) {
        team.emplace_back([&, t] {
            ready.fetch_add(1);
            while (!go.load(std::memory_order_acquire)) { std::this_thread::yield(); }
            work(t);
        });
    }
    while (ready.load() < threads - 1) { std::this_thread::yield(); }
    const auto start = Clock::now();
    go.store(true, std::memory_order_release);
    work(0);
    for (auto &thread : team) { thread.join(); }
    return std::chrono::duration<double>(Clock::now() - start).count();
}

template <typename T> using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

std::pair<size_t, size_t> part(size_t count, int thread, int threads) {
    const size_t first = count * size_t(thread) / size_t(threads), last = count * size_t(thread + 1) / size_t(threads);
    return {first, last - first};
}

std::tuple<double, uint64_t> read_timed(const std::string &level, const Array<const uint64_t> &words, int repeats, int threads) {
    const Level at = level_of(level);
    std::vector<uint64_t> sums(size_t(std::max(threads, 1)));
    nb::gil_scoped_release unlocked;
    const double seconds = timed(threads, [&](int t) {
        const auto [first, count] = part(words.size(), t, threads);
        uint64_t sum = 0;
        for (int r = 0; r < repeats; ++r) { sum += probe::read_words(at, words.data() + first, count); }
        sums[size_t(t)] = sum;
    });
    uint64_t total = 0;
    for (uint64_t sum : sums) { total += sum; }
    return {seconds, total};
}

double copy_timed(const std::string &level, const Array<const uint64_t> &from, const Array<uint64_t> &to, int repeats, int threads) {
    const Level at = level_of(level);
    if (from.size() != to.size()) { throw std::invalid_argument("from and to must be of one size"); }
    nb::gil_scoped_release unlocked;
    return timed(threads, [&](int t) {
        const auto [first, count] = part(from.size(), t, threads);
        for (int r = 0; r < repeats; ++r) { probe::copy_words(at, from.data() + first, to.data() + first, count); }
    });
}

// Every thread runs `repeats` tiles over the same A and its own part of B; C holds a tile a thread.
template <int Group, typename A, typename B, typename C, typename Tile>
double tile(const std::string &level, const Array<const A> &a, const Array<const B> &b, const Array<C> &c, int repeats, int threads,
            Tile kernel) {
    const Level at = level_of(level);
    const size_t inner = a.size() / kRows;
    if (inner == 0 || inner % Group || a.size() != inner * kRows || b.size() != inner * kColumns * size_t(threads) ||
        c.size() != size_t(kRows * kColumns * threads)) {
        throw std::invalid_argument("a, b and c must hold inner x 6, threads x inner x 32 and threads x 6 x 32");
    }
    nb::gil_scoped_release unlocked;
    return timed(threads, [&](int t) {
        const B *own = b.data() + size_t(t) * inner * kColumns;
        for (int r = 0; r < repeats; ++r) { kernel(at, a.data(), own, inner, c.data() + t * kRows * kColumns); }
    });
}

// The same with AMX tiles, whose A is [32][inner].
template <typename A, typename B, typename C, typename Tile>
double amx_tile(const Array<const A> &a, const Array<const B> &b, const Array<C> &c, int repeats, int threads, Tile kernel) {
    if (!probe::has_amx()) { throw std::invalid_argument("this machine has no AMX tiles"); }
    const size_t side = probe::kAmxSide, inner = a.size() / side;
    if (inner == 0 || inner % (64 / sizeof(A)) || a.size() != inner * side || b.size() != inner * side * size_t(threads) ||
        c.size() != side * side * size_t(threads)) {
        throw std::invalid_argument("a, b and c must hold 32 x inner, threads x inner x 32 and threads x 32 x 32");
    }
    nb::gil_scoped_release unlocked;
    return timed(threads, [&](int t) {
        kernel(a.data(), b.data() + size_t(t) * inner * side, inner, c.data() + size_t(t) * side * side, repeats);
    });
}

std::string best_level_name() { return kLevels[int(probe::best_level())]; }

} // namespace

void bind_loops(nb::module_ &m) {
    using namespace nb::literals;
    m.def("best_level", &best_level_name);
    m.def("read", &read_timed, "level"_a, "words"_a, "repeats"_a, "threads"_a);
    m.def("copy", &copy_timed, "level"_a, "source"_a, "target"_a, "repeats"_a, "threads"_a);
    m.def(
        "tile_fp32",
        [](const std::string &level, Array<const float> a, Array<const float> b, Array<float> c, int repeats, int threads) {
            return tile<1>(level, a, b, c, repeats, threads, probe::tile_fp32);
        },
        "level"_a, "a"_a, "b"_a, "c"_a, "repeats"_a, "threads"_a);
    m.def(
        "tile_bf16",
        [](const std::string &level, Array<const uint16_t> a, Array<const uint16_t> b, Array<float> c, int repeats,
           int threads) { return tile<2>(level, a, b, c, repeats, threads, probe::tile_bf16); },
        "level"_a, "a"_a, "b"_a, "c"_a, "repeats"_a, "threads"_a);
    m.def(
        "tile_int8",
        [](const std::string &level, Array<const uint8_t> a, Array<const int8_t> b, Array<int32_t> c, int repeats,
           int threads) { return tile<4>(level, a, b, c, repeats, threads, probe::tile_int8); },
        "level"_a, "a"_a, "b"_a, "c"_a, "repeats"_a, "threads"_a);
    m.def("has_amx", &probe::has_amx);
    m.def(
        "amx_bf16",
        [](Array<const uint16_t> a, Array<const uint16_t> b, Array<float> c, int repeats, int threads) {
            return amx_tile(a, b, c, repeats, threads, probe::amx_bf16);
        },
        "a"_a, "b"_a, "c"_a, "repeats"_a, "threads"_a);
    m.def(
        "amx_int8",
        [](Array<const uint8_t> a, Array<const int8_t> b, Array<int32_t> c, int repeats, int threads) {
            return amx_tile(a, b, c, repeats, threads, probe::amx_int8);
        },
        "a"_a, "b"_a, "c"_a, "repeats"_a, "threads"_a);
    const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
    m.def("stolen_share", &probe::stolen_share, "seconds"_a, unlocked);
    m.def("wake", &probe::wake, "rounds"_a, unlocked);
    m.def("shared_message", &probe::shared_message, "bytes"_a, "rounds"_a, "limit_s"_a, unlocked);
}
