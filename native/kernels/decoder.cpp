// One pass of a Llama-family decoder over packed weights, from tokens to logits, in one call.
//
// The threads of a crew walk through the layers, stretch by stretch; each has its own share of the panels of every product, so a
// layer's weights are read once, from memory to the same core. A row's numbers depend on that row
// alone: not on which rows share the pass, nor on the number of threads.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "attention.hpp"
#include "buffer.hpp"
#include "crew.hpp"
#include "elementwise.hpp"
#include "kv_pages.hpp"
#include "packed.hpp"
#include "simd.hpp"
#include "stretch.hpp"

namespace nb = nanobind;
using namespace stretto;

namespace {

constexpr int kStretches = 11;     // of a layer
constexpr int kPlacing = 2;        // the one after which attention begins, with the packing of pages
constexpr int kMixing = 4;         // the one with which it ends
constexpr int64_t kChunk = 4;      // panels of a product that a thread takes at once
constexpr int64_t kWide = kChunk * kPanel;

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
    // Decoders of different crews may each have a pass under way, even over the same weights and pages.
    Decoder(int64_t hidden, int64_t heads, int64_t kv_heads, int64_t dim, int64_t ffn, int64_t vocab, float epsilon, int crew)
        : shape_{hidden, heads, kv_heads, dim, ffn, vocab, epsilon}, crew_(crew) {
        if (crew < 0 || crew >= Crew::kCrews) throw std::invalid_argument("there is no crew of this number");
    }

    void add_layer(const Packed &qkv, const Packed &out, const Packed &gate_up, const Packed &down,
                   uintptr_t norm_attention, uintptr_t norm_mlp, uintptr_t bias, uintptr_t qk_norm) {
        layers_.push_back({qkv, out, gate_up, down, floats(norm_attention), floats(norm_mlp), floats(bias), floats(qk_norm)});
    }

    // Embedded rows are columns of `table`, or where there is none rows of `rows` [vocab, hidden].
    void set_embedding(const std::optional<Packed> &table, uintptr_t rows) {
        table_ = table;
        rows_ = floats(rows);
    }

    void set_head(const Packed &head, uintptr_t norm) {
        head_ = head;
        norm_final_ = floats(norm);
    }

    // See models/fused.py. Seconds of the products and what lies between them, of attention, and of the head.
    std::tuple<double, double, double> forward(const std::string &level, const std::string &path, int threads, uintptr_t tokens,
                                               int64_t rows, uintptr_t turns, uintptr_t lengths, uintptr_t tables,
                                               int64_t table_width, const std::vector<uintptr_t> &caches, int64_t page_tokens,
                                               bool cache_is_bf16, const std::vector<uintptr_t> &open,
                                               uintptr_t open_tables, uintptr_t wanted, int64_t num_wanted, uintptr_t logits,
                                               uintptr_t picks) {
        if (caches.size() != layers_.size() || (!open.empty() && open.size() != layers_.size())) {
            throw std::invalid_argument("there must be one cache a layer");
        }
        if (!attention_has(shape_.dim, !open.empty())) throw std::invalid_argument("heads of this width have no kernel");
        const std::shared_ptr<Run> held = free_run();
        Run &run = *held;
        run.path = path_of(path);
        run.rows = rows;
        run.tokens = reinterpret_cast<const int64_t *>(tokens);
        run.turns = floats(turns);
        run.lengths = reinterpret_cast<const int64_t *>(lengths);
        run.tables = reinterpret_cast<const int64_t *>(tables);
        run.table_width = table_width;
        run.caches = &caches;
        run.page_tokens = page_tokens;
        run.cache_is_bf16 = cache_is_bf16;
        run.open = open.empty() ? nullptr : &open;
        run.open_tables = reinterpret_cast<const int64_t *>(open_tables);
        run.wanted = reinterpret_cast<const int64_t *>(wanted);
        run.num_wanted = num_wanted;
        run.logits = reinterpret_cast<float *>(logits);
        run.picks = reinterpret_cast<int64_t *>(picks);
        nb::gil_scoped_release release;
        std::lock_guard<std::mutex> one_at_a_time(turn_);  // passes share what is allocated
        threads = std::clamp(threads, 1, kMostThreads);
        run.allocate(level, threads);
        const double began = seconds_now();
        Crew::get(crew_).go(threads, held);
        return run.seconds(began);
    }

    ~Decoder() {
        for (const auto &run : runs_) {
            while (run.use_count() > 1) sched_yield();  // a helper that came late looks at the layers still
        }
    }

  private:
    std::mutex turn_;
    struct Run;

    // A run that nobody looks at any more.
    std::shared_ptr<Run> free_run() {
        for (const auto &run : runs_) {
            if (run.use_count() == 1) return run;
        }
        return runs_.emplace_back(std::make_shared<Run>(*this));
    }

    static const float *floats(uintptr_t p) { return reinterpret_cast<const float *>(p); }

    static Path path_of(const std::string &path) {
        if (path == "exact") return Path::exact;
        if (path == "bf16") return Path::bf16;
        if (path == "fast") return Path::fast;
        throw std::invalid_argument("path " + path + " is not known; it is exact, bf16 or fast");
    }

    // One pass. A helper may look at it after it is over, but at nothing of the caller's: for that it must have taken an item.
    struct Run final : Walk {
        Decoder &decoder;
        Path path = Path::exact;
        int64_t rows = 0;
        const int64_t *tokens = nullptr;
        const float *turns = nullptr;  // [positions, dim]
        const int64_t *lengths = nullptr, *tables = nullptr;
        int64_t table_width = 0;
        const std::vector<uintptr_t> *caches = nullptr;
        int64_t page_tokens = 0;
        bool cache_is_bf16 = false;
        const std::vector<uintptr_t> *open = nullptr;  // of a cache in 4 bits: its open pages, layer by layer; else null
        const int64_t *open_tables = nullptr;
        const int64_t *wanted = nullptr;
        int64_t num_wanted = 0;
        float *logits = nullptr;   // [num_wanted, vocab]; null if nobody wants them
        int64_t *picks = nullptr;  // [num_wanted], the most likely token of each; null if nobody wants them

        const Kernels *products = nullptr;
        const RowKernels *row = nullptr;
        AttendHead attend = nullptr;
        float *x = nullptr, *heads = nullptr, *mixed = nullptr, *active = nullptr;
        uint16_t *query16 = nullptr, *mixed16 = nullptr;
        uint8_t *ready = nullptr;
        std::vector<int64_t> neighbours;  // where each run of neighbours begins, and the end
        Buffer<Stretch> held;
        Stretch *stretches = nullptr;

        explicit Run(Decoder &decoder) : decoder(decoder) {}

        const Shape &shape() const { return decoder.shape_; }
        int64_t all_heads() const { return shape().heads + 2 * shape().kv_heads; }
        int64_t q_width() const { return shape().heads * shape().dim; }

        void allocate(const std::string &level, int threads) {
            const Shape &s = shape();
            const int64_t count = static_cast<int64_t>(decoder.layers_.size()) * kStretches + 3;
            stretches = held.get(count);
            for (int64_t i = 0; i < count; i++) stretches[i].clear(threads);
            products = &packed_kernels(level);
            row = &row_kernels(level);
            attend = attention_kernel(level);
            x = decoder.x_.get(rows * s.hidden);
            if (!logits) logits = decoder.logits_.get(num_wanted * s.vocab);
            heads = decoder.heads_.get(rows * all_heads() * s.dim);
            mixed = decoder.mixed_.get(rows * q_width());
            active = decoder.active_.get(rows * s.ffn);
            if (cache_is_bf16) {
                query16 = decoder.query16_.get(rows * q_width());
                mixed16 = decoder.mixed16_.get(rows * q_width());
            }
            int64_t most = ready_bytes(decoder.head_, num_wanted);
            for (const Layer &layer : decoder.layers_) {
                for (const Packed *w : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down}) most = std::max(most, ready_bytes(*w, rows));
            }
            ready = decoder.ready_.get(most);
            const bool by_tiles = level == "amx" && attention_by_tiles(s.dim, cache_is_bf16, open);
            find_neighbours(by_tiles ? kTileNeighbours : kNeighbours);
        }

        // Rows that are neighbouring positions of one text are attended to together.
        void find_neighbours(int64_t most) {
            neighbours.clear();
            for (int64_t r = 0, begun = 0; r < rows; r++) {
                const int64_t *table = tables + r * table_width;
                const bool goes_on = r > 0 && r - begun < most && lengths[r] == lengths[r - 1] + 1 &&
                                     std::equal(table, table + table_width, table - table_width);
                if (goes_on) continue;
                neighbours.push_back(r);
                begun = r;
            }
            neighbours.push_back(rows);
        }

        int64_t ready_bytes(const Packed &w, int64_t count) const { return Rows(path, count, w, products->tiles_from).bytes(); }

        Rows ready_for(const Packed &w, int64_t count) const {
            Rows made(path, count, w, products->tiles_from);
            made.data = ready;
            return made;
        }

        void walk(int thread, int threads) override {
            const Shape &s = shape();
            std::vector<float> room(static_cast<size_t>(std::max(s.hidden, q_width())));
            std::vector<float> gates(static_cast<size_t>(2 * std::min(rows, products->grid_rows) * kWide));
            float *normed = room.data();
            Stretch *stretch = stretches;
            const int64_t runs = static_cast<int64_t>(neighbours.size()) - 1;
            const auto next = [&](int64_t items, const auto &work) { (stretch++)->work(thread, threads, items, work); };
            for (size_t i = 0; i < decoder.layers_.size(); i++) {
                const Layer &layer = decoder.layers_[i];
                next(rows, [&](int64_t r) {
                    if (i == 0) embed(r);
                    norm_into(layer.qkv, rows, layer.norm_attention, normed, r, r);
                });
                next(chunks(layer.qkv), [&](int64_t c) {
                    multiply(layer.qkv, rows, c, heads, all_heads() * s.dim, false);
                    if (layer.bias) add_bias(layer, c);
                });
                next(rows, [&](int64_t r) { place(layer, i, r); });
                next(open ? rows * s.kv_heads : 0, [&](int64_t item) { close_page(i, item); });
                next(runs * s.kv_heads, [&](int64_t item) { mix(i, item); });
                next(rows, [&](int64_t r) { prepare_mixed(layer.out, normed, r); });
                next(chunks(layer.out), [&](int64_t c) { multiply(layer.out, rows, c, x, s.hidden, true); });
                next(rows, [&](int64_t r) { norm_into(layer.gate_up, rows, layer.norm_mlp, normed, r, r); });
                next(chunks(layer.gate_up) / 2 + 1, [&](int64_t c) { gate(layer, c, gates.data()); });
                next(rows, [&](int64_t r) { products->prepare(ready_for(layer.down, rows), r, active + r * s.ffn, s.ffn); });
                next(chunks(layer.down), [&](int64_t c) { multiply(layer.down, rows, c, x, s.hidden, true); });
            }
            next(num_wanted, [&](int64_t r) { norm_into(decoder.head_, num_wanted, decoder.norm_final_, normed, wanted[r], r); });
            next(num_wanted ? chunks(decoder.head_) : 0,
                 [&](int64_t c) { multiply(decoder.head_, num_wanted, c, logits, s.vocab, false); });
            if (picks) next(num_wanted, [&](int64_t r) { picks[r] = row->largest(logits + r * s.vocab, s.vocab); });
        }

        void embed(int64_t r) {
            const int64_t hidden = shape().hidden;
            if (decoder.table_) {
                unpack_column(*decoder.table_, tokens[r], x + r * hidden, hidden);
            } else {
                std::memcpy(x + r * hidden, decoder.rows_ + tokens[r] * hidden, static_cast<size_t>(hidden) * sizeof(float));
            }
        }

        // Of the products and what lies between them, of attention, and of the head.
        std::tuple<double, double, double> seconds(double began) const {
            const int64_t layers = static_cast<int64_t>(decoder.layers_.size());
            double attention = 0.0;
            for (int64_t i = 0; i < layers; i++) {
                attention += stretches[i * kStretches + kMixing].finished - stretches[i * kStretches + kPlacing].finished;
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
            const Rows made = ready_for(w, count);
            const int64_t first = chunk * kChunk, last = std::min(first + kChunk, w.panels());
            const int64_t block = products->row_block(w);
            for (int64_t r = 0; r < count; r += block) {
                products->multiply(made.from(r, std::min(block, count - r)), w, first, last, out + r * stride, stride, add);
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
            const int64_t turned = s.heads + s.kv_heads, position = lengths[r] - 1;
            float *head = heads + r * all_heads() * s.dim;
            if (layer.qk_norm) {
                for (int64_t h = 0; h < turned; h++) {
                    float *at = head + h * s.dim;
                    row->norm(at, layer.qk_norm + (h < s.heads ? 0 : s.dim), at, s.dim, s.epsilon);
                }
            }
            row->rotate(head, turns + position * s.dim, turned, s.dim);
            const int64_t page = (open ? open_tables : tables)[r * table_width + position / page_tokens];
            const uintptr_t cache_of_layer = open ? (*open)[index] : (*caches)[index];
            for (int64_t h = 0; h < 2 * s.kv_heads; h++) {
                const int64_t to = ((page * 2 * s.kv_heads + h) * page_tokens + position % page_tokens) * s.dim;
                const float *from = head + (s.heads + h) * s.dim;
                if (cache_is_bf16) {
                    uint16_t *cache = reinterpret_cast<uint16_t *>(cache_of_layer) + to;
                    for (int64_t d = 0; d < s.dim; d++) store(cache + d, from[d]);
                } else {
                    float *cache = reinterpret_cast<float *>(cache_of_layer) + to;
                    std::memcpy(cache, from, static_cast<size_t>(s.dim) * sizeof(float));
                }
            }
            if (cache_is_bf16) {
                for (int64_t d = 0; d < q_width(); d++) store(query16 + r * q_width() + d, head[d]);
            }
        }

        // Pack the page whose last position is this row's, for one KV head.
        void close_page(size_t index, int64_t item) {
            const int64_t r = item / shape().kv_heads, h = item % shape().kv_heads, dim = shape().dim;
            const int64_t place = r * table_width + (lengths[r] - 1) / kPagePositions;
            if (lengths[r] % kPagePositions) return;
            const int64_t run = kPagePositions * dim, to_values = shape().kv_heads * run;
            const int64_t from = (open_tables[place] * 2 * shape().kv_heads + h) * run;
            uint8_t *to = reinterpret_cast<uint8_t *>((*caches)[index]) + (tables[place] * shape().kv_heads + h) * packed_page_bytes(dim);
            const auto pack_both = [&](const auto *keys) {
                pack_page(keys, dim, true, to);
                pack_page(keys + to_values, dim, false, to + packed_half_bytes(dim));
            };
            if (cache_is_bf16) {
                pack_both(reinterpret_cast<const uint16_t *>((*open)[index]) + from);
            } else {
                pack_both(reinterpret_cast<const float *>((*open)[index]) + from);
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
                                     cache_is_bf16,
                                     open ? reinterpret_cast<const void *>((*open)[index]) : nullptr,
                                     open_tables};
            const int64_t first = neighbours[item / s.kv_heads], end = neighbours[item / s.kv_heads + 1];
            attend(call, first, end - first, item % s.kv_heads);
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

        // Gates and what they let through lie a half apart; one chunk is the same columns of both, and their product. What the two products
        // give stays in the thread's own `gates`, row by row side by side.
        void gate(const Layer &layer, int64_t chunk, float *gates) {
            const int64_t ffn = shape().ffn, panels = ffn / kPanel;
            const int64_t first = std::min(chunk * kChunk, panels), last = std::min(first + kChunk, panels);
            if (first == last) return;
            const Rows made = ready_for(layer.gate_up, rows);
            const int64_t block = products->row_block(layer.gate_up);
            for (int64_t r = 0; r < rows; r += block) {
                const Rows some = made.from(r, std::min(block, rows - r));
                for (int64_t half = 0; half < 2; half++) {
                    const Packed columns = layer.gate_up.from(half * panels + first);
                    products->multiply(some, columns, 0, last - first, gates + half * kWide, 2 * kWide, false);
                }
                for (int64_t i = 0; i < some.count; i++) {
                    const float *from = gates + i * 2 * kWide;
                    row->gate(from, from + kWide, active + (r + i) * ffn + first * kPanel, (last - first) * kPanel);
                }
            }
        }
    };

    Shape shape_;
    int crew_;
    std::vector<Layer> layers_;
    Packed head_{};
    const float *norm_final_ = nullptr;
    std::optional<Packed> table_;
    const float *rows_ = nullptr;
    Buffer<float> x_, logits_, heads_, mixed_, active_;
    Buffer<uint16_t> query16_, mixed16_;
    Buffer<uint8_t> ready_;
    std::vector<std::shared_ptr<Run>> runs_;
};

}  // namespace

void bind_decoder(nb::module_ &m) {
    nb::class_<Decoder>(m, "Decoder")
        .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, int>())
        .def("add_layer", &Decoder::add_layer)
        .def("set_embedding", &Decoder::set_embedding, nb::arg("table").none(), nb::arg("rows"))
        .def("set_head", &Decoder::set_head)
        .def("forward", &Decoder::forward);
}
