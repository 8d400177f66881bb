// The native half of stretto.kernels: one bind function a file.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_attention(nb::module_ &m);
void bind_elementwise(nb::module_ &m);
void bind_packing(nb::module_ &m);
void bind_decoder(nb::module_ &m);

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // what a process holds when it ends is nothing to tell its user of
    m.doc() = "CPU kernels; the Python faces and plain references are in stretto.kernels.";
    bind_attention(m);
    bind_elementwise(m);
    bind_packing(m);
    bind_decoder(m);
}
