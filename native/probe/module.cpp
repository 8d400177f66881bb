// The native half of stretto.hardware: loops that measure this machine.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_loops(nb::module_ &m);

NB_MODULE(_native, m) {
    m.doc() = "Measuring loops; the Python face is stretto.hardware.probe.";
    bind_loops(m);
}
