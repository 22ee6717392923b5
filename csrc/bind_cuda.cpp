// Module _cuda: m.def lines only. Pointers and streams arrive as integers; the GIL is released around every launch.
// The module's absence from the wheel is what "built without CUDA" means (see python/moeyard/_native.py).
#include <pybind11/pybind11.h>

#include "common/device_errors.hpp"
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
  m.attr("runtime_version") = MOEYARD_CUDART_VERSION;
  m.def(
      "device_errors", [](int device) { return reinterpret_cast<Address>(moeyard::cuda::device_errors(device)); },
      "device"_a, NoGil());
  m.def("take_device_errors", &moeyard::cuda::take_device_errors, "device"_a, NoGil());
  m.def(
      "identity",
      [](Address in, Address out, int64_t bytes, int device, Address stream) {
        moeyard::cuda::identity(at(in), at(out), bytes, device, at(stream));
      },
      "input"_a, "out"_a, "bytes"_a, "device"_a, "stream"_a, NoGil());
}
