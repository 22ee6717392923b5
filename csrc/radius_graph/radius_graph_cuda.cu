// radius_graph on CUDA: counts of each centre's edges, prefix sums of them, and the edges in order. All edges in free
// space come from a grid of cells and a thread per centre (cells.cuh, rows.cuh); selections and periodic graphs from a
// tree over the points and a warp per centre (tree.cuh, hits.cuh, lists.cuh, search.cuh).
#include <algorithm>
#include <cmath>

#include "common/scan.cuh"
#include "common/workspace.hpp"
#include "radius_graph/check_request.hpp"
#include "radius_graph/rows.cuh"
#include "radius_graph/search.cuh"

namespace moeyard::cuda {
namespace {

constexpr int64_t kMostSearchBlocks = 1 << 20;
constexpr int64_t kSharedLists = 32 * 1024;           // bytes per block
constexpr int64_t kGlobalLists = int64_t(256) << 20;  // bytes of all
constexpr int64_t kManyPoints = 1 << 17;

// How a search is worked on, and where in the workspace what lies.
template <class T>
struct Work {
  int64_t num_points, num_centres, num_cells;
  bool same, selects, symmetric, by_cells;  // selects: by distance
  int graph_bits, axis_bits;
  SortShape order;
  int64_t list_room = 0, list_blocks = 0;
  Search<T> s;
  RowSearch<T> rows;  // by_cells: instead of s
  Ticket* tickets;
  unsigned* bucket_sums;
  Curve* curve;
  int64_t *keys, *sums;
  SortRoom sort_room;

  Work(const PointSet& points, const PointSet& centres, const Periodicity& periodic, const RadiusOptions& options,
       Workspace& w)
      : num_points(points.count),
        num_centres(centres.xyz ? centres.count : points.count),
        num_cells(count_cells(periodic)),
        same(!centres.xyz),
        selects(!radius_graph_wants_keys(options)),
        symmetric(options.symmetric && options.max_neighbors > 0),
        by_cells(options.k < 1 && options.max_neighbors < 1 && !periodic.cell),
        graph_bits(points.batch || points.ptr ? bits_of(num_points) : 0),
        axis_bits(options.k > 0              ? std::min(14, (62 - graph_bits) / 3)
                  : num_points < kManyPoints ? 7
                                             : 10),
        order(by_cells ? 0 : num_points, (int64_t(1) << (3 * axis_bits + graph_bits)) - 1),
        s{{}, {order.items, nullptr, w}, T(0), nullptr, nullptr, {}, nullptr, nullptr, 0},
        rows{{}, {num_points, options.r, by_cells, w}, T(0), nullptr, {}, nullptr, nullptr, nullptr, nullptr},
        tickets(w.take<Ticket>(by_cells ? num_points : 0)),
        bucket_sums(w.take<unsigned>(prefix_sums_workspace(by_cells ? rows.cells.buckets() : 0))),
        curve(w.take<Curve>(1)),
        keys(w.take<int64_t>(order.items)),
        sums(w.take<int64_t>(prefix_sums_workspace(num_centres))),
        sort_room(order, true, w) {
    const bool has_cell = periodic.cell;
    const auto side = [&](const PointSet& set, int64_t count) {
      T* const xyz = static_cast<T*>(const_cast<void*>(set.xyz));
      return Side<T>{set,
                     xyz,
                     w.take<Range>(count),
                     has_cell ? w.take<int32_t>(count) : nullptr,
                     has_cell ? w.take<T>(3 * count) : xyz,
                     has_cell ? w.take<Shift>(count) : nullptr};
    };
    Call<T>& call = s.call;
    call.points = side(points, num_points);
    call.centres = same ? call.points : side(centres, num_centres);
    call.pairs = {call.points.xyz, call.centres.xyz, same};
    call.periodic = periodic, call.options = options;
    call.cells = w.take<CellState>(num_cells);
    s.offsets = w.take<int64_t>(num_centres + 1);
    s.bounds = symmetric ? w.take<Bound<T>>(num_centres) : nullptr;
    s.tree.id = sort_room.list[(order.digits - 1) % 2];
    const T r = T(options.r);
    s.limit2 = options.k > 0 ? std::numeric_limits<T>::max() : std::nextafter(r * r, T(0));
    rows.call = call, rows.limit2 = s.limit2, rows.offsets = s.offsets;
    rows.rows = w.take<int32_t>(by_cells ? kRowLength * num_centres : 0);
    rows.long_rows = w.take<int32_t>(by_cells ? num_centres : 0), rows.num_long_rows = w.take<unsigned>(1);
    if (selects || symmetric) plan_lists(options.k > 0 ? options.k : options.max_neighbors, w);
  }

  dim3 search_grid() const {
    return dim3(unsigned(std::clamp<int64_t>((num_centres + kSearchWarps - 1) / kSearchWarps, 1, kMostSearchBlocks)));
  }
  dim3 row_grid(int64_t per_block) const {
    return dim3(unsigned(std::max<int64_t>(1, (num_centres + per_block - 1) / per_block)));
  }
  dim3 list_grid() const { return dim3(unsigned(std::clamp<int64_t>(list_blocks, 1, search_grid().x))); }
  size_t shared_lists() const { return s.lists || list_blocks == 0 ? 0 : size_t(block_bytes()); }

 private:
  static int64_t count_cells(const Periodicity& p) {
    if (!p.cell) return 0;
    if (p.num_cells >= 0 && p.num_pbc >= 0) return std::min(p.num_cells, p.num_pbc);
    return std::max({p.num_cells, p.num_pbc, int64_t(p.num_cells < 0 && p.num_pbc < 0)});
  }
  static int bits_of(int64_t n) {
    int bits = 0;
    while (n >> bits) ++bits;
    return bits;
  }
  int64_t block_bytes() const { return list_room * int64_t(sizeof(T) + sizeof(uint64_t)) * kSearchWarps; }
  void plan_lists(int64_t k, Workspace& w) {
    if (!s.call.periodic.cell) k = std::min(k, num_points);  // there are no more
    list_room = (k + std::max<int64_t>(32, k / 2) + 31) / 32 * 32;
    s.list_room = list_room;
    list_blocks = kMostSearchBlocks;
    if (block_bytes() <= kSharedLists) return;
    list_blocks = std::clamp<int64_t>(kGlobalLists / block_bytes(), 1, search_grid().x);
    s.lists = w.take<char>(list_blocks * block_bytes());
  }
};

template <class T>
void build_tree(const Work<T>& w, Stream stream) {
  const Call<T>& call = w.s.call;
  const T* const home = call.points.home;
  const dim3 block(kThreads);
  cu_launch(find_curve_kernel<T>, dim3(1), dim3(kSampleThreads), 0, stream, home, w.num_points, w.axis_bits, w.curve);
  cu_launch(find_keys_kernel<T>, grid_of(w.num_points), block, 0, stream, home, call.points.range, w.num_points,
            w.axis_bits, w.graph_bits, w.curve, w.keys);
  sort_items(StoredKeys{w.keys}, w.order, w.sort_room, NoSide{}, stream);
  const Tree<T>& tree = w.s.tree;
  cu_launch(place_points_kernel<T>, grid_of(w.num_points), block, 0, stream, tree, home);
  for (int level = 1; level < tree.shape.levels; ++level) {
    const int64_t below = tree.shape.count[level - 1];
    cu_launch(join_boxes_kernel<T>, grid_of(below), block, 0, stream, tree.boxes[level - 1], below, tree.boxes[level]);
  }
}

template <class T>
void prepare(const Side<T>& side, const Call<T>& call, Stream stream) {
  const PointSet& set = side.set;
  const dim3 block(kThreads);
  if (set.ptr) cu_launch(check_ptr_kernel, grid_of(set.num_graphs + 1), block, 0, stream, set, call.errors);
  cu_launch(find_graphs_kernel<T>, grid_of(set.count), block, 0, stream, side, call.points.set, call.periodic,
            call.errors);
  if (side.cell) cu_launch(wrap_kernel<T>, grid_of(set.count), block, 0, stream, side, call.cells, call.errors);
}

template <class T>
void count_edges(const Work<T>& w, Stream stream) {
  const Search<T>& s = w.s;
  const dim3 block(kSearchThreads);
  if (s.call.options.k > 0) {
    cu_launch(count_nearest_kernel<T>, grid_of(w.num_centres), dim3(kThreads), 0, stream, s);
    return;
  }
  Search<T> plain = s;
  plain.bounds = nullptr;
  cu_launch(count_edges_kernel<T>, w.search_grid(), block, 0, stream, plain);
  if (!s.bounds) return;
  cu_launch(bounds_kernel<T>, w.list_grid(), block, w.shared_lists(), stream, plain, s.bounds);
  cu_launch(count_edges_kernel<T>, w.search_grid(), block, 0, stream, s);
}

template <class T>
void find_rows(const Work<T>& w, Stream stream) {
  build_cells(w.rows.cells, w.rows.call.points, w.tickets, w.bucket_sums, stream);
  cu_launch(find_rows_kernel<T>, w.row_grid(kRowThreads), dim3(kRowThreads), 0, stream, w.rows);
}

template <class T>
void write_rows(const Work<T>& w, Stream stream) {
  const dim3 block(kRowThreads), all = w.row_grid(kRowWarps);
  cu_launch(write_rows_kernel<T>, all, block, 0, stream, w.rows);
  cu_launch(write_long_rows_kernel<T>, dim3(std::min<unsigned>(all.x, kLongRowBlocks)), block, 0, stream, w.rows);
}

template <class T>
void search(Work<T>& w, const RadiusOutputs& out, unsigned* errors, Stream stream) {
  Call<T>& call = w.s.call;
  call.errors = w.rows.call.errors = errors, w.s.out = w.rows.out = out;
  if (w.num_cells > 0)
    cu_launch(find_lattices_kernel<T>, grid_of(w.num_cells), dim3(kThreads), 0, stream, call, w.num_cells);
  prepare(call.points, call, stream);
  if (!w.same) prepare(call.centres, call, stream);
  cu_launch(begin_search_kernel, dim3(1), dim3(1), 0, stream, out, w.rows.num_long_rows);
  if (w.by_cells) {
    find_rows(w, stream);
  } else {
    build_tree(w, stream);
    count_edges(w, stream);
  }
  prefix_sums(Counts{out.num_neighbors}, Offsets{w.s.offsets, w.num_centres, out}, w.num_centres, w.sums, stream);
}

template <class T>
void fill(Work<T>& w, const RadiusOutputs& out, void* keys, unsigned* errors, Stream stream) {
  w.s.call.errors = w.rows.call.errors = errors, w.s.out = w.rows.out = out;
  w.s.keys = w.rows.keys = static_cast<uint64_t*>(keys);
  if (w.by_cells)
    write_rows(w, stream);
  else if (w.selects)
    cu_launch(nearest_edges_kernel<T>, w.list_grid(), dim3(kSearchThreads), w.shared_lists(), stream, w.s);
  else
    cu_launch(all_edges_kernel<T>, w.search_grid(), dim3(kSearchThreads), 0, stream, w.s);
  const int64_t blocks = std::clamp<int64_t>((out.capacity + kThreads - 1) / kThreads, 1, 1 << 14);
  cu_launch(pad_edges_kernel<T>, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, out);
}

}  // namespace

int64_t radius_graph_workspace(DType dtype, const PointSet& points, const PointSet& centres,
                               const Periodicity& periodic, const RadiusOptions& options) {
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    check_request<T>(points, centres, periodic, options);
    Workspace w(nullptr);
    Work<T>(points, centres, periodic, options, w);
    return w.bytes();
  });
}

void radius_graph_search(DType dtype, const PointSet& points, const PointSet& centres, const Periodicity& periodic,
                         const RadiusOptions& options, const RadiusOutputs& out, void* workspace, unsigned* errors,
                         int device, void* stream) {
  const LaunchScope scope("moeyard::radius_graph_search", device);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    Workspace parts(workspace);
    Work<T> work(points, centres, periodic, options, parts);
    search(work, out, errors, static_cast<Stream>(stream));
  });
}

bool radius_graph_wants_keys(const RadiusOptions& options) {
  return options.k < 1 && (options.max_neighbors < 1 || options.symmetric);
}

void radius_graph_fill(DType dtype, const PointSet& points, const PointSet& centres, const Periodicity& periodic,
                       const RadiusOptions& options, const RadiusOutputs& out, void* workspace, void* keys,
                       unsigned* errors, int device, void* stream) {
  const LaunchScope scope("moeyard::radius_graph_fill", device);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    Workspace parts(workspace);
    Work<T> work(points, centres, periodic, options, parts);
    fill(work, out, keys, errors, static_cast<Stream>(stream));
  });
}

}  // namespace moeyard::cuda
