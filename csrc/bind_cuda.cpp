// Module _cuda: m.def lines only. Pointers and streams arrive as integers; the GIL is released around every launch.
// Classes of requests that are not defined here are _cpu's, which is loaded first.
// The module's absence from the wheel is what "built without CUDA" means (see python/moeyard/_native.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "bind_views.hpp"
#include "common/device_errors.hpp"
#include "identity/identity.hpp"
#include "pack_batches/pack_batches.hpp"
#include "permute_tokens/permute_tokens.hpp"
#include "radius_graph/radius_graph.hpp"
#include "topk_gating/topk_gating.hpp"

namespace py = pybind11;
using namespace pybind11::literals;
using namespace moeyard::binding;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of moeyard on raw addresses; use moeyard.ops instead.";
  m.attr("runtime_version") = MOEYARD_CUDART_VERSION;
  m.attr("architectures") = MOEYARD_CUDA_ARCHS;  // as CMake has them: "80-real,90"
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
  m.def("pack_batches_workspace", &moeyard::cuda::pack_batches_workspace, "request"_a);
  m.def(
      "pack_batches",
      [](const moeyard::PackRequest& request, Address index, Address summary, Address workspace, int device,
         Address stream) {
        moeyard::cuda::pack_batches(request, at<int64_t>(index), at<moeyard::cuda::PackSummary>(summary), at(workspace),
                                    device, at(stream));
      },
      "request"_a, "index"_a, "summary"_a, "workspace"_a, "device"_a, "stream"_a, NoGil());
  m.def(
      "pack_batches_fill",
      [](const moeyard::PackRequest& request, Address index, Address summary, int64_t batches, Address workspace,
         Address ptr, Address fill, int device, Address stream) {
        moeyard::cuda::pack_batches_fill(request, at<int64_t>(index), at<moeyard::cuda::PackSummary>(summary), batches,
                                         at(workspace), at<int64_t>(ptr), at<int64_t>(fill), device, at(stream));
      },
      "request"_a, "index"_a, "summary"_a, "batches"_a, "workspace"_a, "ptr"_a, "fill"_a, "device"_a, "stream"_a,
      NoGil());
  m.attr("too_many_rows") = moeyard::cuda::kTooManyRows;
  m.def("segments_workspace", &moeyard::cuda::segments_workspace, "count"_a);
  m.def(
      "segments_ptr",
      [](const moeyard::SegmentsRequest& request, int64_t limit, Address out, Address workspace, Address errors,
         int device, Address stream) {
        moeyard::cuda::segments_ptr(request, limit, at<int64_t>(out), at(workspace), at<unsigned>(errors), device,
                                    at(stream));
      },
      "request"_a, "limit"_a, "out"_a, "workspace"_a, "errors"_a, "device"_a, "stream"_a, NoGil());
  m.def(
      "gather_segments",
      [](const moeyard::SegmentsRequest& request, Address out_ptr, Address workspace, Address values, int64_t row_items,
         int64_t item_bytes, Ints add, int64_t total, Address out, Address batch, int device, Address stream) {
        moeyard::cuda::gather_segments(request, at<int64_t>(out_ptr), at(workspace), at(values), row_items, item_bytes,
                                       view(add), total, at(out), at<int64_t>(batch), device, at(stream));
      },
      "request"_a, "out_ptr"_a, "workspace"_a, "values"_a, "row_items"_a, "item_bytes"_a, "add"_a, "total"_a, "out"_a,
      "batch"_a, "device"_a, "stream"_a, NoGil());
  m.def("gather_segments_backward_workspace", &moeyard::cuda::gather_segments_backward_workspace, "request"_a);
  m.def(
      "gather_segments_backward",
      [](const moeyard::SegmentsRequest& request, Address out_ptr, Address grad, int64_t row_items, int dtype,
         Address workspace, Address grad_values, Address errors, int device, Address stream) {
        moeyard::cuda::gather_segments_backward(request, at<int64_t>(out_ptr), at(grad), row_items,
                                                moeyard::DType(dtype), at(workspace), at(grad_values),
                                                at<unsigned>(errors), device, at(stream));
      },
      "request"_a, "out_ptr"_a, "grad"_a, "row_items"_a, "dtype"_a, "workspace"_a, "grad_values"_a, "errors"_a,
      "device"_a, "stream"_a, NoGil());
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

  py::class_<moeyard::RadiusOptions>(m, "RadiusOptions", py::module_local())
      .def(py::init([](double r, int64_t k, int64_t max_neighbors, bool symmetric, bool loop, bool half) {
             return moeyard::RadiusOptions{r, k, max_neighbors, symmetric, loop, half};
           }),
           "r"_a, "k"_a, "max_neighbors"_a, "symmetric"_a, "loop"_a, "half"_a);
  // Addresses of centre, neighbour, distance, vector, cell_shift, num_neighbors, truncated, num_edges, overflow.
  using RadiusOut = std::array<Address, 9>;
  const auto outputs = [](int64_t capacity, const RadiusOut& out, double padding) {
    return moeyard::RadiusOutputs{capacity,
                                  at<int64_t>(out[0]),
                                  at<int64_t>(out[1]),
                                  at(out[2]),
                                  at(out[3]),
                                  at<int32_t>(out[4]),
                                  at<int32_t>(out[5]),
                                  at<int64_t>(out[6]),
                                  at<int64_t>(out[7]),
                                  at<bool>(out[8]),
                                  padding};
  };
  m.def(
      "radius_graph_workspace",
      [](int dtype, const moeyard::PointSet& points, const moeyard::PointSet& centres,
         const moeyard::Periodicity& periodic, const moeyard::RadiusOptions& options) {
        return moeyard::cuda::radius_graph_workspace(moeyard::DType(dtype), points, centres, periodic, options);
      },
      "dtype"_a, "points"_a, "centres"_a, "periodic"_a, "options"_a);
  m.def(
      "radius_graph_search",
      [outputs](int dtype, const moeyard::PointSet& points, const moeyard::PointSet& centres,
                const moeyard::Periodicity& periodic, const moeyard::RadiusOptions& options, const RadiusOut& out,
                Address workspace, Address errors, int device, Address stream) {
        moeyard::cuda::radius_graph_search(moeyard::DType(dtype), points, centres, periodic, options,
                                           outputs(0, out, 0), at(workspace), at<unsigned>(errors), device, at(stream));
      },
      "dtype"_a, "points"_a, "centres"_a, "periodic"_a, "options"_a, "out"_a, "workspace"_a, "errors"_a, "device"_a,
      "stream"_a, NoGil());
  m.def("radius_graph_wants_keys", &moeyard::cuda::radius_graph_wants_keys, "options"_a);
  m.def(
      "radius_graph_fill",
      [outputs](int dtype, const moeyard::PointSet& points, const moeyard::PointSet& centres,
                const moeyard::Periodicity& periodic, const moeyard::RadiusOptions& options, int64_t capacity,
                const RadiusOut& out, double padding, Address workspace, Address keys, Address errors, int device,
                Address stream) {
        moeyard::cuda::radius_graph_fill(moeyard::DType(dtype), points, centres, periodic, options,
                                         outputs(capacity, out, padding), at(workspace), at(keys), at<unsigned>(errors),
                                         device, at(stream));
      },
      "dtype"_a, "points"_a, "centres"_a, "periodic"_a, "options"_a, "capacity"_a, "out"_a, "padding"_a, "workspace"_a,
      "keys"_a, "errors"_a, "device"_a, "stream"_a, NoGil());
  m.def("radius_graph_backward_workspace", &moeyard::cuda::radius_graph_backward_workspace, "edges"_a, "num_points"_a,
        "num_centres"_a, "has_cell"_a, "num_cells"_a);
  m.def(
      "radius_graph_backward",
      [](int dtype, const moeyard::RadiusEdges& edges, int64_t num_points, const moeyard::PointSet& centres,
         int64_t num_cells, Address grad_points, Address grad_centres, Address grad_cell, Address workspace,
         Address errors, int device, Address stream) {
        moeyard::cuda::radius_graph_backward(moeyard::DType(dtype), edges, num_points, centres, num_cells,
                                             at(grad_points), at(grad_centres), at(grad_cell), at(workspace),
                                             at<unsigned>(errors), device, at(stream));
      },
      "dtype"_a, "edges"_a, "num_points"_a, "centres"_a, "num_cells"_a, "grad_points"_a, "grad_centres"_a,
      "grad_cell"_a, "workspace"_a, "errors"_a, "device"_a, "stream"_a, NoGil());
  m.def(
      "radius_graph_double_backward",
      [](int dtype, const moeyard::RadiusEdges& edges, int64_t num_points, const moeyard::PointSet& centres,
         int64_t num_cells, Address gg_points, Address gg_centres, Address gg_cell, Address to_grad_distance,
         Address to_grad_vector, Address to_distance, Address to_vector, Address errors, int device, Address stream) {
        moeyard::cuda::radius_graph_double_backward(moeyard::DType(dtype), edges, num_points, centres, num_cells,
                                                    at(gg_points), at(gg_centres), at(gg_cell), at(to_grad_distance),
                                                    at(to_grad_vector), at(to_distance), at(to_vector),
                                                    at<unsigned>(errors), device, at(stream));
      },
      "dtype"_a, "edges"_a, "num_points"_a, "centres"_a, "num_cells"_a, "gg_points"_a, "gg_centres"_a, "gg_cell"_a,
      "to_grad_distance"_a, "to_grad_vector"_a, "to_distance"_a, "to_vector"_a, "errors"_a, "device"_a, "stream"_a,
      NoGil());
}
