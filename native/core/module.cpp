// The native half of stretto.core: one extension module, one bind function a file.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_simulate(nb::module_ &m);
void bind_fluid(nb::module_ &m);

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // what a process holds when it ends is nothing to tell its user of
    m.doc() = "Hot paths of stretto.core; the Python faces are simulate.py and fluid.py.";
    bind_simulate(m);
    bind_fluid(m);
}
