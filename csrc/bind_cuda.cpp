// Module _cuda: m.def lines only. Pointers and streams arrive as integers; the GIL is released around every launch.
// The module's absence from the wheel is what "built without CUDA" means (see python/moeyard/_native.py).
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include "identity/identity.hpp"

namespace py = pybind11;
using namespace pybind11::literals;
using Address = std::uintptr_t;
using NoGil = py::call_guard<py::gil_scoped_release>;

namespace {
template <class T = void>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}
}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of moeyard on raw addresses; use moeyard.ops instead.";
  m.attr("runtime_version") = CUDART_VERSION;
  m.def(
      "identity",
      [](Address in, Address out, int64_t bytes, int device, Address stream) {
        moeyard::cuda::identity(at(in), at(out), bytes, device, at(stream));
      },
      "input"_a, "out"_a, "bytes"_a, "device"_a, "stream"_a, NoGil());
}
