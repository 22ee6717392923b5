// Module _cpu: m.def lines only. Pointers arrive as integers; the GIL is released around every kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <utility>

#include "common/simd.hpp"
#include "identity/identity.hpp"
#include "pack_batches/pack_batches.hpp"
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
moeyard::IntView view(Ints a) { return {at(a.first), a.second}; }
moeyard::Plan view(const PlanArgs& p) {
  const auto [row_of_slot, slot_of_row, tokens, k, rows] = p;
  return {at<int32_t>(row_of_slot), at<int32_t>(slot_of_row), tokens, k, rows};
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

  m.def("plan_permutation_workspace", &moeyard::cpu::plan_permutation_workspace, "slots"_a, "num_experts"_a,
        "by_weight"_a);
  m.def(
      "plan_permutation",
      [](Ints experts, int64_t tokens, int64_t k, int64_t num_experts, int64_t capacity, int64_t align, int64_t rows,
         Address weights, bool wide_weights, const std::array<Address, 5>& out, Address workspace, int threads) {
        moeyard::cpu::plan_permutation(
            {view(experts), tokens, k, num_experts, capacity, align, rows, at(weights), wide_weights},
            {at<int32_t>(out[0]), at<int32_t>(out[1]), at<int32_t>(out[2]), at<int32_t>(out[3]), at<int32_t>(out[4])},
            at<int32_t>(workspace), threads);
      },
      "experts"_a, "tokens"_a, "k"_a, "num_experts"_a, "capacity"_a, "align"_a, "rows"_a, "weights"_a, "wide_weights"_a,
      "out"_a, "workspace"_a, "threads"_a, NoGil());
  m.def(
      "check_plan", [](const PlanArgs& plan, int threads) { moeyard::cpu::check_plan(view(plan), threads); }, "plan"_a,
      "threads"_a, NoGil());
  m.def(
      "permute_rows",
      [](Address x, const PlanArgs& plan, int64_t row_bytes, Address out, int threads) {
        moeyard::cpu::permute_rows(at(x), view(plan), row_bytes, at(out), threads);
      },
      "x"_a, "plan"_a, "row_bytes"_a, "out"_a, "threads"_a, NoGil());
  m.def(
      "permute_weighted",
      [](Address x, Address weights, Address y, const PlanArgs& plan, int64_t features, int dtype, Address out,
         Address dots, int threads) {
        moeyard::cpu::permute_weighted(at(x), at(weights), at(y), view(plan), features, moeyard::DType(dtype), at(out),
                                       at(dots), threads);
      },
      "x"_a, "weights"_a, "y"_a, "plan"_a, "features"_a, "dtype"_a, "out"_a, "dots"_a, "threads"_a, NoGil());
  m.def(
      "unpermute_rows",
      [](Address y, Address weights, Address x, const PlanArgs& plan, int64_t features, int dtype, Address out,
         Address dots, int threads) {
        moeyard::cpu::unpermute_rows(at(y), at(weights), at(x), view(plan), features, moeyard::DType(dtype), at(out),
                                     at(dots), threads);
      },
      "y"_a, "weights"_a, "x"_a, "plan"_a, "features"_a, "dtype"_a, "out"_a, "dots"_a, "threads"_a, NoGil());

  py::class_<moeyard::PackRequest>(m, "PackRequest")
      .def(py::init([](Ints sizes, int64_t samples, Ints order, int64_t length, Ints segments, Ints sizes2,
                       int64_t budget, int64_t budget2, int64_t max_samples, int64_t lookahead, int oversize) {
             return moeyard::PackRequest{view(sizes),
                                         samples,
                                         view(order),
                                         length,
                                         view(segments),
                                         view(sizes2),
                                         budget,
                                         budget2,
                                         max_samples,
                                         lookahead,
                                         moeyard::Oversize(oversize)};
           }),
           "sizes"_a, "samples"_a, "order"_a, "length"_a, "segments"_a, "sizes2"_a, "budget"_a, "budget2"_a,
           "max_samples"_a, "lookahead"_a, "oversize"_a);
  m.def(
      "pack_batches",
      [](const moeyard::PackRequest& request, Address seen, Address batch_of_position) {
        const auto n = moeyard::cpu::pack_batches(request, at<uint8_t>(seen), at<uint32_t>(batch_of_position));
        return std::array<int64_t, 3>{n.batches, n.packed, n.skipped};
      },
      "request"_a, "seen"_a, "batch_of_position"_a, NoGil());
  m.def(
      "pack_batches_fill",
      [](const moeyard::PackRequest& request, Address batch_of_position, int64_t batches, Address index, Address ptr,
         Address fill, Address skipped) {
        moeyard::cpu::pack_batches_fill(request, at<uint32_t>(batch_of_position), batches, at<int64_t>(index),
                                        at<int64_t>(ptr), at<int64_t>(fill), at<int64_t>(skipped));
      },
      "request"_a, "batch_of_position"_a, "batches"_a, "index"_a, "ptr"_a, "fill"_a, "skipped"_a, NoGil());

  py::class_<moeyard::SegmentsRequest>(m, "SegmentsRequest")
      .def(py::init([](Ints ptr, int64_t num_segments, int64_t num_values, Ints index, int64_t count) {
             return moeyard::SegmentsRequest{view(ptr), num_segments, num_values, view(index), count};
           }),
           "ptr"_a, "num_segments"_a, "num_values"_a, "index"_a, "count"_a);
  m.def(
      "segments_ptr",
      [](const moeyard::SegmentsRequest& request, Address out) {
        return moeyard::cpu::segments_ptr(request, at<int64_t>(out));
      },
      "request"_a, "out"_a, NoGil());
  m.def(
      "gather_segments",
      [](const moeyard::SegmentsRequest& request, Address out_ptr, Address values, int64_t row_items,
         int64_t item_bytes, Ints add, int64_t total, Address out, Address batch, int threads) {
        moeyard::cpu::gather_segments(request, at<int64_t>(out_ptr), at(values), row_items, item_bytes, view(add),
                                      total, at(out), at<int64_t>(batch), threads);
      },
      "request"_a, "out_ptr"_a, "values"_a, "row_items"_a, "item_bytes"_a, "add"_a, "total"_a, "out"_a, "batch"_a,
      "threads"_a, NoGil());
  m.def(
      "gather_segments_backward",
      [](const moeyard::SegmentsRequest& request, Address out_ptr, Address grad, int64_t row_items, int dtype,
         Address workspace, Address grad_values, int threads) {
        moeyard::cpu::gather_segments_backward(request, at<int64_t>(out_ptr), at(grad), row_items,
                                               moeyard::DType(dtype), at<int64_t>(workspace), at(grad_values), threads);
      },
      "request"_a, "out_ptr"_a, "grad"_a, "row_items"_a, "dtype"_a, "workspace"_a, "grad_values"_a, "threads"_a,
      NoGil());
}
