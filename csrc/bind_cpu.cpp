// Module _cpu: m.def lines only. Pointers arrive as integers; the GIL is released around every kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/simd.hpp"
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

  py::class_<moeyard::GatingProblem>(m, "GatingProblem", py::module_local())
      .def(py::init([](int dtype, int64_t rows, int64_t experts, int64_t k, int score, bool renormalize, double scale,
                       int64_t num_groups, int64_t topk_groups, int64_t group_score_experts, int64_t forced_slots,
                       bool unit_weights) {
             return moeyard::GatingProblem{
                 moeyard::DType(dtype), rows,        experts,    k,           moeyard::Score(score),
                 renormalize,           scale,       num_groups, topk_groups, group_score_experts,
                 forced_slots,          unit_weights};
           }),
           "dtype"_a, "rows"_a, "experts"_a, "k"_a, "score"_a, "renormalize"_a, "scale"_a, "num_groups"_a = 0,
           "topk_groups"_a = 0, "group_score_experts"_a = 0, "forced_slots"_a = 0, "unit_weights"_a = false);
  m.def("topk_gating_workspace", &moeyard::cpu::topk_gating_workspace, "problem"_a);
  m.def(
      "topk_gating",
      [](const moeyard::GatingProblem& problem, Address logits, Address bias, Address mask, Address forced,
         Address weights, Address experts, Address counts, Address score_sum, Address weight_sum, Address logsumexp_sq,
         Address entropy_sum, Address workspace, int threads) {
        moeyard::cpu::topk_gating(problem, {at(logits), at(bias), at<uint8_t>(mask), at<int64_t>(forced)},
                                  {at(weights), at<int32_t>(experts), at<int32_t>(counts), at(score_sum),
                                   at(weight_sum), at(logsumexp_sq), at(entropy_sum)},
                                  at(workspace), threads);
      },
      "problem"_a, "logits"_a, "bias"_a, "mask"_a, "forced"_a, "weights"_a, "experts"_a, "counts"_a, "score_sum"_a,
      "weight_sum"_a, "logsumexp_sq"_a, "entropy_sum"_a, "workspace"_a, "threads"_a, NoGil());
  m.def(
      "topk_gating_backward",
      [](const moeyard::GatingProblem& problem, Address logits, Address experts, Address mask, Address grad_weights,
         Address grad_score_sum, Address grad_weight_sum, Address grad_logsumexp_sq, Address grad_entropy_sum,
         Address grad_logits, Address workspace, int threads) {
        moeyard::cpu::topk_gating_backward(
            problem, at(logits), at<int32_t>(experts), at<uint8_t>(mask),
            {at(grad_weights), at(grad_score_sum), at(grad_weight_sum), at(grad_logsumexp_sq), at(grad_entropy_sum)},
            at(grad_logits), at(workspace), threads);
      },
      "problem"_a, "logits"_a, "experts"_a, "mask"_a, "grad_weights"_a, "grad_score_sum"_a, "grad_weight_sum"_a,
      "grad_logsumexp_sq"_a, "grad_entropy_sum"_a, "grad_logits"_a, "workspace"_a, "threads"_a, NoGil());
}
