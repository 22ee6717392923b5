// radius_graph: all pairs of points closer than r, or the k nearest, graph by graph, free or periodic. Serves the
// public radius_graph, radius (two sets of points) and knn_graph.
//
// Edge i <- j with shift s exists when (dx*dx + dy*dy) + dz*dz < r*r, evaluated in the coordinates' type without fused
// multiply-add, where d = (pos[j] + s @ cell) - centre[i]: differences of the caller's own coordinates, never of
// shifted or wrapped ones. The grid, the tree and the wrapping into the cell only propose candidates. Of a periodic
// pair of one set the difference is taken from the smaller index to the larger and negated for the other direction, so
// that the graph is symmetric to the last bit.
//
// Edges are sorted by (centre, neighbour, shift). Nothing depends on the number of threads or the SIMD level.
#pragma once
#include <cstdint>
#include <memory>

#include "common/dtype.hpp"

namespace moeyard {

/// A set of points: coordinates [count,3] (null: the set is the other one), and its graphs, by at most one of `batch`
/// ([count] sorted graph ids >= 0) and `ptr` ([num_graphs + 1] from 0 to count). With neither all points are graph 0.
struct PointSet {
  const void* xyz = nullptr;
  int64_t count = 0;
  const int64_t* batch = nullptr;
  const int64_t* ptr = nullptr;
  int64_t num_graphs = 0;
};

/// Cells with vectors as rows: [3,3] for all graphs (num_cells = -1) or [num_cells,3,3] by graph id; the same for pbc.
/// A null `cell` means free space; a null `pbc` means periodic along all three vectors.
struct Periodicity {
  const void* cell = nullptr;
  int64_t num_cells = -1;
  const bool* pbc = nullptr;
  int64_t num_pbc = -1;
};

struct RadiusOptions {
  double r = 0;
  int64_t k = -1;              // >= 1: the k nearest instead of all within r
  int64_t max_neighbors = -1;  // >= 1: keep the nearest of each centre, ties by (neighbour, shift)
  bool symmetric = false;      // keep an edge that either end keeps
  bool loop = false;           // keep (i, i, shift 0)
  bool half = false;           // keep one direction of each pair
};

/// Outputs for `capacity` edges; edges beyond it are left out, unused ones are 0 -> 0 with vector 0 and distance
/// `padding`. distance and vector may both be null, cell_shift is null without a cell.
struct RadiusOutputs {
  int64_t capacity = 0;
  int64_t* centre = nullptr;
  int64_t* neighbour = nullptr;
  void* distance = nullptr;
  void* vector = nullptr;
  int32_t* cell_shift = nullptr;
  int32_t* num_neighbors = nullptr;
  int64_t* truncated = nullptr;
  int64_t* num_edges = nullptr;  // found, also those beyond the capacity
  bool* overflow = nullptr;
  double padding = 0;
};

/// The edges that a gradient runs over: the forward's outputs. Only the first min(*num_edges, capacity) count.
struct RadiusEdges {
  int64_t capacity = 0;
  const int64_t* num_edges = nullptr;
  const int64_t* centre = nullptr;
  const int64_t* neighbour = nullptr;
  const void* distance = nullptr;
  const void* vector = nullptr;
  const int32_t* cell_shift = nullptr;
  const void* grad_distance = nullptr;  // null: zero
  const void* grad_vector = nullptr;    // null: zero
};

namespace cpu {

class HitStore;

/// What a search found: the number of edges, known before any output is allocated, and the hits themselves.
struct RadiusHits {
  RadiusHits();
  RadiusHits(RadiusHits&&) noexcept;
  ~RadiusHits();
  int64_t num_edges = 0;
  int64_t truncated = 0;
  std::unique_ptr<HitStore> store;
};

/// Throws std::invalid_argument for values that make no graph: see graphs.hpp and lattice.hpp.
RadiusHits radius_graph_search(DType dtype, const PointSet& points, const PointSet& centres,
                               const Periodicity& periodic, const RadiusOptions& options, int threads);

/// The same arguments as for the search that gave `hits`.
void radius_graph_fill(const RadiusHits& hits, DType dtype, const PointSet& points, const PointSet& centres,
                       const Periodicity& periodic, const RadiusOutputs& out, int threads);

/// With y = grad_vector + grad_distance * vector / distance (the second term 0 where distance is 0):
/// grad_points[j] += y, grad_centres[i] -= y (both in grad_points when grad_centres is null), grad_cell[g] += s^T y.
/// `centres` names sizes and graphs only. grad_cell is null without a cell, [3,3] for num_cells = -1.
void radius_graph_backward(DType dtype, const RadiusEdges& edges, int64_t num_points, const PointSet& centres,
                           int64_t num_cells, void* grad_points, void* grad_centres, void* grad_cell, int threads);

/// The backward's own gradient. With G = gg_points[j] - gg_centres[i] + s @ gg_cell per edge:
/// to grad_distance <G, v> / d, to grad_vector G, to distance -g_d <G, v> / d^2, to vector g_d G / d; 0 where d is 0.
void radius_graph_double_backward(DType dtype, const RadiusEdges& edges, int64_t num_points, const PointSet& centres,
                                  int64_t num_cells, const void* gg_points, const void* gg_centres, const void* gg_cell,
                                  void* to_grad_distance, void* to_grad_vector, void* to_distance, void* to_vector,
                                  int threads);

}  // namespace cpu

// The same on `device`, enqueued on `stream`; they return without waiting. What the CPU throws for, a kernel can only
// report: a bad point, graph or cell has no edges, and a bit of `errors` (common/device_errors.hpp) is set.
namespace cuda {

/// Bytes of the workspace, aligned to 16, that a search fills and the fill after it reads. They depend on sizes alone.
/// Throws like the CPU for what needs no look at values.
int64_t radius_graph_workspace(DType dtype, const PointSet& points, const PointSet& centres,
                               const Periodicity& periodic, const RadiusOptions& options);

/// Writes num_neighbors, truncated and num_edges of `out`, and nothing else of it.
void radius_graph_search(DType dtype, const PointSet& points, const PointSet& centres, const Periodicity& periodic,
                         const RadiusOptions& options, const RadiusOutputs& out, void* workspace, unsigned* errors,
                         int device, void* stream);

/// Whether the fill wants `keys` of 8 * (capacity + 32) bytes.
bool radius_graph_wants_keys(const RadiusOptions& options);

/// The edges and `overflow`, with the arguments of the search.
void radius_graph_fill(DType dtype, const PointSet& points, const PointSet& centres, const Periodicity& periodic,
                       const RadiusOptions& options, const RadiusOutputs& out, void* workspace, void* keys,
                       unsigned* errors, int device, void* stream);

/// Fewer than 2^31 edges, sorted by centre; of others, and of those with bad ids, it says so (kUnsortedEdges).
int64_t radius_graph_backward_workspace(int64_t edges, int64_t num_points, int64_t num_centres, bool has_cell,
                                        int64_t num_cells);
void radius_graph_backward(DType dtype, const RadiusEdges& edges, int64_t num_points, const PointSet& centres,
                           int64_t num_cells, void* grad_points, void* grad_centres, void* grad_cell, void* workspace,
                           unsigned* errors, int device, void* stream);

void radius_graph_double_backward(DType dtype, const RadiusEdges& edges, int64_t num_points, const PointSet& centres,
                                  int64_t num_cells, const void* gg_points, const void* gg_centres, const void* gg_cell,
                                  void* to_grad_distance, void* to_grad_vector, void* to_distance, void* to_vector,
                                  unsigned* errors, int device, void* stream);

}  // namespace cuda
}  // namespace moeyard
