// Attention of single new tokens over a paged KV cache: one online softmax for each row and KV head, over the block table as it
// is, so nothing is gathered, padded or masked. The order of every sum depends on the row's own length alone, never on who else
// shares the batch, nor on the number of threads: one row and KV head is always one thread's work.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "attention_pages.hpp"
#include "levels.hpp"

namespace {

constexpr int kMostQueries = 4;  // queries of one KV head that share a read of its keys

// An online softmax of QUERIES queries, and the values that it has mixed so far.
template <int DIM, int QUERIES, int LANES>
struct Mix {
    using S = Simd<LANES>;
    using Vector = typename S::Vector;
    static constexpr int kParts = DIM / LANES;

    Vector mixed[QUERIES][kParts];
    float most[QUERIES], total[QUERIES];
    alignas(64) float score[QUERIES][kBlock];

    STRETTO_INLINE Mix() {
        for (int g = 0; g < QUERIES; g++) {
            for (int j = 0; j < kParts; j++) mixed[g][j] = Vector{};
            most[g] = -std::numeric_limits<float>::infinity();
            total[g] = 0.0f;
        }
    }

    // Turns the scores of `count` further positions into their weights, and shrinks what was mixed before to match. Scores up to the
    // next multiple of LANES must be set, to none that is larger, and are 0 afterwards.
    STRETTO_INLINE void weigh(int count) {
        const int padded = (count + LANES - 1) / LANES * LANES;
        for (int g = 0; g < QUERIES; g++) {
            Vector tops = Vector{} + most[g];
            for (int i = 0; i < padded; i += LANES) {
                const Vector found = S::load(&score[g][i]);
                tops = found > tops ? found : tops;
            }
            const float top = S::largest(tops), shrink = S::exponential(Vector{} + (most[g] - top))[0];
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
    }

    template <typename T>
    STRETTO_INLINE void give(T *out) const {
        for (int g = 0; g < QUERIES; g++) {
            const float share = 1.0f / total[g];
            for (int j = 0; j < kParts; j++) {
                const Vector result = mixed[g][j] * share;
                for (int lane = 0; lane < LANES; lane++) store(out + g * DIM + j * LANES + lane, result[lane]);
            }
        }
    }
};

// Queries of one row, ready to be multiplied with keys of their type. With DOTS, bf16 queries and keys are multiplied as they are, in
// pairs, into fp32 sums.
template <typename T, int DIM, int QUERIES, int LANES, bool DOTS>
struct Queries {
    using S = Simd<LANES>;
    using Vector = typename S::Vector;
    static constexpr int kParts = DIM / LANES;

    Vector q[QUERIES][kParts];

    STRETTO_INLINE void load(const T *query) {
        for (int g = 0; g < QUERIES; g++) {
            if constexpr (DOTS) {
                for (int j = 0; j < kParts / 2; j++) std::memcpy(&q[g][j], query + g * DIM + 2 * j * LANES, sizeof q[g][j]);
            } else {
                for (int j = 0; j < kParts; j++) q[g][j] = S::load(query + g * DIM + j * LANES);
            }
        }
    }

    // Takes in `count` positions, at most kBlock, whose values lie `to_values` behind their keys; `next` is where keys are read next.
    STRETTO_INLINE void absorb(Mix<DIM, QUERIES, LANES> &mix, const T *const *keys, int count, int64_t to_values, const T *next) const {
        weigh(mix, keys, count, to_values);
        mix_values(mix, keys, count, to_values, next);
    }

    // The weights of `count` positions by their keys; their values are asked for.
    STRETTO_INLINE void weigh(Mix<DIM, QUERIES, LANES> &mix, const T *const *keys, int count, int64_t to_values) const {
        for (int i = 0; i < count; i += LANES) {
            for (int t = 0; t < std::min(LANES, count - i); t++) fetch<DIM>(keys[i + t] + to_values);
            score(mix, keys, i, count);
        }
        mix.weigh(count);
    }

    // Adds values by these weights; `next` is null if what comes next has been read a moment ago. Values may have been widened to fp32.
    template <typename K>
    STRETTO_INLINE void mix_values(Mix<DIM, QUERIES, LANES> &mix, const K *const *keys, int count, int64_t to_values, const T *next) const {
        for (int first = 0; first < kParts; first += kPartsAtOnce) {
            Vector mixed[QUERIES][kPartsAtOnce];
            for (int g = 0; g < QUERIES; g++) {
                for (int j = 0; j < kPartsAtOnce; j++) mixed[g][j] = mix.mixed[g][first + j];
            }
            for (int i = 0; i < count; i++) {
                if (next && first == 0) fetch<DIM>(next + i * DIM);
                for (int j = 0; j < kPartsAtOnce; j++) {
                    Vector v = S::load(keys[i] + to_values + (first + j) * LANES);
                    asm("" : "+x"(v));  // one load for all queries, which the compiler would repeat
                    for (int g = 0; g < QUERIES; g++) mixed[g][j] += v * mix.score[g][i];
                }
            }
            for (int g = 0; g < QUERIES; g++) {
                for (int j = 0; j < kPartsAtOnce; j++) mix.mixed[g][first + j] = mixed[g][j];
            }
        }
    }

  private:
    static constexpr int kPartsAtOnce = kParts % 4 ? kParts : 4;  // whose sums stay in registers

    // Scores of LANES positions from number `i` on.
    STRETTO_INLINE void score(Mix<DIM, QUERIES, LANES> &mix, const T *const *keys, int i, int count) const {
        Vector dots[QUERIES][LANES];
        for (int t = 0; t < LANES; t++) {
            const T *key = keys[std::min(i + t, count - 1)];
            Vector k[kParts];
            if constexpr (DOTS) {
                for (int j = 0; j < kParts / 2; j++) std::memcpy(&k[j], key + 2 * j * LANES, sizeof k[j]);
                for (int g = 0; g < QUERIES; g++) {
                    Vector dot{};
                    for (int j = 0; j < kParts / 2; j++) dot = S::add_bf16_pairs(dot, q[g][j], k[j]);
                    dots[g][t] = dot;
                }
            } else {
                for (int j = 0; j < kParts; j++) k[j] = S::load(key + j * LANES);
                for (int g = 0; g < QUERIES; g++) dots[g][t] = dot(g, k);
            }
        }
        for (int g = 0; g < QUERIES; g++) keep(mix, g, i, dots[g]);
    }

    STRETTO_INLINE Vector dot(int g, const Vector (&k)[kParts]) const {
        Vector sum = q[g][0] * k[0];
        for (int j = 1; j < kParts; j++) sum += q[g][j] * k[j];
        return sum;
    }

    STRETTO_INLINE void keep(Mix<DIM, QUERIES, LANES> &mix, int g, int i, Vector (&dots)[LANES]) const {
        S::store(&mix.score[g][i], S::sums(dots) * (1.0f / std::sqrt(static_cast<float>(DIM))));
    }
};

// A block of keys turned round: [DIM, kBlock], so that positions are the lanes of scores, and no sum runs across lanes.
template <int DIM, int LANES>
struct Turned {
    using S = Simd<LANES>;
    using Vector = typename S::Vector;
    static constexpr int kParts = DIM / LANES;
    static constexpr int kAtOnce = LANES < 16 ? 2 : 4;  // vectors of positions

    alignas(64) float keys[DIM][kBlock];

    // Positions from `count` on are filled with the last.
    template <typename T>
    STRETTO_INLINE void turn(const T *const *from, int count) {
        for (int i = 0; i < kBlock; i += LANES) {
            for (int j = 0; j < kParts; j++) {
                Vector v[LANES];
#pragma GCC unroll 16
                for (int t = 0; t < LANES; t++) v[t] = S::load(from[std::min(i + t, count - 1)] + j * LANES);
                S::turn(v);
#pragma GCC unroll 16
                for (int t = 0; t < LANES; t++) S::store(&keys[j * LANES + t][i], v[t]);
            }
        }
    }

    // Scores of all positions, [kBlock]; each sum in the order of `Queries::score`.
    STRETTO_INLINE void score(const float *query, float *scores) const {
        const float scale = 1.0f / std::sqrt(static_cast<float>(DIM));
        for (int i = 0; i < kBlock; i += kAtOnce * LANES) {
            Vector sums[kAtOnce];
            add<0, 1>(query, i, sums);
            for (int k = 0; k < kAtOnce; k++) S::store(scores + i + k * LANES, sums[k] * scale);
        }
    }

  private:
    // The sum of what lanes Lane, Lane + Distance, ... of a query's vectors give, in the order in which Simd::sums folds lanes.
    template <int Lane, int Distance>
    STRETTO_INLINE void add(const float *query, int i, Vector (&sums)[kAtOnce]) const {
        if constexpr (Distance < LANES) {
            Vector others[kAtOnce];
            add<Lane, 2 * Distance>(query, i, sums);
            add<Lane + Distance, 2 * Distance>(query, i, others);
            for (int k = 0; k < kAtOnce; k++) sums[k] += others[k];
        } else {
            for (int k = 0; k < kAtOnce; k++) sums[k] = S::load(&keys[Lane][i + k * LANES]) * query[Lane];
#pragma GCC unroll 8
            for (int j = 1; j < kParts; j++) {
                const int d = j * LANES + Lane;
                for (int k = 0; k < kAtOnce; k++) sums[k] += S::load(&keys[d][i + k * LANES]) * query[d];
            }
        }
    }
};

// QUERIES queries of each of some neighbouring rows: those of KV head `head`, from number `first` of the row on.
struct Range {
    int64_t row, count, head, first;
};

// Blocks of positions are read once for all rows, while each row's sums are what they would be alone: to the last bit.
template <typename T, int DIM, int QUERIES, int LANES, bool DOTS, typename LEVEL>
STRETTO_INLINE void attend(const Call &call, Range of) {
    using S = Simd<LANES>;
    Turned<DIM, LANES> turned;
    alignas(64) float values[kBlock][DIM];  // in one place, which the nearest cache holds
    const int64_t last = of.row + of.count - 1, longest = call.length[last];
    const int64_t to_values = call.kv_heads * call.page_tokens * DIM;  // from a key to its value
    Queries<T, DIM, QUERIES, LANES, DOTS> queries[kNeighbours];
    Mix<DIM, QUERIES, LANES> mix[kNeighbours];
    for (int64_t r = 0; r < of.count; r++) queries[r].load(queries_of<T>(call, of.row + r) + of.first * DIM);
    for (int64_t at = 0; at < longest; at += kBlock) {
        const int count = static_cast<int>(std::min<int64_t>(longest - at, kBlock));
        const T *keys[kBlock];
        find_keys<T, DIM>(call, last, of.head, at, count, keys);
        const T *next = next_keys<T, DIM>(call, keys[0], last, of.head, at + count);
        const auto left = [&](int64_t r) STRETTO_INLINED {
            return static_cast<int>(std::min<int64_t>(call.length[of.row + r] - at, kBlock));
        };
        if (DOTS || of.count == 1) {
            for (int64_t r = 0; r < of.count; r++) {
                if (left(r) > 0) queries[r].absorb(mix[r], keys, left(r), to_values, next);
            }
            continue;
        }
        LEVEL::turn(turned, keys, count);
        for (int64_t r = 0; r < of.count; r++) {
            const int seen = left(r);
            if (seen <= 0) continue;
            for (int g = 0; g < QUERIES; g++) {
                LEVEL::score(turned, reinterpret_cast<const float *>(queries[r].q[g]), mix[r].score[g]);
                for (int i = seen; i < kBlock; i++) mix[r].score[g][i] = mix[r].score[g][seen - 1];
            }
            mix[r].weigh(seen);
        }
        const float *near[kBlock];
        for (int i = 0; i < count; i++) {
            for (int j = 0; j < DIM; j += LANES) S::store(&values[i][j], S::load(keys[i] + to_values + j));
            near[i] = values[i];
        }
        for (int64_t r = 0; r < of.count; r++) {
            if (left(r) > 0) queries[r].mix_values(mix[r], near, left(r), 0, nullptr);
        }
    }
    for (int64_t r = 0; r < of.count; r++) mix[r].give(result_of<T>(call, of.row + r) + of.first * DIM);
}

// Takes in a page in 4 bits: its keys by channel, with positions as lanes, then its values by position, with channels as lanes.
template <int DIM, int QUERIES, int LANES>
STRETTO_INLINE void absorb_packed(Mix<DIM, QUERIES, LANES> &mix, const float *query, const uint8_t *page) {
    using S = Simd<LANES>;
    using Vector = typename S::Vector;
    constexpr int kParts = DIM / LANES, kRuns = kBlock / LANES;
    const uint8_t *values = page + packed_half_bytes(DIM);
    const auto *key_numbers = reinterpret_cast<const uint16_t *>(page + packed_keys_bytes(DIM));
    const auto *value_numbers = reinterpret_cast<const uint16_t *>(values + packed_keys_bytes(DIM));

    alignas(64) float scaled[QUERIES][DIM];
    float offset[QUERIES];
    for (int g = 0; g < QUERIES; g++) {
        Vector offsets{};
        for (int j = 0; j < kParts; j++) {
            const Vector q = S::load(query + g * DIM + j * LANES);
            offsets += q * S::load_fp16(key_numbers + DIM + j * LANES);
            S::store(&scaled[g][j * LANES], q * S::load_fp16(key_numbers + j * LANES));
        }
        offset[g] = S::sum(offsets);
    }
    for (int i = 0; i < kRuns / 2; i++) {
        Vector near[QUERIES], far[QUERIES];
        for (int g = 0; g < QUERIES; g++) near[g] = far[g] = Vector{} + offset[g];
        for (int d = 0; d < DIM; d++) {
            Vector low, high;
            S::load_nibbles(page + d * (kBlock / 2) + i * LANES, low, high);
            for (int g = 0; g < QUERIES; g++) {
                near[g] += low * scaled[g][d];
                far[g] += high * scaled[g][d];
            }
        }
        for (int g = 0; g < QUERIES; g++) {
            S::store(&mix.score[g][i * LANES], near[g]);
            S::store(&mix.score[g][kBlock / 2 + i * LANES], far[g]);
        }
    }
    mix.weigh(kBlock);

    float weight[QUERIES];
    for (int g = 0; g < QUERIES; g++) {
        Vector sum{};
        for (int i = 0; i < kBlock; i += LANES) sum += S::load(&mix.score[g][i]);
        weight[g] = S::sum(sum);
    }
    for (int j = 0; j < kParts / 2; j++) {
        Vector near[QUERIES], far[QUERIES];
        for (int g = 0; g < QUERIES; g++) near[g] = far[g] = Vector{};
        for (int t = 0; t < kBlock; t++) {
            Vector low, high;
            S::load_nibbles(values + t * (DIM / 2) + j * LANES, low, high);
            for (int g = 0; g < QUERIES; g++) {
                near[g] += low * mix.score[g][t];
                far[g] += high * mix.score[g][t];
            }
        }
        for (int g = 0; g < QUERIES; g++) {
            const auto add = [&](int part, Vector codes) {
                const uint16_t *numbers = value_numbers + part * LANES;
                mix.mixed[g][part] += codes * S::load_fp16(numbers) + S::load_fp16(numbers + DIM) * weight[g];
            };
            add(j, near[g]);
            add(kParts / 2 + j, far[g]);
        }
    }
}

// The same over a cache in 4 bits: pages before that of the row's own position are packed, its own is open.
template <typename T, int DIM, int QUERIES, int LANES, bool DOTS>
STRETTO_INLINE void attend_packed(const Call &call, int64_t row, int64_t head, int64_t first) {
    using S = Simd<LANES>;
    const int64_t *table = call.table + row * call.table_width;
    const int64_t length = call.length[row], full = (length - 1) / kPagePositions;
    const int64_t stride = call.kv_heads * packed_page_bytes(DIM);
    const uint8_t *pages = static_cast<const uint8_t *>(call.cache) + head * packed_page_bytes(DIM);
    const T *query = queries_of<T>(call, row) + first * DIM;
    const float scale = 1.0f / std::sqrt(static_cast<float>(DIM));
    alignas(64) float ready[QUERIES * DIM];
    for (int i = 0; i < QUERIES * DIM; i += LANES) S::store(ready + i, S::load(query + i) * scale);
    Mix<DIM, QUERIES, LANES> mix;
    for (int64_t page = 0; page < full; page++) {
        const uint8_t *next = pages + table[page + 1 < full ? page + 1 : page] * stride;
        for (int64_t byte = 0; byte < packed_keys_bytes(DIM); byte += 64) __builtin_prefetch(next + byte);
        absorb_packed<DIM, QUERIES, LANES>(mix, ready, pages + table[page] * stride);
    }
    const int64_t open = call.open_table[row * call.table_width + full];
    const T *key = static_cast<const T *>(call.open) + (open * 2 * call.kv_heads + head) * kPagePositions * DIM;
    const int count = static_cast<int>(length - full * kPagePositions);
    const T *keys[kBlock];
    for (int i = 0; i < count; i++) keys[i] = key + i * DIM;
    Queries<T, DIM, QUERIES, LANES, DOTS> queries;
    queries.load(query);
    queries.absorb(mix, keys, count, call.kv_heads * kPagePositions * DIM, key);
    mix.give(result_of<T>(call, row) + first * DIM);
}

// One function for each level, type, width and number of queries: all of them in one would take minutes to compile.

#define STRETTO_ATTEND(NAME, TARGET, LANES, DOTS)                                                                    \
    struct Turning_##NAME {                                                                                          \
        template <int DIM>                                                                                           \
        TARGET __attribute__((noinline)) static void score(const Turned<DIM, LANES> &keys, const float *query, float *to) { \
            keys.score(query, to);                                                                                   \
        }                                                                                                            \
        template <typename T, int DIM>                                                                               \
        TARGET __attribute__((noinline)) static void turn(Turned<DIM, LANES> &keys, const T *const *from, int count) { \
            keys.turn(from, count);                                                                                  \
        }                                                                                                            \
    };                                                                                                               \
    template <typename T, int DIM, int QUERIES>                                                                      \
    TARGET __attribute__((noinline)) void plain_##NAME(const Call &call, Range at) {                                 \
        constexpr bool dots = DOTS && sizeof(T) == 2 && DIM % 32 == 0;                                               \
        attend<T, DIM, QUERIES, LANES, dots, Turning_##NAME>(call, at);                                              \
    }                                                                                                                \
    template <typename T, int DIM, int QUERIES>                                                                      \
    TARGET __attribute__((noinline)) void packed_##NAME(const Call &call, Range at) {                                \
        for (int64_t row = at.row; row < at.row + at.count; row++) {                                                 \
            attend_packed<T, DIM, QUERIES, LANES, DOTS && sizeof(T) == 2>(call, row, at.head, at.first);             \
        }                                                                                                            \
    }                                                                                                                \
    struct Level_##NAME {                                                                                            \
        template <typename T, int DIM, int QUERIES>                                                                  \
        static void attend(const Call &call, Range at) {                                                             \
            if constexpr (DIM % 32 == 0) {                                                                           \
                if (call.open) return packed_##NAME<T, DIM, QUERIES>(call, at);                                      \
            }                                                                                                        \
            plain_##NAME<T, DIM, QUERIES>(call, at);                                                                 \
        }                                                                                                            \
    };

template <typename Level, typename T, int DIM>
void attend_head(const Call &call, int64_t row, int64_t count, int64_t head) {
    for (int64_t done = 0; done < call.group;) {
        const Range at{row, count, head, head * call.group + done};
        const int64_t left = call.group - done, queries = left < kMostQueries ? left : kMostQueries;
        switch (queries) {
            case 1: Level::template attend<T, DIM, 1>(call, at); break;
            case 2: Level::template attend<T, DIM, 2>(call, at); break;
            case 3: Level::template attend<T, DIM, 3>(call, at); break;
            default: Level::template attend<T, DIM, 4>(call, at); break;
        }
        done += queries;
    }
}

template <typename Level, typename T>
void attend_dim(const Call &call, int64_t row, int64_t count, int64_t head) {
    switch (call.dim) {
        case 16: return attend_head<Level, T, 16>(call, row, count, head);
        case 32: return attend_head<Level, T, 32>(call, row, count, head);
        case 64: return attend_head<Level, T, 64>(call, row, count, head);
        case 80: return attend_head<Level, T, 80>(call, row, count, head);
        case 96: return attend_head<Level, T, 96>(call, row, count, head);
        case 128: return attend_head<Level, T, 128>(call, row, count, head);
    }
}

template <typename Narrow, typename Wide>
void attend_level(const Call &call, int64_t row, int64_t count, int64_t head) {
    call.is_bf16 ? attend_dim<Narrow, uint16_t>(call, row, count, head) : attend_dim<Wide, float>(call, row, count, head);
}

}  // namespace
