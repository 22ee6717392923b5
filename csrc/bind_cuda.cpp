// Module _cuda: m.def lines only. Pointers and streams arrive as integers; the GIL is released around every launch.
// The module's absence from the wheel is what "built without CUDA" means (see python/moeyard/_native.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <utility>

#include "common/device_errors.hpp"
#include "identity/identity.hpp"
#include "permute_tokens/permute_tokens.hpp"

namespace py = pybind11;
using namespace pybind11::literals;
using Address = std::uintptr_t;
using NoGil = py::call_guard<py::gil_scoped_release>;

namespace {
template <class T = void>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

using Ints = std::pair<Address, bool>;                                     // address, int64 (else int32)
using PlanArgs = std::tuple<Address, Address, int64_t, int64_t, int64_t>;  // the fields of moeyard::Plan
moeyard::Plan view(const PlanArgs& p) {
  const auto [row_of_slot, slot_of_row, tokens, k, rows] = p;
  return {at<int32_t>(row_of_slot), at<int32_t>(slot_of_row), tokens, k, rows};
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

  py::class_<moeyard::PlanRequest>(m, "PlanRequest", py::module_local())
      .def(py::init([](Ints experts, int64_t tokens, int64_t k, int64_t num_experts, int64_t capacity, int64_t align,
                       int64_t rows, Address weights, bool wide_weights) {
             return moeyard::PlanRequest{{at(experts.first), experts.second},
                                         tokens,
                                         k,
                                         num_experts,
                                         capacity,
                                         align,
                                         rows,
                                         at(weights),
                                         wide_weights};
           }),
           "experts"_a, "tokens"_a, "k"_a, "num_experts"_a, "capacity"_a, "align"_a, "rows"_a, "weights"_a,
           "wide_weights"_a);
  m.def("plan_permutation_workspace", &moeyard::cuda::plan_permutation_workspace, "request"_a);
  m.def(
      "plan_permutation",
      [](const moeyard::PlanRequest& request, const std::array<Address, 5>& out, Address workspace, Address errors,
         int device, Address stream) {
        moeyard::cuda::plan_permutation(
            request,
            {at<int32_t>(out[0]), at<int32_t>(out[1]), at<int32_t>(out[2]), at<int32_t>(out[3]), at<int32_t>(out[4])},
            at(workspace), at<unsigned>(errors), device, at(stream));
      },
      "request"_a, "out"_a, "workspace"_a, "errors"_a, "device"_a, "stream"_a, NoGil());
  m.def(
      "permute_rows",
      [](Address x, const PlanArgs& plan, int64_t row_bytes, Address out, Address errors, int device, Address stream) {
        moeyard::cuda::permute_rows(at(x), view(plan), row_bytes, at(out), at<unsigned>(errors), device, at(stream));
      },
      "x"_a, "plan"_a, "row_bytes"_a, "out"_a, "errors"_a, "device"_a, "stream"_a, NoGil());
  m.def(
      "permute_weighted",
      [](Address x, Address weights, Address y, const PlanArgs& plan, int64_t features, int dtype, Address out,
         Address dots, Address errors, int device, Address stream) {
        moeyard::cuda::permute_weighted(at(x), at(weights), at(y), view(plan), features, moeyard::DType(dtype), at(out),
                                        at(dots), at<unsigned>(errors), device, at(stream));
      },
      "x"_a, "weights"_a, "y"_a, "plan"_a, "features"_a, "dtype"_a, "out"_a, "dots"_a, "errors"_a, "device"_a,
      "stream"_a, NoGil());
  m.def(
      "unpermute_rows",
      [](Address y, Address weights, Address x, const PlanArgs& plan, int64_t features, int dtype, Address out,
         Address dots, Address errors, int device, Address stream) {
        moeyard::cuda::unpermute_rows(at(y), at(weights), at(x), view(plan), features, moeyard::DType(dtype), at(out),
                                      at(dots), at<unsigned>(errors), device, at(stream));
      },
      "y"_a, "weights"_a, "x"_a, "plan"_a, "features"_a, "dtype"_a, "out"_a, "dots"_a, "errors"_a, "device"_a,
      "stream"_a, NoGil());
}
