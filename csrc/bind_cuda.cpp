// Module _cuda: m.def lines only. Pointers and streams arrive as integers; the GIL is released around every launch.
// The module's absence from the wheel is what "built without CUDA" means (see python/moeyard/_native.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "bind_views.hpp"
#include "common/device_errors.hpp"
#include "identity/identity.hpp"
#include "permute_tokens/permute_tokens.hpp"
#include "topk_gating/topk_gating.hpp"

namespace py = pybind11;
using namespace pybind11::literals;
using namespace moeyard::binding;

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
             return moeyard::PlanRequest{view(experts), tokens, k,           num_experts, capacity,
                                         align,         rows,   at(weights), wide_weights};
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
