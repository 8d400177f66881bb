// The native half of stretto.hardware: loops that measure this machine.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_loops(nb::module_ &m);

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // what a process holds when it ends is nothing to tell its user of
    m.doc() = "Measuring loops; the Python face is stretto.hardware.probe.";
    bind_loops(m);
}
