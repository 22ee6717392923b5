#include <algorithm>
#include <atomic>
#include <vector>

#include "common/check.hpp"
#include "common/parallel.hpp"
#include "radius_graph/edge_gradient.hpp"
#include "radius_graph/graphs.hpp"
#include "radius_graph/radius_graph.hpp"

namespace moeyard::cpu {
namespace {

constexpr int64_t kEdgeGrain = 1 << 13;

int64_t used(const RadiusEdges& e) { return std::clamp<int64_t>(*e.num_edges, 0, e.capacity); }

void check_ids(const int64_t* ids, int64_t edges, int64_t nodes, const char* role, int threads) {
  std::atomic<bool> all{true};
  parallel_for(edges, kEdgeGrain, threads, [&](int64_t begin, int64_t end) {
    bool fine = true;
    for (int64_t e = begin; e < end; ++e) fine &= uint64_t(ids[e]) < uint64_t(nodes);
    if (!fine) all = false;
  });
  for (int64_t e = 0; !all && e < edges; ++e)
    if (ids[e] < 0 || ids[e] >= nodes)
      fail_value("edge_index: expected ", role, " ids below ", nodes, ", got ", ids[e], " at edge ", e);
}

/// Makes graph_of() safe: the forward has checked its own arguments, but anyone can call the op below autograd.
void check_graphs(const PointSet& centres) { graph_runs(centres, {"centres", "batch_centres", "ptr_centres"}); }

template <class T>
void add(T* sum, const Vec3<T>& y) {
  sum[0] += y.x, sum[1] += y.y, sum[2] += y.z;
}

/// What edges give to the points [j_begin, j_end) and the centres [i_begin, i_end).
template <class T>
struct GradientShare {
  int64_t j_begin, j_end, i_begin, i_end;
  T *of_points, *of_centres;
  double* cell_part;  // of every centre; null without a cell

  void add_edges(const RadiusEdges& edges, int64_t count) const {
    for (int64_t e = 0; e < count; ++e) {
      const int64_t i = edges.centre[e], j = edges.neighbour[e];
      const bool point = j >= j_begin && j < j_end, centre = i >= i_begin && i < i_end;
      if (!point && !centre) continue;
      const Vec3<T> y = edge_gradient<T>(edges, e);
      if (point) add(of_points + 3 * j, y);
      if (!centre) continue;
      add(of_centres + 3 * i, y);
      if (cell_part) add_outer(edges.cell_shift + 3 * e, y, cell_part + 9 * i);
    }
  }
};

template <class T>
void backward(const RadiusEdges& edges, int64_t num_points, const PointSet& centres, int64_t num_cells, T* grad_points,
              T* grad_centres, T* grad_cell, int threads) {
  const int64_t count = used(edges);
  check_ids(edges.neighbour, count, num_points, "neighbour", threads);
  check_ids(edges.centre, count, centres.count, "centre", threads);
  std::vector<double> cell_part(grad_cell ? size_t(9 * centres.count) : 0, 0.0);
  std::vector<T> of_centres(size_t(3 * centres.count), T(0));
  std::fill_n(grad_points, 3 * num_points, T(0));

  // Every thread owns a share of the nodes and goes through all edges: each sum is in edge order, however many shares
  // there are, and no edge has to be sorted by its neighbour.
  const int64_t shares = count > kEdgeGrain ? std::clamp(threads, 1, 8) : 1;
  parallel_for(shares, 1, threads, [&](int64_t k, int64_t) {
    GradientShare<T>{num_points * k / shares,
                     num_points * (k + 1) / shares,
                     centres.count * k / shares,
                     centres.count * (k + 1) / shares,
                     grad_points,
                     of_centres.data(),
                     grad_cell ? cell_part.data() : nullptr}
        .add_edges(edges, count);
  });
  T* out = grad_centres ? grad_centres : grad_points;
  if (grad_centres) std::fill_n(grad_centres, 3 * centres.count, T(0));
  for (int64_t c = 0; c < 3 * centres.count; ++c) out[c] -= of_centres[size_t(c)];
  if (!grad_cell) return;
  check_graphs(centres);
  std::vector<double> total(size_t(9 * (num_cells < 0 ? 1 : num_cells)), 0.0);
  for (int64_t i = 0; i < centres.count; ++i) {
    const int64_t g = num_cells < 0 ? 0 : graph_of(centres, i);
    if (num_cells >= 0 && g >= num_cells) continue;  // a graph without edges may lie beyond the cells
    for (int k = 0; k < 9; ++k) total[size_t(9 * g + k)] += cell_part[size_t(9 * i + k)];
  }
  std::copy(total.begin(), total.end(), grad_cell);
}

/// Gradients with respect to the inputs of edge_gradient, given that with respect to its result.
template <class T>
struct EdgeDouble {
  const RadiusEdges& edges;
  T *to_grad_distance, *to_grad_vector, *to_distance, *to_vector;

  void operator()(int64_t e, const Vec3<T>& g) const {
    const T d = static_cast<const T*>(edges.distance)[e];
    const T g_d = edges.grad_distance ? static_cast<const T*>(edges.grad_distance)[e] : T(0);
    const T* v = static_cast<const T*>(edges.vector) + 3 * e;
    const T inverse = d > 0 ? 1 / d : T(0);
    const T along = ((g.x * v[0] + g.y * v[1]) + g.z * v[2]) * inverse;
    to_grad_distance[e] = along;
    to_distance[e] = -(g_d * inverse) * along;
    const T component[3] = {g.x, g.y, g.z};
    for (int c = 0; c < 3; ++c) {
      to_grad_vector[3 * e + c] = component[c];
      to_vector[3 * e + c] = (g_d * inverse) * component[c];
    }
  }
};

template <class T>
void double_backward(const EdgeDouble<T>& edge, int64_t num_points, const PointSet& centres, int64_t num_cells,
                     const T* gg_points, const T* gg_centres, const T* gg_cell, int threads) {
  const RadiusEdges& edges = edge.edges;
  if (!gg_centres) gg_centres = gg_points;
  if (gg_cell) check_graphs(centres);
  parallel_for(edges.capacity, kEdgeGrain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      if (e >= used(edges)) {
        edge.to_grad_distance[e] = edge.to_distance[e] = T(0);
        for (int c = 0; c < 3; ++c) edge.to_grad_vector[3 * e + c] = edge.to_vector[3 * e + c] = T(0);
        continue;
      }
      const int64_t i = edges.centre[e], j = edges.neighbour[e];
      if (i < 0 || i >= centres.count || j < 0 || j >= num_points)
        fail_value("edge_index: expected ids of nodes, got ", i, " and ", j, " at edge ", e);
      T g[3];
      for (int c = 0; c < 3; ++c) g[c] = gg_points[3 * j + c] - gg_centres[3 * i + c];
      if (gg_cell) {
        const int64_t graph = num_cells < 0 ? 0 : graph_of(centres, i);
        if (num_cells >= 0 && graph >= num_cells)
          fail_value("cell_shape: expected a cell for every graph, got ", num_cells, " cells for graph id ", graph);
        const T* cell = gg_cell + 9 * graph;
        for (int k = 0; k < 3; ++k)
          for (int c = 0; c < 3; ++c) g[c] += T(edges.cell_shift[3 * e + k]) * cell[3 * k + c];
      }
      edge(e, {g[0], g[1], g[2]});
    }
  });
}

template <class T>
T* as(void* p) {
  return static_cast<T*>(p);
}
template <class T>
const T* as(const void* p) {
  return static_cast<const T*>(p);
}

}  // namespace

void radius_graph_backward(DType dtype, const RadiusEdges& edges, int64_t num_points, const PointSet& centres,
                           int64_t num_cells, void* grad_points, void* grad_centres, void* grad_cell, int threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    backward<T>(edges, num_points, centres, num_cells, as<T>(grad_points), as<T>(grad_centres), as<T>(grad_cell),
                threads);
  };
  dtype == DType::f64 ? run(double{}) : run(float{});
}

void radius_graph_double_backward(DType dtype, const RadiusEdges& edges, int64_t num_points, const PointSet& centres,
                                  int64_t num_cells, const void* gg_points, const void* gg_centres, const void* gg_cell,
                                  void* to_grad_distance, void* to_grad_vector, void* to_distance, void* to_vector,
                                  int threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const EdgeDouble<T> edge{edges, as<T>(to_grad_distance), as<T>(to_grad_vector), as<T>(to_distance),
                             as<T>(to_vector)};
    double_backward<T>(edge, num_points, centres, num_cells, as<T>(gg_points), as<T>(gg_centres), as<T>(gg_cell),
                       threads);
  };
  dtype == DType::f64 ? run(double{}) : run(float{});
}

}  // namespace moeyard::cpu
