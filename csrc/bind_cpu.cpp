// Module _cpu: m.def lines only. Pointers arrive as integers; the GIL is released around every kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "bind_direct.hpp"
#include "bind_views.hpp"
#include "common/simd.hpp"
#include "expert_ffn/expert_ffn.hpp"
#include "identity/identity.hpp"
#include "pack_batches/pack_batches.hpp"
#include "permute_tokens/permute_tokens.hpp"
#include "radius_graph/radius_graph.hpp"
#include "topk_gating/topk_gating.hpp"

namespace py = pybind11;
using namespace pybind11::literals;
using namespace moeyard::binding;

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of moeyard on raw addresses; use moeyard.ops instead.";
  moeyard::bind_direct(m);
  m.def("simd_level", [] { return moeyard::simd_name(moeyard::simd_level()); });
  m.def("simd_best", [] { return moeyard::simd_name(moeyard::simd_best()); });

  m.def(
      "identity",
      [](Address in, Address out, int64_t bytes, int threads) {
        moeyard::cpu::identity(at(in), at(out), bytes, threads);
      },
      "input"_a, "out"_a, "bytes"_a, "threads"_a, NoGil());

  using Strided = std::tuple<Address, int64_t, int64_t, int64_t>;  // a stack of weights and its strides
  py::class_<moeyard::ExpertFfn>(m, "ExpertFfn")
      .def(py::init([](Address x, const Strided& up, const Strided& down, Ints offsets, int64_t rows, int64_t experts,
                       int64_t dim, int64_t hidden, bool swiglu) {
             const auto stack = [](const Strided& w) {
               return moeyard::Weights{at<float>(std::get<0>(w)), std::get<1>(w), std::get<2>(w), std::get<3>(w)};
             };
             return moeyard::ExpertFfn{at<float>(x), stack(up), stack(down), view(offsets), rows,
                                       experts,      dim,       hidden,      swiglu};
           }),
           "x"_a, "up"_a, "down"_a, "offsets"_a, "rows"_a, "experts"_a, "dim"_a, "hidden"_a, "swiglu"_a);
  m.def("expert_ffn_runs", &moeyard::cpu::expert_ffn_runs);
  m.def("expert_ffn_preferred", &moeyard::cpu::expert_ffn_preferred);
  m.def(
      "expert_ffn",
      [](const moeyard::ExpertFfn& problem, Address y, Address hidden, int threads) {
        moeyard::cpu::expert_ffn(problem, at<float>(y), at<float>(hidden), threads);
      },
      "problem"_a, "y"_a, "hidden"_a, "threads"_a, NoGil());
  m.def(
      "expert_ffn_backward",
      [](const moeyard::ExpertFfn& problem, Address grad, Address hidden, Address grad_x, Address grad_up,
         Address grad_down, int threads) {
        moeyard::cpu::expert_ffn_backward(problem, at<float>(grad), at<float>(hidden),
                                          {at<float>(grad_x), at<float>(grad_up), at<float>(grad_down)}, threads);
      },
      "problem"_a, "grad"_a, "hidden"_a, "grad_x"_a, "grad_up"_a, "grad_down"_a, "threads"_a, NoGil());

  m.def(
      "plan_permutation",
      [](Ints experts, int64_t tokens, int64_t k, int64_t num_experts, int64_t capacity, int64_t align, int64_t rows,
         Address weights, bool wide_weights, const std::array<Address, 5>& out, int threads) {
        moeyard::cpu::plan_permutation(
            {view(experts), tokens, k, num_experts, capacity, align, rows, at(weights), wide_weights},
            {at<int32_t>(out[0]), at<int32_t>(out[1]), at<int32_t>(out[2]), at<int32_t>(out[3]), at<int32_t>(out[4])},
            threads);
      },
      "experts"_a, "tokens"_a, "k"_a, "num_experts"_a, "capacity"_a, "align"_a, "rows"_a, "weights"_a, "wide_weights"_a,
      "out"_a, "threads"_a, NoGil());
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

  py::class_<moeyard::PackRequest>(m, "PackRequest", py::module_local())
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
  py::class_<moeyard::PackPlan>(m, "PackPlan", py::module_local())
      .def_property_readonly("batches", [](const moeyard::PackPlan& plan) { return plan.fill.size(); });
  m.def(
      "count_skipped", [](const moeyard::PackRequest& request) { return moeyard::cpu::count_skipped(request); },
      "request"_a, NoGil());
  m.def(
      "pack_batches",
      [](const moeyard::PackRequest& request, Address seen, Address batch_of_position, Address index, Address skipped) {
        return moeyard::cpu::pack_batches(request, at<uint8_t>(seen), at<uint32_t>(batch_of_position),
                                          at<int64_t>(index), at<int64_t>(skipped));
      },
      "request"_a, "seen"_a, "batch_of_position"_a, "index"_a, "skipped"_a, NoGil());
  m.def(
      "pack_batches_fill",
      [](const moeyard::PackRequest& request, const moeyard::PackPlan& plan, Address batch_of_position, Address index,
         Address ptr, Address fill, Address skipped) {
        moeyard::cpu::pack_batches_fill(request, plan, at<uint32_t>(batch_of_position), at<int64_t>(index),
                                        at<int64_t>(ptr), at<int64_t>(fill), at<int64_t>(skipped));
      },
      "request"_a, "plan"_a, "batch_of_position"_a, "index"_a, "ptr"_a, "fill"_a, "skipped"_a, NoGil());

  py::class_<moeyard::SegmentsRequest>(m, "SegmentsRequest", py::module_local())
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
  m.def(
      "topk_gating",
      [](const moeyard::GatingProblem& problem, Address logits, Address bias, Address mask, Address forced,
         Address weights, Address experts, Address counts, Address score_sum, Address weight_sum, Address logsumexp_sq,
         Address entropy_sum, int threads) {
        moeyard::cpu::topk_gating(problem, {at(logits), at(bias), at<uint8_t>(mask), at<int64_t>(forced)},
                                  {at(weights), at<int32_t>(experts), at<int32_t>(counts), at(score_sum),
                                   at(weight_sum), at(logsumexp_sq), at(entropy_sum)},
                                  threads);
      },
      "problem"_a, "logits"_a, "bias"_a, "mask"_a, "forced"_a, "weights"_a, "experts"_a, "counts"_a, "score_sum"_a,
      "weight_sum"_a, "logsumexp_sq"_a, "entropy_sum"_a, "threads"_a, NoGil());
  m.def(
      "topk_gating_backward",
      [](const moeyard::GatingProblem& problem, Address logits, Address experts, Address mask, Address grad_weights,
         Address grad_score_sum, Address grad_weight_sum, Address grad_logsumexp_sq, Address grad_entropy_sum,
         Address grad_logits, int threads) {
        moeyard::cpu::topk_gating_backward(
            problem, at(logits), at<int32_t>(experts), at<uint8_t>(mask),
            {at(grad_weights), at(grad_score_sum), at(grad_weight_sum), at(grad_logsumexp_sq), at(grad_entropy_sum)},
            at(grad_logits), threads);
      },
      "problem"_a, "logits"_a, "experts"_a, "mask"_a, "grad_weights"_a, "grad_score_sum"_a, "grad_weight_sum"_a,
      "grad_logsumexp_sq"_a, "grad_entropy_sum"_a, "grad_logits"_a, "threads"_a, NoGil());

  py::class_<moeyard::PointSet>(m, "PointSet", py::module_local())
      .def(py::init([](Address xyz, int64_t count, Address batch, Address ptr, int64_t num_graphs) {
             return moeyard::PointSet{at(xyz), count, at<int64_t>(batch), at<int64_t>(ptr), num_graphs};
           }),
           "xyz"_a, "count"_a, "batch"_a, "ptr"_a, "num_graphs"_a);
  py::class_<moeyard::Periodicity>(m, "Periodicity", py::module_local())
      .def(py::init([](Address cell, int64_t num_cells, Address pbc, int64_t num_pbc) {
             return moeyard::Periodicity{at(cell), num_cells, at<bool>(pbc), num_pbc};
           }),
           "cell"_a, "num_cells"_a, "pbc"_a, "num_pbc"_a);
  py::class_<moeyard::cpu::RadiusHits>(m, "RadiusHits")
      .def_readonly("num_edges", &moeyard::cpu::RadiusHits::num_edges)
      .def_readonly("truncated", &moeyard::cpu::RadiusHits::truncated);
  py::class_<moeyard::RadiusEdges>(m, "RadiusEdges", py::module_local())
      .def(py::init([](int64_t capacity, Address num_edges, Address centre, Address neighbour, Address distance,
                       Address vector, Address cell_shift, Address grad_distance, Address grad_vector) {
             return moeyard::RadiusEdges{
                 capacity,   at<int64_t>(num_edges),  at<int64_t>(centre), at<int64_t>(neighbour), at(distance),
                 at(vector), at<int32_t>(cell_shift), at(grad_distance),   at(grad_vector)};
           }),
           "capacity"_a, "num_edges"_a, "centre"_a, "neighbour"_a, "distance"_a, "vector"_a, "cell_shift"_a,
           "grad_distance"_a, "grad_vector"_a);
  m.def(
      "radius_graph_search",
      [](int dtype, const moeyard::PointSet& points, const moeyard::PointSet& centres,
         const moeyard::Periodicity& periodic, double r, int64_t k, int64_t max_neighbors, bool symmetric, bool loop,
         bool half, int threads) {
        return moeyard::cpu::radius_graph_search(moeyard::DType(dtype), points, centres, periodic,
                                                 {r, k, max_neighbors, symmetric, loop, half}, threads);
      },
      "dtype"_a, "points"_a, "centres"_a, "periodic"_a, "r"_a, "k"_a, "max_neighbors"_a, "symmetric"_a, "loop"_a,
      "half"_a, "threads"_a, NoGil());
  m.def(
      "radius_graph_fill",
      [](const moeyard::cpu::RadiusHits& hits, int dtype, const moeyard::PointSet& points,
         const moeyard::PointSet& centres, const moeyard::Periodicity& periodic, int64_t capacity, Address centre,
         Address neighbour, Address distance, Address vector, Address cell_shift, Address num_neighbors,
         Address truncated, Address num_edges, Address overflow, double padding, int threads) {
        moeyard::cpu::radius_graph_fill(
            hits, moeyard::DType(dtype), points, centres, periodic,
            {capacity, at<int64_t>(centre), at<int64_t>(neighbour), at(distance), at(vector), at<int32_t>(cell_shift),
             at<int32_t>(num_neighbors), at<int64_t>(truncated), at<int64_t>(num_edges), at<bool>(overflow), padding},
            threads);
      },
      "hits"_a, "dtype"_a, "points"_a, "centres"_a, "periodic"_a, "capacity"_a, "centre"_a, "neighbour"_a, "distance"_a,
      "vector"_a, "cell_shift"_a, "num_neighbors"_a, "truncated"_a, "num_edges"_a, "overflow"_a, "padding"_a,
      "threads"_a, NoGil());
  m.def(
      "radius_graph_backward",
      [](int dtype, const moeyard::RadiusEdges& edges, int64_t num_points, const moeyard::PointSet& centres,
         int64_t num_cells, Address grad_points, Address grad_centres, Address grad_cell, int threads) {
        moeyard::cpu::radius_graph_backward(moeyard::DType(dtype), edges, num_points, centres, num_cells,
                                            at(grad_points), at(grad_centres), at(grad_cell), threads);
      },
      "dtype"_a, "edges"_a, "num_points"_a, "centres"_a, "num_cells"_a, "grad_points"_a, "grad_centres"_a,
      "grad_cell"_a, "threads"_a, NoGil());
  m.def(
      "radius_graph_double_backward",
      [](int dtype, const moeyard::RadiusEdges& edges, int64_t num_points, const moeyard::PointSet& centres,
         int64_t num_cells, Address gg_points, Address gg_centres, Address gg_cell, Address to_grad_distance,
         Address to_grad_vector, Address to_distance, Address to_vector, int threads) {
        moeyard::cpu::radius_graph_double_backward(moeyard::DType(dtype), edges, num_points, centres, num_cells,
                                                   at(gg_points), at(gg_centres), at(gg_cell), at(to_grad_distance),
                                                   at(to_grad_vector), at(to_distance), at(to_vector), threads);
      },
      "dtype"_a, "edges"_a, "num_points"_a, "centres"_a, "num_cells"_a, "gg_points"_a, "gg_centres"_a, "gg_cell"_a,
      "to_grad_distance"_a, "to_grad_vector"_a, "to_distance"_a, "to_vector"_a, "threads"_a, NoGil());
}
