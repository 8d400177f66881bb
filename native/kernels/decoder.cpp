// One pass of a Llama-family decoder over packed weights, from embedded rows to logits, in one call.
//
// All threads of torch's OpenMP team walk through the layers, stretch by stretch; each has its own share of the panels of every
// product, so a layer's weights are read once, from memory to the same core. A row's numbers depend on that row
// alone: not on which rows share the pass, nor on the number of threads.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "attention.hpp"
#include "levels.hpp"
#include "packed.hpp"
#include "simd.hpp"
#include "team.hpp"

namespace nb = nanobind;
using namespace stretto;

namespace {

constexpr int64_t kRowBlock = 64;  // rows of a product at once: their activations stay in a core's own cache
constexpr int kSpins = 2'000;      // turns of waiting before the processor is offered to others
constexpr int kMostThreads = 64;
constexpr int kStretches = 10;     // of a layer
constexpr int kMixing = 3;         // the one of attention
constexpr int64_t kChunk = 4;      // panels of a product that a thread takes at once

// Everything between the products, one row at a time.
struct RowKernels {
    void (*norm)(const float *x, const float *weight, float *out, int64_t width, float epsilon);
    void (*rotate)(float *head, const float *turns, int64_t dim);
    void (*gate)(const float *gate, const float *up, float *out, int64_t width);
};

template <int LANES>
STRETTO_INLINE void norm_row(const float *x, const float *weight, float *out, int64_t width, float epsilon) {
    // Sixteen sums at every level, so that the levels agree.
    float sums[16] = {};
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) {
        for (int lane = 0; lane < 16; lane++) sums[lane] += x[i + lane] * x[i + lane];
    }
    for (; i < width; i++) sums[i & 15] += x[i] * x[i];
    for (int half = 8; half > 0; half /= 2) {
        for (int lane = 0; lane < half; lane++) sums[lane] += sums[lane + half];
    }
    const float scale = 1.0f / std::sqrt(sums[0] / static_cast<float>(width) + epsilon);
    for (i = 0; i < width; i++) out[i] = x[i] * scale * weight[i];
}

STRETTO_INLINE void rotate_head(float *head, const float *turns, int64_t dim) {
    for (int64_t i = 0; i < dim; i += 2) {
        const float x = head[i], y = head[i + 1];
        head[i] = x * turns[i] - y * turns[i + 1];
        head[i + 1] = y * turns[i] + x * turns[i + 1];
    }
}

template <int LANES>
STRETTO_INLINE void gate_row(const float *gate, const float *up, float *out, int64_t width) {
    using S = Simd<LANES>;
    const auto one = typename S::Vector{} + 1.0f;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        const auto g = S::load(gate + i);
        const auto e = S::exponential(g < 0.0f ? g : -g);
        S::store(out + i, g * (g < 0.0f ? e : one) / (e + 1.0f) * S::load(up + i));
    }
    for (; i < width; i++) out[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

#define STRETTO_ROW_KERNELS(NAME, TARGET, LANES)                                                             \
    TARGET void norm_##NAME(const float *x, const float *w, float *o, int64_t n, float e) {                  \
        norm_row<LANES>(x, w, o, n, e);                                                                      \
    }                                                                                                        \
    TARGET void rotate_##NAME(float *h, const float *t, int64_t d) { rotate_head(h, t, d); }                 \
    TARGET void gate_##NAME(const float *g, const float *u, float *o, int64_t n) { gate_row<LANES>(g, u, o, n); } \
    const RowKernels k_##NAME{norm_##NAME, rotate_##NAME, gate_##NAME};

#if defined(__x86_64__)
STRETTO_ROW_KERNELS(avx512, STRETTO_TARGET_AVX512, 16)
STRETTO_ROW_KERNELS(avx2, STRETTO_TARGET_AVX2, 8)
#endif
STRETTO_ROW_KERNELS(plain, , 4)

const RowKernels &row_kernels(const std::string &level) {
#if defined(__x86_64__)
    if (level == "avx512bf16" || level == "avx512") return k_avx512;
    if (level == "avx2") return k_avx2;
#endif
    return k_plain;
}

double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// One stretch of work that threads share, after which the next may begin. Each thread has items of its own, so that the same
// weights come to the same core in every pass, and helps the others when it is done. The stretch is over when its items are, not when
// every thread has come: one that another process has put off its core finds them done and hurries after the others.
class Stretch {
  public:
    template <typename Work>
    void work(int thread, int threads, int64_t items, const Work &work) {
        int64_t done = 0;
        for (int k = 0; k < threads; k++) {
            const int owner = thread + k < threads ? thread + k : thread + k - threads;
            const int64_t first = items * owner / threads, count = items * (owner + 1) / threads - first;
            for (int64_t i; (i = next_[owner].fetch_add(1, std::memory_order_relaxed)) < count; done++) work(first + i);
        }
        if (done && done_.fetch_add(done, std::memory_order_acq_rel) + done == items) finished = seconds_now();
        for (int spins = 0; done_.load(std::memory_order_acquire) < items; spins++) {
            if (spins < kSpins) {
#if defined(__x86_64__)
                __builtin_ia32_pause();
#endif
            } else {
                sched_yield();
            }
        }
    }

    void clear(int threads) {
        for (int t = 0; t < threads; t++) next_[t].store(0, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
    }

    double finished = 0.0;  // when its last item was done

  private:
    std::atomic<int64_t> next_[kMostThreads];
    alignas(64) std::atomic<int64_t> done_;
};

struct Free {
    void operator()(void *p) const { std::free(p); }
};

template <typename T>
struct Buffer {
    std::unique_ptr<T[], Free> held;
    int64_t size = 0;

    T *get(int64_t count) {
        if (count > size) {
            const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
            held.reset(static_cast<T *>(std::aligned_alloc(64, bytes)));
            if (!held) throw std::bad_alloc();
            size = count;
        }
        return held.get();
    }
};

struct Layer {
    Packed qkv, out, gate_up, down;
    const float *norm_attention, *norm_mlp;
    const float *bias;     // [Q + 2 K heads * D] or null
    const float *qk_norm;  // [2, D] weights of the query's and the key's head norm, or null
};

struct Shape {
    int64_t hidden, heads, kv_heads, dim, ffn, vocab;
    float epsilon;
};

class Decoder {
  public:
    Decoder(int64_t hidden, int64_t heads, int64_t kv_heads, int64_t dim, int64_t ffn, int64_t vocab, float epsilon)
        : shape_{hidden, heads, kv_heads, dim, ffn, vocab, epsilon} {}

    void add_layer(const Packed &qkv, const Packed &out, const Packed &gate_up, const Packed &down,
                   uintptr_t norm_attention, uintptr_t norm_mlp, uintptr_t bias, uintptr_t qk_norm) {
        layers_.push_back({qkv, out, gate_up, down, floats(norm_attention), floats(norm_mlp), floats(bias), floats(qk_norm)});
    }

    void set_head(const Packed &head, uintptr_t norm) {
        head_ = head;
        norm_final_ = floats(norm);
    }

    // x [rows, hidden] is overwritten; see models/fused.py for the others.
    // Seconds of the products and what lies between them, of attention, and of the head.
    std::tuple<double, double, double> forward(const std::string &level, const std::string &path, int threads, uintptr_t x, int64_t rows, uintptr_t turns,
                 uintptr_t lengths, uintptr_t tables, int64_t table_width, const std::vector<uintptr_t> &caches,
                 int64_t page_tokens, bool cache_is_bf16, uintptr_t wanted, int64_t num_wanted, uintptr_t logits) {
        if (static_cast<int64_t>(caches.size()) != static_cast<int64_t>(layers_.size())) {
            throw std::invalid_argument("there must be one cache a layer");
        }
        Run run{*this, level, path_of(path), rows};
        run.x = reinterpret_cast<float *>(x);
        run.turns = reinterpret_cast<const float *>(turns);
        run.lengths = reinterpret_cast<const int64_t *>(lengths);
        run.tables = reinterpret_cast<const int64_t *>(tables);
        run.table_width = table_width;
        run.caches = &caches;
        run.page_tokens = page_tokens;
        run.cache_is_bf16 = cache_is_bf16;
        run.wanted = reinterpret_cast<const int64_t *>(wanted);
        run.num_wanted = num_wanted;
        run.logits = reinterpret_cast<float *>(logits);
        nb::gil_scoped_release release;
        run.allocate(std::clamp(threads, 1, kMostThreads));
        threads = std::clamp(threads, 1, kMostThreads);
        const double began = seconds_now();
        together(threads, [&](int thread, int count) { run.walk(thread, count); });
        return run.seconds(began);
    }

  private:
    static const float *floats(uintptr_t p) { return reinterpret_cast<const float *>(p); }

    static Path path_of(const std::string &path) {
        if (path == "exact") return Path::exact;
        if (path == "bf16") return Path::bf16;
        if (path == "fast") return Path::fast;
        throw std::invalid_argument("path " + path + " is not known; it is exact, bf16 or fast");
    }

    struct Run {
        Decoder &decoder;
        const std::string &level;
        const Path path;
        const int64_t rows;
        float *x = nullptr;
        const float *turns = nullptr;
        const int64_t *lengths = nullptr, *tables = nullptr;
        int64_t table_width = 0;
        const std::vector<uintptr_t> *caches = nullptr;
        int64_t page_tokens = 0;
        bool cache_is_bf16 = false;
        const int64_t *wanted = nullptr;
        int64_t num_wanted = 0;
        float *logits = nullptr;

        const Kernels *products = nullptr;
        const RowKernels *row = nullptr;
        AttendHead attend = nullptr;
        float *heads = nullptr, *mixed = nullptr, *both = nullptr, *active = nullptr;
        uint16_t *query16 = nullptr, *mixed16 = nullptr;
        uint8_t *ready = nullptr;
        Stretch *stretches = nullptr;
        Run(Decoder &d, const std::string &l, Path p, int64_t r) : decoder(d), level(l), path(p), rows(r) {}

        const Shape &shape() const { return decoder.shape_; }
        int64_t all_heads() const { return shape().heads + 2 * shape().kv_heads; }
        int64_t q_width() const { return shape().heads * shape().dim; }

        void allocate(int threads) {
            const Shape &s = shape();
            const int64_t count = static_cast<int64_t>(decoder.layers_.size()) * kStretches + 2;
            stretches = decoder.stretches_.get(count);
            for (int64_t i = 0; i < count; i++) stretches[i].clear(threads);
            products = &packed_kernels(level);
            row = &row_kernels(level);
            attend = attention_kernel(level);
            heads = decoder.heads_.get(rows * all_heads() * s.dim);
            mixed = decoder.mixed_.get(rows * q_width());
            both = decoder.both_.get(rows * 2 * s.ffn);
            active = decoder.active_.get(rows * s.ffn);
            if (cache_is_bf16) {
                query16 = decoder.query16_.get(rows * q_width());
                mixed16 = decoder.mixed16_.get(rows * q_width());
            }
            int64_t most = row_bytes(decoder.head_);
            for (const Layer &layer : decoder.layers_) {
                for (const Packed *w : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down}) most = std::max(most, row_bytes(*w));
            }
            ready = decoder.ready_.get(rows * most);
        }

        int64_t row_bytes(const Packed &w) const { return Rows(path, 1, w, nullptr).row_bytes(); }

        Rows ready_for(const Packed &w, int64_t count) const { return Rows(path, count, w, ready); }

        void walk(int thread, int threads) {
            const Shape &s = shape();
            std::vector<float> room(static_cast<size_t>(std::max(s.hidden, q_width())));
            float *normed = room.data();
            Stretch *stretch = stretches;
            const auto next = [&](int64_t items, const auto &work) { (stretch++)->work(thread, threads, items, work); };
            for (size_t i = 0; i < decoder.layers_.size(); i++) {
                const Layer &layer = decoder.layers_[i];
                next(rows, [&](int64_t r) { norm_into(layer.qkv, rows, layer.norm_attention, normed, r, r); });
                next(chunks(layer.qkv), [&](int64_t c) {
                    multiply(layer.qkv, rows, c, heads, all_heads() * s.dim, false);
                    if (layer.bias) add_bias(layer, c);
                });
                next(rows, [&](int64_t r) { place(layer, i, r); });
                next(rows * s.kv_heads, [&](int64_t item) { mix(i, item); });
                next(rows, [&](int64_t r) { prepare_mixed(layer.out, normed, r); });
                next(chunks(layer.out), [&](int64_t c) { multiply(layer.out, rows, c, x, s.hidden, true); });
                next(rows, [&](int64_t r) { norm_into(layer.gate_up, rows, layer.norm_mlp, normed, r, r); });
                next(chunks(layer.gate_up) / 2 + 1, [&](int64_t c) { gate(layer, c); });
                next(rows, [&](int64_t r) { products->prepare(ready_for(layer.down, rows), r, active + r * s.ffn, s.ffn); });
                next(chunks(layer.down), [&](int64_t c) { multiply(layer.down, rows, c, x, s.hidden, true); });
            }
            next(num_wanted, [&](int64_t r) { norm_into(decoder.head_, num_wanted, decoder.norm_final_, normed, wanted[r], r); });
            next(num_wanted ? chunks(decoder.head_) : 0,
                 [&](int64_t c) { multiply(decoder.head_, num_wanted, c, logits, s.vocab, false); });
        }

        // Of the products and what lies between them, of attention, and of the head.
        std::tuple<double, double, double> seconds(double began) const {
            const int64_t layers = static_cast<int64_t>(decoder.layers_.size());
            double attention = 0.0;
            for (int64_t i = 0; i < layers; i++) {
                attention += stretches[i * kStretches + kMixing].finished - stretches[i * kStretches + kMixing - 1].finished;
            }
            const double layers_done = stretches[layers * kStretches - 1].finished;
            const double head = num_wanted ? stretches[layers * kStretches + 1].finished - layers_done : 0.0;
            return {layers_done - began - attention, attention, head};
        }

        static int64_t chunks(const Packed &w) { return (w.panels() + kChunk - 1) / kChunk; }

        // Row `from` of x, normed, as row `to` of what the product takes.
        void norm_into(const Packed &w, int64_t count, const float *weight, float *normed, int64_t from, int64_t to) {
            const int64_t hidden = shape().hidden;
            row->norm(x + from * hidden, weight, normed, hidden, shape().epsilon);
            products->prepare(ready_for(w, count), to, normed, hidden);
        }

        void multiply(const Packed &w, int64_t count, int64_t chunk, float *out, int64_t stride, bool add) {
            multiply_panels(w, count, chunk * kChunk, std::min((chunk + 1) * kChunk, w.panels()), out, stride, add);
        }

        void multiply_panels(const Packed &w, int64_t count, int64_t first, int64_t last, float *out, int64_t stride, bool add) {
            Rows block = ready_for(w, count);
            for (int64_t r = 0; r < count; r += kRowBlock) {
                block.count = std::min(kRowBlock, count - r);
                block.data = ready + r * block.row_bytes();
                products->multiply(block, w, first, last, out + r * stride, stride, add);
            }
        }

        void add_bias(const Layer &layer, int64_t chunk) {
            const int64_t width = all_heads() * shape().dim;
            const int64_t first = chunk * kChunk * kPanel, last = std::min(width, first + kChunk * kPanel);
            for (int64_t r = 0; r < rows; r++) {
                for (int64_t c = first; c < last; c++) heads[r * width + c] += layer.bias[c];
            }
        }

        // Turn queries and keys by their positions; put keys and values in their places.
        void place(const Layer &layer, size_t index, int64_t r) {
            const Shape &s = shape();
            {
                float *head = heads + r * all_heads() * s.dim;
                for (int64_t h = 0; h < s.heads + s.kv_heads; h++) {
                    float *at = head + h * s.dim;
                    if (layer.qk_norm) row->norm(at, layer.qk_norm + (h < s.heads ? 0 : s.dim), at, s.dim, s.epsilon);
                    row->rotate(at, turns + r * s.dim, s.dim);
                }
                const int64_t position = lengths[r] - 1, page = tables[r * table_width + position / page_tokens];
                for (int64_t h = 0; h < 2 * s.kv_heads; h++) {
                    const int64_t to = ((page * 2 * s.kv_heads + h) * page_tokens + position % page_tokens) * s.dim;
                    const float *from = head + (s.heads + h) * s.dim;
                    if (cache_is_bf16) {
                        uint16_t *cache = reinterpret_cast<uint16_t *>((*caches)[index]) + to;
                        for (int64_t d = 0; d < s.dim; d++) store(cache + d, from[d]);
                    } else {
                        std::memcpy(reinterpret_cast<float *>((*caches)[index]) + to, from, static_cast<size_t>(s.dim) * sizeof(float));
                    }
                }
                if (cache_is_bf16) {
                    for (int64_t d = 0; d < q_width(); d++) store(query16 + r * q_width() + d, head[d]);
                }
            }
        }

        void mix(size_t index, int64_t item) {
            const Shape &s = shape();
            const AttentionCall call{cache_is_bf16 ? static_cast<const void *>(query16) : heads,
                                     cache_is_bf16 ? q_width() : all_heads() * s.dim,
                                     reinterpret_cast<const void *>((*caches)[index]),
                                     tables,
                                     table_width,
                                     lengths,
                                     cache_is_bf16 ? static_cast<void *>(mixed16) : mixed,
                                     rows,
                                     s.kv_heads,
                                     s.heads / s.kv_heads,
                                     page_tokens,
                                     s.dim,
                                     cache_is_bf16};
            attend(call, item / s.kv_heads, item % s.kv_heads);
        }

        void prepare_mixed(const Packed &w, float *wide, int64_t r) {
            const float *from = mixed + r * q_width();
            if (cache_is_bf16) {
                for (int64_t d = 0; d < q_width(); d++) {
                    const uint32_t bits = static_cast<uint32_t>(mixed16[r * q_width() + d]) << 16;
                    std::memcpy(wide + d, &bits, sizeof bits);
                }
                from = wide;
            }
            products->prepare(ready_for(w, rows), r, from, q_width());
        }

        // Gates and what they let through lie a half apart; one chunk is the same columns of both, and their product.
        void gate(const Layer &layer, int64_t chunk) {
            const int64_t ffn = shape().ffn, panels = ffn / kPanel;
            const int64_t first = std::min(chunk * kChunk, panels), last = std::min(first + kChunk, panels);
            if (first == last) return;
            multiply_panels(layer.gate_up, rows, first, last, both, 2 * ffn, false);
            multiply_panels(layer.gate_up, rows, panels + first, panels + last, both, 2 * ffn, false);
            for (int64_t r = 0; r < rows; r++) {
                const float *from = both + r * 2 * ffn + first * kPanel;
                row->gate(from, from + ffn, active + r * ffn + first * kPanel, (last - first) * kPanel);
            }
        }
    };

    Shape shape_;
    std::vector<Layer> layers_;
    Packed head_{};
    const float *norm_final_ = nullptr;
    Buffer<float> heads_, mixed_, both_, active_;
    Buffer<uint16_t> query16_, mixed16_;
    Buffer<uint8_t> ready_;
    Buffer<Stretch> stretches_;
};

// Packs q [columns, inner] (uint8; 8-bit values with 128 added), scales and minima [columns, groups] (fp16) into panels.
void pack(const Packed &w, uintptr_t q, uintptr_t scales, uintptr_t minima) {
    const uint8_t *values = reinterpret_cast<const uint8_t *>(q);
    const uint16_t *d = reinterpret_cast<const uint16_t *>(scales), *m = reinterpret_cast<const uint16_t *>(minima);
    uint8_t *data = const_cast<uint8_t *>(w.data);
    std::memset(data, 0, static_cast<size_t>(w.bytes()));
    for (int64_t column = 0; column < w.columns; column++) {
        const int64_t lane = column % kPanel;
        for (int64_t g = 0; g < w.groups(); g++) {
            uint8_t *at = data + column / kPanel * w.panel_bytes() + g * w.group_bytes();
            uint16_t *numbers = reinterpret_cast<uint16_t *>(at);
            numbers[lane] = d[column * w.groups() + g];
            if (w.minimum) numbers[kPanel + lane] = m[column * w.groups() + g];
            at += kPanel * 2 * (w.minimum ? 2 : 1);
            const uint8_t *from = values + column * w.inner + g * w.group;
            for (int k = 0; k < w.group; k++) {
                if (w.bits == 4) {
                    at[k / 8 * 64 + lane * 4 + (k & 3)] |= static_cast<uint8_t>(from[k] << (k & 4));
                } else {
                    at[k / 4 * 64 + lane * 4 + (k & 3)] = from[k];
                }
            }
        }
    }
}

// The blocks of a GGUF tensor of the same shape, as they lie in the file, into panels.
void pack_gguf(const Packed &w, uintptr_t blocks) {
    const int64_t block_bytes = w.bits == 8 ? 34 : w.minimum ? 20 : 18;
    const uint8_t *from = reinterpret_cast<const uint8_t *>(blocks);
    uint8_t *data = const_cast<uint8_t *>(w.data);
    std::memset(data, 0, static_cast<size_t>(w.bytes()));
    for (int64_t column = 0; column < w.columns; column++) {
        const int64_t lane = column % kPanel;
        for (int64_t g = 0; g < w.groups(); g++, from += block_bytes) {
            uint8_t *at = data + column / kPanel * w.panel_bytes() + g * w.group_bytes();
            std::memcpy(at + lane * 2, from, 2);
            if (w.minimum) std::memcpy(at + kPanel * 2 + lane * 2, from + 2, 2);
            at += kPanel * 2 * (w.minimum ? 2 : 1);
            const uint8_t *q = from + (w.minimum ? 4 : 2);
            for (int k = 0; k < 32; k++) {
                if (w.bits == 4) {
                    const int value = k < 16 ? q[k] & 15 : q[k - 16] >> 4;
                    at[k / 8 * 64 + lane * 4 + (k & 3)] |= static_cast<uint8_t>(value << (k & 4));
                } else {
                    at[k / 4 * 64 + lane * 4 + (k & 3)] = static_cast<uint8_t>(q[k] + 128);
                }
            }
        }
    }
}

// x [rows, length] times w: out [rows, columns]; for tests and for products outside the decoder.
void packed_multiply(const std::string &level, const std::string &path, int threads, const Packed &w, uintptr_t x, int64_t rows,
                     int64_t length, uintptr_t out) {
    const Path how = path == "exact" ? Path::exact : path == "bf16" ? Path::bf16 : Path::fast;
    const Kernels &kernels = packed_kernels(level);
    nb::gil_scoped_release release;
    Rows ready(how, rows, w, nullptr);
    Buffer<uint8_t> buffer;
    ready.data = buffer.get(std::max<int64_t>(1, rows * ready.row_bytes()));
    const float *from = reinterpret_cast<const float *>(x);
    share(threads, rows, [&](int64_t r) { kernels.prepare(ready, r, from + r * length, length); });
    share(threads, threads, [&](int64_t part) {
        const int64_t first = w.panels() * part / threads, last = w.panels() * (part + 1) / threads;
        Rows block = ready;
        for (int64_t r = 0; r < rows; r += kRowBlock) {
            block.count = std::min(kRowBlock, rows - r);
            block.data = ready.row(r);
            float *to = reinterpret_cast<float *>(out) + r * w.columns;
            kernels.multiply(block, w, first, last, to, w.columns, false);
        }
    });
}

}  // namespace

void bind_decoder(nb::module_ &m) {
    nb::class_<Packed>(m, "Packed")
        .def("__init__",
             [](Packed *p, uintptr_t data, int64_t columns, int64_t inner, int group, int bits, bool minimum) {
                 new (p) Packed{reinterpret_cast<const uint8_t *>(data), columns, inner, group, bits, minimum};
             })
        .def_prop_ro("bytes", &Packed::bytes);
    m.def("pack", &pack);
    m.def("pack_gguf", &pack_gguf);
    m.def("packed_multiply", &packed_multiply);
    nb::class_<Decoder>(m, "Decoder")
        .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float>())
        .def("add_layer", &Decoder::add_layer)
        .def("set_head", &Decoder::set_head)
        .def("forward", &Decoder::forward);
}
