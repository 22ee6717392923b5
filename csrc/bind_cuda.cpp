// Module _cuda: m.def lines only. Pointers and streams arrive as integers; the GIL is released around every launch.
// The module's absence from the wheel is what "built without CUDA" means (see python/moeyard/_native.py).
#include <pybind11/pybind11.h>

#include "common/device_errors.hpp"
#include "identity/identity.hpp"
#include "topk_gating/topk_gating.hpp"

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

  // GatingProblem is registered by _cpu, which is loaded first.
  m.def("topk_gating_workspace", &moeyard::cuda::topk_gating_workspace, "problem"_a);
  m.def(
      "topk_gating",
      [](const moeyard::GatingProblem& problem, Address logits, Address bias, Address mask, Address forced,
         Address weights, Address experts, Address counts, Address score_sum, Address weight_sum, Address logsumexp_sq,
         Address entropy_sum, Address workspace, Address errors, int device, Address stream) {
        moeyard::cuda::topk_gating(problem, {at(logits), at(bias), at<uint8_t>(mask), at<int64_t>(forced)},
                                   {at(weights), at<int32_t>(experts), at<int32_t>(counts), at(score_sum),
                                    at(weight_sum), at(logsumexp_sq), at(entropy_sum)},
                                   at(workspace), at<unsigned>(errors), device, at(stream));
      },
      "problem"_a, "logits"_a, "bias"_a, "mask"_a, "forced"_a, "weights"_a, "experts"_a, "counts"_a, "score_sum"_a,
      "weight_sum"_a, "logsumexp_sq"_a, "entropy_sum"_a, "workspace"_a, "errors"_a, "device"_a, "stream"_a, NoGil());
  m.def(
      "topk_gating_backward",
      [](const moeyard::GatingProblem& problem, Address logits, Address experts, Address mask, Address grad_weights,
         Address grad_score_sum, Address grad_weight_sum, Address grad_logsumexp_sq, Address grad_entropy_sum,
         Address grad_logits, Address errors, int device, Address stream) {
        moeyard::cuda::topk_gating_backward(
            problem, at(logits), at<int32_t>(experts), at<uint8_t>(mask),
            {at(grad_weights), at(grad_score_sum), at(grad_weight_sum), at(grad_logsumexp_sq), at(grad_entropy_sum)},
            at(grad_logits), at<unsigned>(errors), device, at(stream));
      },
      "problem"_a, "logits"_a, "experts"_a, "mask"_a, "grad_weights"_a, "grad_score_sum"_a, "grad_weight_sum"_a,
      "grad_logsumexp_sq"_a, "grad_entropy_sum"_a, "grad_logits"_a, "errors"_a, "device"_a, "stream"_a, NoGil());
}
