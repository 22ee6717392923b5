// Module _cpu: m.def lines only. Pointers arrive as integers; the GIL is released around every kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/simd.hpp"
#include "identity/identity.hpp"
#include "radius_graph/radius_graph.hpp"

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

  py::class_<moeyard::PointSet>(m, "PointSet")
      .def(py::init([](Address xyz, int64_t count, Address batch, Address ptr, int64_t num_graphs) {
             return moeyard::PointSet{at(xyz), count, at<int64_t>(batch), at<int64_t>(ptr), num_graphs};
           }),
           "xyz"_a, "count"_a, "batch"_a, "ptr"_a, "num_graphs"_a);
  py::class_<moeyard::Periodicity>(m, "Periodicity")
      .def(py::init([](Address cell, int64_t num_cells, Address pbc, int64_t num_pbc) {
             return moeyard::Periodicity{at(cell), num_cells, at<bool>(pbc), num_pbc};
           }),
           "cell"_a, "num_cells"_a, "pbc"_a, "num_pbc"_a);
  py::class_<moeyard::cpu::RadiusHits>(m, "RadiusHits")
      .def_readonly("num_edges", &moeyard::cpu::RadiusHits::num_edges)
      .def_readonly("truncated", &moeyard::cpu::RadiusHits::truncated);
  py::class_<moeyard::cpu::RadiusEdges>(m, "RadiusEdges")
      .def(py::init([](int64_t capacity, Address num_edges, Address centre, Address neighbour, Address distance,
                       Address vector, Address cell_shift, Address grad_distance, Address grad_vector) {
             return moeyard::cpu::RadiusEdges{
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
         Address neighbour, Address distance, Address vector, Address cell_shift, Address num_neighbors, double padding,
         int threads) {
        moeyard::cpu::radius_graph_fill(hits, moeyard::DType(dtype), points, centres, periodic,
                                        {capacity, at<int64_t>(centre), at<int64_t>(neighbour), at(distance),
                                         at(vector), at<int32_t>(cell_shift), at<int32_t>(num_neighbors), padding},
                                        threads);
      },
      "hits"_a, "dtype"_a, "points"_a, "centres"_a, "periodic"_a, "capacity"_a, "centre"_a, "neighbour"_a, "distance"_a,
      "vector"_a, "cell_shift"_a, "num_neighbors"_a, "padding"_a, "threads"_a, NoGil());
  m.def(
      "radius_graph_backward",
      [](int dtype, const moeyard::cpu::RadiusEdges& edges, int64_t num_points, const moeyard::PointSet& centres,
         int64_t num_cells, Address grad_points, Address grad_centres, Address grad_cell, int threads) {
        moeyard::cpu::radius_graph_backward(moeyard::DType(dtype), edges, num_points, centres, num_cells,
                                            at(grad_points), at(grad_centres), at(grad_cell), threads);
      },
      "dtype"_a, "edges"_a, "num_points"_a, "centres"_a, "num_cells"_a, "grad_points"_a, "grad_centres"_a,
      "grad_cell"_a, "threads"_a, NoGil());
  m.def(
      "radius_graph_double_backward",
      [](int dtype, const moeyard::cpu::RadiusEdges& edges, int64_t num_points, const moeyard::PointSet& centres,
         int64_t num_cells, Address gg_points, Address gg_centres, Address gg_cell, Address to_grad_distance,
         Address to_grad_vector, Address to_distance, Address to_vector, int threads) {
        moeyard::cpu::radius_graph_double_backward(moeyard::DType(dtype), edges, num_points, centres, num_cells,
                                                   at(gg_points), at(gg_centres), at(gg_cell), at(to_grad_distance),
                                                   at(to_grad_vector), at(to_distance), at(to_vector), threads);
      },
      "dtype"_a, "edges"_a, "num_points"_a, "centres"_a, "num_cells"_a, "gg_points"_a, "gg_centres"_a, "gg_cell"_a,
      "to_grad_distance"_a, "to_grad_vector"_a, "to_distance"_a, "to_vector"_a, "threads"_a, NoGil());
}
