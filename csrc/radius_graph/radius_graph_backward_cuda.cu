// Gradients of radius_graph on CUDA. A thread per node adds up its edges in their order, as the CPU does: those that it
// is the centre of lie in a row, those that it is the neighbour of are brought together by a stable sort.
#include <algorithm>

#include "common/digit_sort.cuh"
#include "common/workspace.hpp"
#include "radius_graph/call.cuh"
#include "radius_graph/edge_gradient.hpp"

namespace moeyard::cuda {
namespace {

constexpr int kCellSums = 9;
constexpr int64_t kMostStripsOfCentres = 512;

// ---- edges ----------------------------------------------------------------------------------------------------------

/// The edges that count; a bad one has a bit of `errors` set and is left out.
struct Edges {
  RadiusEdges e;
  int64_t num_points, num_centres;

  __device__ int64_t count() const { return min(max(*e.num_edges, int64_t(0)), e.capacity); }
  __device__ bool good(int64_t edge) const {
    return uint64_t(e.neighbour[edge]) < uint64_t(num_points) && uint64_t(e.centre[edge]) < uint64_t(num_centres);
  }
};

struct ByNeighbour {
  Edges edges;
  __device__ int64_t operator()(int64_t edge) const {
    return edge < edges.count() && edges.good(edge) ? edges.e.neighbour[edge] : -1;
  }
};

__global__ void __launch_bounds__(kThreads) check_edges_kernel(Edges edges, unsigned* errors) {
  const int64_t e = thread_number();
  if (e >= edges.count()) return;
  const bool sorted = e == 0 || edges.e.centre[e - 1] <= edges.e.centre[e];
  if (!sorted || !edges.good(e)) atomicOr(errors, unsigned(kUnsortedEdges));
}

/// Where each node's edges start: start[nodes + 1], at first all `count`.
template <class Count>
__global__ void __launch_bounds__(kThreads) clear_starts_kernel(int64_t* start, int64_t nodes, Count count) {
  if (thread_number() <= nodes) start[thread_number()] = count();
}
struct CountedEdges {
  Edges edges;
  __device__ int64_t operator()() const { return edges.count(); }
  __device__ int64_t node(int64_t i) const { return edges.e.centre[i]; }
};
struct ListedEdges {
  SortPass<ByNeighbour> sorted;
  __device__ int64_t operator()() const { return *sorted.listed; }
  __device__ int64_t node(int64_t i) const { return sorted.keys(sorted.list[i]); }
};

/// The i-th edge of a list in the order of nodes writes the starts of all nodes from that of the edge before on. Of
/// edges in no order several write the same start: any will do, as they are no graph.
template <class List>
__global__ void __launch_bounds__(kThreads) find_starts_kernel(List list, int64_t nodes, int64_t* start) {
  const int64_t i = thread_number();
  if (i >= list()) return;
  const int64_t node = min(list.node(i), nodes - 1), before = i == 0 ? -1 : list.node(i - 1);
  for (int64_t n = max(before, int64_t(-1)) + 1; n <= node; ++n) start[n] = i;
}

// ---- first order ----------------------------------------------------------------------------------------------------

template <class T>
__device__ void add(Vec3<T>& sum, const Vec3<T>& y) {
  sum.x += y.x, sum.y += y.y, sum.z += y.z;
}

template <class T>
__device__ void store(T* to, const Vec3<T>& v) {
  to[0] = v.x, to[1] = v.y, to[2] = v.z;
}

template <class T>
struct Gradients {
  Edges edges;
  SortPass<ByNeighbour> by_neighbour;
  const int64_t *first_as_neighbour, *first_as_centre;  // [points + 1], [centres + 1]
  T *of_points, *of_centres;                            // of_centres null: added to of_points
  double* cell_part;                                    // [centres, 9]; null without a cell

  __device__ Vec3<T> as_neighbour(int64_t j) const {
    Vec3<T> sum{0, 0, 0};
    for (int64_t i = first_as_neighbour[j]; i < first_as_neighbour[j + 1]; ++i)
      add(sum, edge_gradient<T>(edges.e, by_neighbour.list[i]));
    return sum;
  }
  __device__ Vec3<T> as_centre(int64_t i) const {
    Vec3<T> sum{0, 0, 0};
    double part[kCellSums] = {};
    for (int64_t e = first_as_centre[i]; e < first_as_centre[i + 1]; ++e) {
      if (!edges.good(e)) continue;
      const Vec3<T> y = edge_gradient<T>(edges.e, e);
      add(sum, y);
      if (cell_part) add_outer(edges.e.cell_shift + 3 * e, y, part);
    }
    for (int k = 0; cell_part && k < kCellSums; ++k) cell_part[kCellSums * i + k] = part[k];
    return sum;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) points_gradient_kernel(Gradients<T> g) {
  const int64_t j = thread_number();
  if (j >= g.edges.num_points) return;
  Vec3<T> sum = g.as_neighbour(j);
  if (!g.of_centres) {
    const Vec3<T> own = g.as_centre(j);
    sum = {sum.x - own.x, sum.y - own.y, sum.z - own.z};
  }
  store(g.of_points + 3 * j, sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads) centres_gradient_kernel(Gradients<T> g) {
  const int64_t i = thread_number();
  if (i >= g.edges.num_centres) return;
  const Vec3<T> own = g.as_centre(i);
  store(g.of_centres + 3 * i, Vec3<T>{T(0) - own.x, T(0) - own.y, T(0) - own.z});
}

/// What the centres of a cell's graphs add up to, a strip of them per block: one cell for all, or the graph of its
/// number.
__global__ void __launch_bounds__(kThreads)
    cell_strips_kernel(PointSet centres, bool one, const double* part, double* strips) {
  CU_SHARED(double, sums, [kThreads]);
  const Range all{0, int32_t(centres.count)}, rows = one ? all : rows_of(centres, blockIdx.x);
  const int64_t length = (rows.size() + gridDim.y - 1) / gridDim.y;
  const int64_t begin = rows.begin + blockIdx.y * length, end = min(begin + length, int64_t(rows.end));
  for (int k = 0; k < kCellSums; ++k) {
    double sum = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) sum += part[kCellSums * i + k];
    sums[threadIdx.x] = sum;
    for (int half = kThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (int(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) strips[(int64_t(blockIdx.x) * gridDim.y + blockIdx.y) * kCellSums + k] = sums[0];
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    cells_gradient_kernel(const double* strips, int64_t cells, int64_t per_cell, T* grad_cell) {
  const int64_t at = thread_number(), cell = at / kCellSums, k = at % kCellSums;
  if (cell >= cells) return;
  double sum = 0;
  for (int64_t s = 0; s < per_cell; ++s) sum += strips[(cell * per_cell + s) * kCellSums + k];
  grad_cell[at] = T(sum);
}

// ---- second order ---------------------------------------------------------------------------------------------------

template <class T>
struct DoubleGradients {
  Edges edges;
  PointSet centres;
  int64_t num_cells;
  const T *gg_points, *gg_centres, *gg_cell;  // gg_cell null without a cell
  T *to_grad_distance, *to_grad_vector, *to_distance, *to_vector;
  unsigned* errors;

  /// What comes in for an edge's vector; zero for edges that do not count.
  __device__ Vec3<T> incoming(int64_t e) const {
    if (e >= edges.count()) return {0, 0, 0};
    if (!edges.good(e)) return atomicOr(errors, unsigned(kUnsortedEdges)), Vec3<T>{0, 0, 0};
    const int64_t i = edges.e.centre[e], j = edges.e.neighbour[e];
    T g[3];
    for (int c = 0; c < 3; ++c) g[c] = gg_points[3 * j + c] - gg_centres[3 * i + c];
    if (gg_cell) {
      const int64_t graph = num_cells < 0 ? 0 : graph_of(centres, i);
      if (num_cells >= 0 && uint64_t(graph) >= uint64_t(num_cells))
        return atomicOr(errors, unsigned(kBadCell)), Vec3<T>{0, 0, 0};
      for (int k = 0; k < 3; ++k)
        for (int c = 0; c < 3; ++c) g[c] += T(edges.e.cell_shift[3 * e + k]) * gg_cell[9 * graph + 3 * k + c];
    }
    return {g[0], g[1], g[2]};
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) double_backward_kernel(DoubleGradients<T> d) {
  const int64_t e = thread_number();
  const RadiusEdges& edges = d.edges.e;
  if (e >= edges.capacity) return;
  const bool counts = e < d.edges.count();
  const Vec3<T> g = d.incoming(e);
  const T length = static_cast<const T*>(edges.distance)[e], inverse = counts && length > 0 ? 1 / length : T(0);
  const T g_d = edges.grad_distance ? static_cast<const T*>(edges.grad_distance)[e] : T(0);
  const T* const v = static_cast<const T*>(edges.vector) + 3 * e;
  const T along = counts ? ((g.x * v[0] + g.y * v[1]) + g.z * v[2]) * inverse : T(0);
  const T scale = counts ? g_d * inverse : T(0);
  d.to_grad_distance[e] = along;
  d.to_distance[e] = counts ? -scale * along : T(0);
  store(d.to_grad_vector + 3 * e, g);
  store(d.to_vector + 3 * e, Vec3<T>{scale * g.x, scale * g.y, scale * g.z});
}

// ---- launcher ---------------------------------------------------------------------------------------------------

// How a backward pass is worked on, and where in the workspace what lies.
struct Work {
  SortShape shape;
  SortRoom room;
  int64_t *first_as_neighbour, *first_as_centre;
  int64_t cells, strips_per_cell;
  double *cell_part, *strips;

  Work(int64_t edges, int64_t num_points, int64_t num_centres, bool has_cell, int64_t num_cells, Workspace& w)
      : shape(edges, std::max<int64_t>(num_points - 1, 0)), room(shape, true, w) {
    first_as_neighbour = w.take<int64_t>(num_points + 1), first_as_centre = w.take<int64_t>(num_centres + 1);
    cells = !has_cell ? 0 : num_cells < 0 ? 1 : num_cells;
    strips_per_cell = num_cells < 0 ? std::clamp<int64_t>(num_centres / kThreads, 1, kMostStripsOfCentres) : 1;
    cell_part = has_cell ? w.take<double>(kCellSums * num_centres) : nullptr;
    strips = w.take<double>(kCellSums * cells * strips_per_cell);
  }
};

template <class List>
void find_starts(const List& list, int64_t edges, int64_t nodes, int64_t* start, Stream stream) {
  const dim3 block(kThreads);
  cu_launch(clear_starts_kernel<List>, grid_of(nodes + 1), block, 0, stream, start, nodes, list);
  cu_launch(find_starts_kernel<List>, grid_of(edges), block, 0, stream, list, nodes, start);
}

template <class T>
void backward(const Edges& edges, const PointSet& centres, int64_t num_cells, const Work& w, T* grad_points,
              T* grad_centres, T* grad_cell, unsigned* errors, Stream stream) {
  const dim3 block(kThreads), over_edges = grid_of(edges.e.capacity);
  cu_launch(check_edges_kernel, over_edges, block, 0, stream, edges, errors);
  const SortPass<ByNeighbour> sorted = sort_items(ByNeighbour{edges}, w.shape, w.room, NoSide{}, stream);
  find_starts(ListedEdges{sorted}, edges.e.capacity, edges.num_points, w.first_as_neighbour, stream);
  find_starts(CountedEdges{edges}, edges.e.capacity, edges.num_centres, w.first_as_centre, stream);
  const Gradients<T> g{edges, sorted, w.first_as_neighbour, w.first_as_centre, grad_points, grad_centres, w.cell_part};
  cu_launch(points_gradient_kernel<T>, grid_of(edges.num_points), block, 0, stream, g);
  if (grad_centres) cu_launch(centres_gradient_kernel<T>, grid_of(edges.num_centres), block, 0, stream, g);
  if (w.cells == 0) return;
  cu_launch(cell_strips_kernel, dim3(unsigned(w.cells), unsigned(w.strips_per_cell)), block, 0, stream, centres,
            num_cells < 0, w.cell_part, w.strips);
  cu_launch(cells_gradient_kernel<T>, grid_of(kCellSums * w.cells), block, 0, stream, w.strips, w.cells,
            w.strips_per_cell, grad_cell);
}

}  // namespace

int64_t radius_graph_backward_workspace(int64_t edges, int64_t num_points, int64_t num_centres, bool has_cell,
                                        int64_t num_cells) {
  Workspace w(nullptr);
  Work(edges, num_points, num_centres, has_cell, num_cells, w);
  return w.bytes();
}

void radius_graph_backward(DType dtype, const RadiusEdges& edges, int64_t num_points, const PointSet& centres,
                           int64_t num_cells, void* grad_points, void* grad_centres, void* grad_cell, void* workspace,
                           unsigned* errors, int device, void* stream) {
  const LaunchScope scope("moeyard::radius_graph_backward", device);
  Workspace parts(workspace);
  const Work work(edges.capacity, num_points, centres.count, grad_cell, num_cells, parts);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    backward(Edges{edges, num_points, centres.count}, centres, num_cells, work, static_cast<T*>(grad_points),
             static_cast<T*>(grad_centres), static_cast<T*>(grad_cell), errors, static_cast<Stream>(stream));
  });
}

void radius_graph_double_backward(DType dtype, const RadiusEdges& edges, int64_t num_points, const PointSet& centres,
                                  int64_t num_cells, const void* gg_points, const void* gg_centres, const void* gg_cell,
                                  void* to_grad_distance, void* to_grad_vector, void* to_distance, void* to_vector,
                                  unsigned* errors, int device, void* stream) {
  const LaunchScope scope("moeyard::radius_graph_double_backward", device);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const DoubleGradients<T> d{Edges{edges, num_points, centres.count},
                               centres,
                               num_cells,
                               static_cast<const T*>(gg_points),
                               static_cast<const T*>(gg_centres ? gg_centres : gg_points),
                               static_cast<const T*>(gg_cell),
                               static_cast<T*>(to_grad_distance),
                               static_cast<T*>(to_grad_vector),
                               static_cast<T*>(to_distance),
                               static_cast<T*>(to_vector),
                               errors};
    cu_launch(double_backward_kernel<T>, grid_of(edges.capacity), dim3(kThreads), 0, static_cast<Stream>(stream), d);
  });
}

}  // namespace moeyard::cuda
