// Attention over a cache in bf16 by AMX: up to sixteen queries of a KV head at once, those of neighbouring rows together.
//
// Keys are the rows of the first product as they lie in memory, and queries its columns, so scores come with queries as lanes and their
// softmax needs no sum across lanes. Weights of positions, rounded to bf16 and turned round, are then the rows of the second product,
// and values its columns, two positions side by side. A query's numbers depend on no other's: what lies beyond its length weighs
// nothing, and adding nothing changes no sum.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "amx_tiles.hpp"
#include "attention_pages.hpp"
#include "levels.hpp"

namespace {

#define STRETTO_INLINE_512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"), always_inline))

using S = Simd<16>;
using Lanes = __m512;

constexpr int kPairs = kBlock / 2;         // of neighbouring positions
constexpr int kMostTiles = 4;              // of queries, whose sums one call holds
constexpr float kNothing = -1e30f;         // a score below all others that can still be subtracted
constexpr int kBlockTiles = kBlock / kTile;

// Sixteen queries: as columns of the first product, and what has been found for them so far.
template <int DIM>
struct alignas(64) QueryTile {
    uint32_t words[DIM / 32][kTile][kTile];  // two neighbouring elements of sixteen queries in each row
    float mixed[kTile][DIM];                 // values by weights, in the order of `Block::values`
    int32_t length[kTile];                   // positions that each query sees
    float most[kTile], total[kTile];
    int count, shortest;
};

// Sixty-four positions.
template <int DIM>
struct alignas(64) Block {
    uint16_t keys[kBlock][DIM];                     // only where they do not lie side by side in the cache
    uint16_t values[DIM / kTile][kPairs][2 * kTile];  // two positions of sixteen elements in each row
};

// What one tile of queries makes of a block.
struct alignas(64) Scores {
    float of[kBlock][kTile];
    uint32_t pairs[kPairs][kTile];             // weights of two positions in bf16
    uint32_t weights[2][kTile][kTile];         // the same, a row for each query
    float sums[kBlockTiles][kTile][kTile];
    float shrink[kTile];
};

// The positions that this thread reads after those at hand.
template <int DIM>
struct Ahead {
    const uint16_t *keys[kBlock];
    int count = 0;
    int64_t to_values;

    // Those from `at` on of a row's head, or if it ends there, of what comes after it.
    STRETTO_INLINE void find(const Call &call, int64_t row, int64_t head, int64_t at) {
        to_values = call.kv_heads * call.page_tokens * DIM;
        count = 0;
        if (at >= call.length[row]) {
            at = 0;
            if (++head == call.kv_heads) row++, head = 0;
            if (row == call.rows) return;
        }
        count = static_cast<int>(std::min<int64_t>(call.length[row] - at, kBlock));
        find_keys<uint16_t, DIM>(call, row, head, at, count, keys);
    }

    // Asks for a few of them at a time: all at once would fill what a core can wait for, and it would stand still.
    STRETTO_INLINE void fetch_some(int first, int some) const {
        for (int i = first; i < std::min(first + some, count); i++) {
            fetch<DIM>(keys[i]);
            fetch<DIM>(keys[i] + to_values);
        }
    }
};

// Queries number `first` and on, in the order of rows and within a row of its heads.
template <int DIM>
STRETTO_TARGET_AVX512 __attribute__((noinline)) void load_queries(const Call &call, int64_t row, int64_t rows, int64_t head, int64_t first, QueryTile<DIM> &tile) {
    tile.count = static_cast<int>(std::min<int64_t>(kTile, rows * call.group - first));
    tile.shortest = static_cast<int>(call.length[row + first / call.group]);
    const uint16_t *from[kTile];
    for (int n = 0; n < tile.count; n++) {
        const int64_t of = row + (first + n) / call.group;
        from[n] = queries_of<uint16_t>(call, of) + (head * call.group + (first + n) % call.group) * DIM;
        tile.length[n] = static_cast<int32_t>(call.length[of]);
    }
    for (int n = tile.count; n < kTile; n++) tile.length[n] = tile.length[tile.count - 1];
    for (int part = 0; part < DIM / 32; part++) {
        S::Vector v[kTile];
#pragma GCC unroll 16
        for (int n = 0; n < kTile; n++) {
            v[n] = S::Vector{};
            if (n < tile.count) std::memcpy(&v[n], from[n] + 32 * part, sizeof v[n]);
        }
        S::turn(v);
#pragma GCC unroll 16
        for (int n = 0; n < kTile; n++) std::memcpy(tile.words[part][n], &v[n], sizeof v[n]);
    }
    std::memset(tile.mixed, 0, sizeof tile.mixed);
    for (int n = 0; n < kTile; n++) tile.most[n] = kNothing, tile.total[n] = 0.0f;
}

// Scores of up to sixty-four positions whose keys lie `stride` bytes apart.
template <int DIM>
STRETTO_INLINE_512 inline void score(const QueryTile<DIM> &tile, const uint16_t *keys, int tiles, Scores &scores) {
    for (int t = 0; t < tiles; t += 2) {
        const uint16_t *near = keys + t * kTile * DIM, *far = near + (t + 1 < tiles ? kTile * DIM : 0);
        clear_tile<0>();
        clear_tile<1>();
#pragma GCC unroll 4
        for (int part = 0; part < DIM / 32; part++) {
            load_tile<6>(tile.words[part], 64);
            load_tile<4>(near + 32 * part, 2 * DIM);
            multiply_bf16<0, 4, 6>();
            load_tile<5>(far + 32 * part, 2 * DIM);
            multiply_bf16<1, 5, 6>();
        }
        store_tile<0>(scores.of[t * kTile]);
        store_tile<1>(scores.of[(t + 1) * kTile]);
    }
}

// 2^x for x <= 0: the polynomial is the series of the exponential.
STRETTO_INLINE_512 inline Lanes power_of_two(Lanes x) {
    const Lanes whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, whole);
    Lanes y = _mm512_set1_ps(1.5403530393381608e-4f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3333558146428443e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(9.6181291076284772e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.5504108664821580e-2f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(2.4022650695910072e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(6.9314718055994531e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

// Turns the scores of a block's `positions`, a multiple of sixteen, into weights; where RAGGED, some lie beyond what some queries see.
// If `ahead` is not null, it is asked for meanwhile.
template <bool RAGGED, int DIM>
STRETTO_INLINE_512 inline void weigh(Scores &scores, int positions, __m512i seen, float scale, float *most, float *total, const Ahead<DIM> *ahead) {
    const auto sees = [&](int i) STRETTO_INLINE_512 { return RAGGED ? _mm512_cmpgt_epi32_mask(seen, _mm512_set1_epi32(i)) : __mmask16(0xFFFF); };
    const Lanes before = _mm512_load_ps(most);
    Lanes tops[4] = {before, before, before, before};
    for (int i = 0; i < positions; i += 4) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) tops[k] = _mm512_mask_max_ps(tops[k], sees(i + k), tops[k], _mm512_load_ps(scores.of[i + k]));
    }
    const Lanes top = _mm512_max_ps(_mm512_max_ps(tops[0], tops[1]), _mm512_max_ps(tops[2], tops[3]));
    const Lanes factor = _mm512_set1_ps(scale), less = _mm512_mul_ps(top, factor);
    Lanes sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(int(0xFFFF0000u));
    for (int i = 0; i < positions; i += 4) {
        if (ahead) ahead->fetch_some(i, 4);
        Lanes p[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            p[k] = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(scores.of[i + k]), factor, less));
            if (RAGGED) p[k] = _mm512_maskz_mov_ps(sees(i + k), p[k]);
            sums[k] = _mm512_add_ps(sums[k], p[k]);
        }
#pragma GCC unroll 2
        for (int k = 0; k < 4; k += 2) {
            const __m512i even = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(p[k]), half), 16);
            const __m512i odd = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(p[k + 1]), half), upper);
            _mm512_store_si512(scores.pairs[(i + k) / 2], _mm512_or_si512(even, odd));
        }
    }
    const Lanes shrink = power_of_two(_mm512_mul_ps(_mm512_sub_ps(before, top), factor));
    const Lanes sum = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
    _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_load_ps(total), shrink, sum));
    _mm512_store_ps(most, top);
    _mm512_store_ps(scores.shrink, shrink);
}

// Weights of thirty-two positions a row, for each query.
STRETTO_INLINE_512 inline void turn_weights(Scores &scores, int halves) {
    for (int half = 0; half < halves; half++) {
        S::Vector v[kTile];
#pragma GCC unroll 16
        for (int k = 0; k < kTile; k++) std::memcpy(&v[k], scores.pairs[half * kTile + k], sizeof v[k]);
        S::turn(v);
#pragma GCC unroll 16
        for (int k = 0; k < kTile; k++) std::memcpy(scores.weights[half][k], &v[k], sizeof v[k]);
    }
}

// Values of positions two by two. Within 32 elements, those of even quarters of each 128 bits come before those of odd ones.
template <int DIM>
STRETTO_INLINE_512 inline void pair_values(Block<DIM> &block, const uint16_t *const *keys, int64_t to_values, int count, int halves) {
    for (int pair = 0; pair < halves * kTile; pair++) {
        for (int part = 0; part < DIM / 32; part++) {
            const auto value = [&](int i) STRETTO_INLINE_512 {
                return i < count ? _mm512_loadu_si512(keys[i] + to_values + 32 * part) : _mm512_setzero_si512();
            };
            const __m512i even = value(2 * pair), odd = value(2 * pair + 1);
            _mm512_store_si512(block.values[2 * part][pair], _mm512_unpacklo_epi16(even, odd));
            _mm512_store_si512(block.values[2 * part + 1][pair], _mm512_unpackhi_epi16(even, odd));
        }
    }
}

// Adds a block's values by these weights.
template <int DIM>
STRETTO_INLINE_512 inline void mix_values(QueryTile<DIM> &tile, const Block<DIM> &block, Scores &scores, int halves) {
    constexpr int kTiles = DIM / kTile, kAtOnce = kTiles < 4 ? kTiles : kTiles % 4 ? 2 : 4;
    for (int first = 0; first < kTiles; first += kAtOnce) {
        clear_tile<0>();
        clear_tile<1>();
        if constexpr (kAtOnce == 4) clear_tile<2>(), clear_tile<3>();
        for (int half = 0; half < halves; half++) {
            load_tile<4>(scores.weights[half], 64);
            load_tile<6>(block.values[first][half * kTile], 64);
            multiply_bf16<0, 4, 6>();
            load_tile<7>(block.values[first + 1][half * kTile], 64);
            multiply_bf16<1, 4, 7>();
            if constexpr (kAtOnce == 4) {
                load_tile<6>(block.values[first + 2][half * kTile], 64);
                multiply_bf16<2, 4, 6>();
                load_tile<7>(block.values[first + 3][half * kTile], 64);
                multiply_bf16<3, 4, 7>();
            }
        }
        store_tile<0>(scores.sums[0]);
        store_tile<1>(scores.sums[1]);
        if constexpr (kAtOnce == 4) store_tile<2>(scores.sums[2]), store_tile<3>(scores.sums[3]);
        for (int n = 0; n < tile.count; n++) {
            const Lanes shrink = _mm512_set1_ps(scores.shrink[n]);
#pragma GCC unroll 4
            for (int j = 0; j < kAtOnce; j++) {
                float *mixed = tile.mixed[n] + (first + j) * kTile;
                _mm512_store_ps(mixed, _mm512_fmadd_ps(_mm512_load_ps(mixed), shrink, _mm512_load_ps(scores.sums[j][n])));
            }
        }
    }
}

template <int DIM>
STRETTO_INLINE_512 inline void give(const Call &call, int64_t row, int64_t head, int64_t first, const QueryTile<DIM> &tile) {
    const S::Integers low{0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23};
    const S::Integers high{8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31};
    for (int n = 0; n < tile.count; n++) {
        uint16_t *out = result_of<uint16_t>(call, row + (first + n) / call.group) + (head * call.group + (first + n) % call.group) * DIM;
        const float share = 1.0f / tile.total[n];
        for (int d = 0; d < DIM; d += 32) {
            const S::Vector even = S::load(tile.mixed[n] + d) * share, odd = S::load(tile.mixed[n] + d + 16) * share;
            S::store(out + d, __builtin_shuffle(even, odd, low));
            S::store(out + d + 16, __builtin_shuffle(even, odd, high));
        }
    }
}

// Up to kMostTiles tiles of queries, from number `first` of the rows on.
template <int DIM>
STRETTO_TARGET_AVX512 __attribute__((noinline)) void attend_tiles(const Call &call, int64_t row, int64_t rows, int64_t head, int64_t first) {
    QueryTile<DIM> tiles[kMostTiles];
    Block<DIM> block;
    Scores scores;
    Ahead<DIM> ahead;
    const int64_t queries = std::min<int64_t>(rows * call.group - first, kMostTiles * kTile);
    const int count_tiles = static_cast<int>((queries + kTile - 1) / kTile);
    for (int t = 0; t < count_tiles; t++) load_queries<DIM>(call, row, rows, head, first + t * kTile, tiles[t]);
    const int64_t last = row + rows - 1, longest = call.length[last], to_values = call.kv_heads * call.page_tokens * DIM;
    const float scale = 1.44269504088896341f / std::sqrt(static_cast<float>(DIM));
    for (int64_t at = 0; at < longest; at += kBlock) {
        const int count = static_cast<int>(std::min<int64_t>(longest - at, kBlock));
        const int position_tiles = (count + kTile - 1) / kTile, positions = position_tiles * kTile, halves = (count + 31) / 32;
        const uint16_t *keys[kBlock];
        find_keys<uint16_t, DIM>(call, last, head, at, count, keys);
        const uint16_t *side_by_side = keys[0];
        if (count < positions || at % call.page_tokens + count > call.page_tokens) {
            for (int i = 0; i < count; i++) std::memcpy(block.keys[i], keys[i], sizeof block.keys[i]);
            for (int i = count; i < positions; i++) std::memset(block.keys[i], 0, sizeof block.keys[i]);
            side_by_side = block.keys[0];
        }
        ahead.find(call, last, head, at + count);
        for (int t = 0; t < count_tiles; t++) {
            QueryTile<DIM> &tile = tiles[t];
            score<DIM>(tile, side_by_side, position_tiles, scores);
            if (positions % 32) std::memset(scores.pairs[positions / 2], 0, sizeof scores.pairs[0] * kTile / 2);
            const Ahead<DIM> *asked = t ? nullptr : &ahead;
            if (at + positions > tile.shortest) {
                const __m512i seen = _mm512_sub_epi32(_mm512_load_si512(tile.length), _mm512_set1_epi32(static_cast<int>(at)));
                weigh<true>(scores, positions, seen, scale, tile.most, tile.total, asked);
            } else {
                weigh<false>(scores, positions, _mm512_setzero_si512(), scale, tile.most, tile.total, asked);
            }
            turn_weights(scores, halves);
            if (!t) pair_values<DIM>(block, keys, to_values, count, halves);
            mix_values<DIM>(tile, block, scores, halves);
        }
    }
    for (int t = 0; t < count_tiles; t++) give<DIM>(call, row, head, first + t * kTile, tiles[t]);
}

template <int DIM>
void attend_dim(const Call &call, int64_t row, int64_t rows, int64_t head) {
    static const TileShapes kFull;
    kFull.use();
    for (int64_t first = 0; first < rows * call.group; first += kMostTiles * kTile) attend_tiles<DIM>(call, row, rows, head, first);
    TileShapes::release();
}

void attend_amx(const Call &call, int64_t row, int64_t rows, int64_t head) {
    if (!attention_by_tiles(call.dim, call.is_bf16, call.open)) return kAttendAvx512(call, row, rows, head);
    switch (call.dim) {
        case 32: return attend_dim<32>(call, row, rows, head);
        case 64: return attend_dim<64>(call, row, rows, head);
        case 96: return attend_dim<96>(call, row, rows, head);
        default: return attend_dim<128>(call, row, rows, head);
    }
}

}  // namespace

const AttendHead stretto::kAttendAmx = attend_amx;
#endif
