// Laying matrices out in panels, reading columns back, and products outside the decoder.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

#include "buffer.hpp"
#include "kv_pages.hpp"
#include "packed_grid.hpp"
#include "team.hpp"

namespace nb = nanobind;
using namespace stretto;

namespace {

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

// bf16 numbers [columns, inner] into panels.
void pack_numbers(const Packed &w, uintptr_t values) {
    const uint16_t *from = reinterpret_cast<const uint16_t *>(values);
    uint16_t *data = reinterpret_cast<uint16_t *>(const_cast<uint8_t *>(w.data));
    std::memset(data, 0, static_cast<size_t>(w.bytes()));
    for (int64_t column = 0; column < w.columns; column++, from += w.inner) {
        uint16_t *at = data + column / kPanel * (w.panel_bytes() / 2) + column % kPanel * 2;
        for (int64_t k = 0; k < w.inner; k += 4) {
            for (int i = 0; i < 4; i++) at[(k + (i & 1) * 2) * kPanel + (i >> 1)] = from[k + i];
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
    Rows ready(how, rows, w, kernels.tiles_from);
    Buffer<uint8_t> buffer;
    ready.data = buffer.get(ready.bytes());
    const float *from = reinterpret_cast<const float *>(x);
    share(threads, rows, [&](int64_t r) { kernels.prepare(ready, r, from + r * length, length); });
    share(threads, threads, [&](int64_t part) {
        const int64_t block = kernels.row_block(w);
        const int64_t first = w.panels() * part / threads, last = w.panels() * (part + 1) / threads;
        for (int64_t r = 0; r < rows; r += block) {
            float *to = reinterpret_cast<float *>(out) + r * w.columns;
            kernels.multiply(ready.from(r, std::min(block, rows - r)), w, first, last, to, w.columns, false);
        }
    });
}

}  // namespace

void bind_packing(nb::module_ &m) {
    nb::class_<Packed>(m, "Packed")
        .def("__init__",
             [](Packed *p, uintptr_t data, int64_t columns, int64_t inner, int group, int bits, bool minimum, uintptr_t order,
                uintptr_t steps, uintptr_t units) {
                 new (p) Packed{reinterpret_cast<const uint8_t *>(data),
                                columns,
                                inner,
                                group,
                                bits,
                                minimum,
                                reinterpret_cast<const int32_t *>(order),
                                reinterpret_cast<const uint8_t *>(steps),
                                reinterpret_cast<const float *>(units)};
             })
        .def_prop_ro("bytes", &Packed::bytes);
    m.def("pack", &pack);
    m.def("put_on_grid", [](const Packed &w, uintptr_t units) { put_on_grid(w, reinterpret_cast<float *>(units)); });
    m.def("pack_numbers", &pack_numbers);
    m.def("pack_gguf", &pack_gguf);
    m.def("pack_page", [](uintptr_t from, int64_t dim, bool keys, uintptr_t to) {
        pack_page(reinterpret_cast<const float *>(from), dim, keys, reinterpret_cast<uint8_t *>(to));
    });
    m.def("packed_multiply", &packed_multiply);
}
