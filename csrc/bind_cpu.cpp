// Module _cpu: m.def lines only. Pointers arrive as integers; the GIL is released around every kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/simd.hpp"
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

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of moeyard on raw addresses; use moeyard.ops instead.";
  m.def("simd_level", [] { return moeyard::simd_name(moeyard::simd_level()); });
  m.def("simd_best", [] { return moeyard::simd_name(moeyard::simd_best()); });

  m.def(
      "identity",
      [](Address in, Address out, int64_t bytes, int threads) {
        moeyard::cpu::identity(at(in), at(out), bytes, threads);
      },
      "input"_a, "out"_a, "bytes"_a, "threads"_a, NoGil());
}
