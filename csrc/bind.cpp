// Python bindings of the CPU kernels. The kernels themselves know nothing of Python.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) { m.doc() = "CPU kernels of lada-rt"; }
