// The search in one graph: which structure proposes candidates, what the edge test leaves, what a cap keeps.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/check.hpp"
#include "common/parallel.hpp"
#include "radius_graph/geometry.hpp"
#include "radius_graph/graphs.hpp"
#include "radius_graph/grid.hpp"
#include "radius_graph/hit_store.hpp"
#include "radius_graph/kd_tree.hpp"
#include "radius_graph/lattice.hpp"
#include "radius_graph/order.hpp"
#include "radius_graph/scan.hpp"

namespace moeyard::cpu {

/// What all graphs of a call share.
template <class T>
struct SearchCall {
  Pairs<T> pairs;
  T r2;
  RadiusOptions options;
  Periodicity periodic;
  Scan<T> scan;
  Order order;
  HitStore& store;
  std::atomic<int64_t>& truncated;
};

/// One thread's scratch memory.
template <class T>
struct Worker {
  explicit Worker(HitStore& store) : writer(store) {}
  Columns<T> block;
  Buffer<int32_t> hits;
  std::vector<int32_t> ids;
  std::vector<Ranked<T>> ranked;
  HitWriter writer;
};

/// Calls body(worker, begin, end) over [0, n), in pieces of `grain` with a worker each; one thread does all with one.
template <class T, class Body>
void share(HitStore& store, Worker<T>& worker, int64_t n, int64_t grain, int threads, Body&& body) {
  if (threads <= 1) return body(worker, 0, n);
  parallel_for(n, grain, threads, [&](int64_t begin, int64_t end) {
    Worker<T> own(store);
    body(own, begin, end);
  });
}

template <class T>
class GraphSearch {
 public:
  GraphSearch(const SearchCall<T>& call, const Graph& graph) : call_(call), graph_(graph) {
    if (!call.periodic.cell) return;
    lattice_ = make_lattice<T>(call.periodic, graph.id);
    cell_ = static_cast<const T*>(call.periodic.cell) + (call.periodic.num_cells < 0 ? 0 : 9 * graph.id);
  }

  void run(Worker<T>& worker, int threads) {
    points_ = {call_.pairs.points + 3 * graph_.begin, graph_.end - graph_.begin};
    centres_ = {call_.pairs.centres + 3 * graph_.centre_begin, graph_.centre_end - graph_.centre_begin};
    if (cell_ && lattice_.any()) return run_periodic(worker, threads);
    if (call_.options.k > 0) {
      nearest(worker, threads, std::nullopt);
    } else {
      within(worker, std::sqrt(double(call_.r2)), call_.r2, threads);
    }
  }

 private:
  // Up to this many pairs, comparing all beats any structure: 96 points against each other.
  static constexpr double kBruteForcePairs = 96 * 96;
  // A leaf with a wide box (an outlier among its points) proposes too much: then each centre asks for itself.
  static constexpr int64_t kMaxLeafBlock = 4096;
  static constexpr int64_t kPieces = 256, kPiecePoints = 512;

  bool same() const { return call_.pairs.same; }

  // ---- all within a radius: `radius` and `r2` include the slack of image coordinates -----------------------------

  void within(Worker<T>& worker, double radius, T r2, int threads) {
    reach2_ = r2;
    if (double(points_.n) * double(centres_.n) <= kBruteForcePairs) return by_brute_force(worker);
    if (const auto grid = Grid<T>::fit(points_, radius, threads)) return by_grid(*grid, worker, threads);
    by_tree(worker, threads);
  }

  void by_brute_force(Worker<T>& worker) {
    // Candidates in order of their indices give hits in order: where nothing is to be selected, they are final.
    const bool final = !cell_ && !call_.options.half && call_.options.max_neighbors < 1;
    const int64_t base = final ? graph_.begin : 0;
    worker.block.n = 0;
    worker.block.reserve(points_.n);
    worker.block.n = points_.n;
    for (int64_t j = 0; j < points_.n; ++j) worker.block.set(j, points_.xyz + 3 * j, base + j);
    worker.block.pad();
    if (!final) return scan_all(worker, centres_.n, true, [&](int64_t i) { return home(i); });
    const bool skip_self = self(0) >= 0;
    for (int64_t i = 0; i < centres_.n; ++i) {
      int32_t* out = worker.writer.room(points_.n);
      const int32_t me = skip_self ? int32_t(base + i) : -1;
      worker.writer.keep(graph_.centre_begin + i, call_.scan(worker.block, centres_.xyz + 3 * i, reach2_, me, out));
    }
  }

  void by_grid(const Grid<T>& grid, Worker<T>& own, int threads) {
    const Bins<T> bins = grid.bin(points_, threads);
    const Bins<T> others = own_structure() ? Bins<T>{} : grid.bin(centres_, threads);
    const Bins<T>& homes = own_structure() ? bins : others;
    if (crowded(grid, bins)) return nearest_within(KdTree<T>(points_), own, threads);
    const int64_t piece = grid.cells() * std::max(centres_.n / kPieces, kPiecePoints) / centres_.n + 1;
    share(call_.store, own, grid.cells(), piece, threads, [&](Worker<T>& worker, int64_t begin, int64_t end) {
      for (int64_t cell = begin; cell < end; ++cell) {
        const int32_t first = homes.begin(cell), last = homes.end(cell);
        if (first == last) continue;
        grid.collect(bins, cell, worker.block);
        scan_all(worker, last - first, false, [&](int64_t k) { return home(homes.points, first + k); });
      }
    });
  }

  void by_tree(Worker<T>& own, int threads) {
    const KdTree<T> tree(points_);
    if (call_.options.max_neighbors > 0) return nearest_within(tree, own, threads);
    const KdTree<T> others(own_structure() ? View<T>{nullptr, 0} : centres_);
    const KdTree<T>& homes = own_structure() ? tree : others;
    const auto leaves = int64_t(homes.leaves().size());
    const int64_t piece = std::max(leaves / kPieces, kPiecePoints / 16);
    share(call_.store, own, leaves, piece, threads, [&](Worker<T>& worker, int64_t begin, int64_t end) {
      for (int64_t l = begin; l < end; ++l) {
        const auto& leaf = homes.node(homes.leaves()[size_t(l)]);
        const bool together = tree.collect(leaf.box, reach2_, kMaxLeafBlock, worker.block);
        if (together) {
          scan_all(worker, leaf.end - leaf.begin, false,
                   [&](int64_t k) { return home(homes.points(), leaf.begin + k); });
          continue;
        }
        for (int64_t k = leaf.begin; k < leaf.end; ++k) {
          const Home one = home(homes.points(), k);
          tree.collect(box_of(one.xyz), reach2_, points_.n, worker.block);
          scan_all(worker, 1, false, [&](int64_t) { return one; });
        }
      }
    });
  }

  // Whether a centre meets so many more points than it may keep that finding the nearest in a tree costs less.
  bool crowded(const Grid<T>& grid, const Bins<T>& bins) const {
    if (call_.options.max_neighbors < 1) return false;
    double squares = 0;
    for (int64_t cell = 0; cell < grid.cells(); ++cell) {
      const double count = bins.end(cell) - bins.begin(cell);
      squares += count * count;
    }
    return squares > (8.0 * double(call_.options.max_neighbors) + 64) * double(bins.points.n);
  }

  bool own_structure() const { return same() && !wrapped_; }

  // ---- centres against their candidates --------------------------------------------------------------------------

  struct Home {
    int64_t i;
    T xyz[3];
  };

  Home home(int64_t i) const {
    const T* p = centres_.xyz + 3 * i;
    return {i, {p[0], p[1], p[2]}};
  }
  // Sorted points lie in the order in which they are asked for; the originals may lie anywhere.
  static Home home(const Columns<T>& sorted, int64_t k) {
    return {sorted.id[k], {sorted.x[k], sorted.y[k], sorted.z[k]}};
  }

  // Compares `count` centres with the block. A few centres at a time are scanned first and then settled, because a
  // list that was just written in pieces cannot be read in whole vectors yet without waiting for the store buffer.
  template <class HomeAt>
  void scan_all(Worker<T>& worker, int64_t count, bool sorted, HomeAt&& home_at) {
    constexpr int64_t kTogether = 8;
    const int64_t room = worker.block.n + kLanes + kOrderMargin;
    if (worker.hits.size() < (kTogether + 1) * room) worker.hits = Buffer<int32_t>(2 * (kTogether + 1) * room);
    for (int64_t begin = 0; begin < count; begin += kTogether) {
      struct Found {
        int64_t i, count;
        int32_t* ids;
      } found[kTogether];
      const int64_t homes = std::min(kTogether, count - begin);
      int32_t* at = worker.hits.data();
      for (int64_t h = 0; h < homes; ++h) {
        const Home home = home_at(begin + h);
        int64_t n = call_.scan(worker.block, home.xyz, reach2_, self(home.i), at);
        if (wrapped_) n = keep_exact(worker, home, at, n);
        found[h] = {home.i, n, at};
        at += n + kOrderMargin;
      }
      for (int64_t h = 0; h < homes; ++h) settle(worker, found[h].i, found[h].ids, found[h].count, sorted);
    }
  }

  // Image coordinates are rounded: the exact test decides, but only where a slightly smaller radius finds less.
  int64_t keep_exact(Worker<T>& worker, const Home& home, int32_t* ids, int64_t n) {
    if (call_.scan(worker.block, home.xyz, sure2_, self(home.i), ids + n + kOrderMargin) == n) return n;
    return std::remove_if(ids, ids + n, [&](int32_t id) { return !(exact(home.i, id) < call_.r2); }) - ids;
  }

  // What centre i keeps of its hits, in order.
  void settle(Worker<T>& worker, int64_t i, int32_t* ids, int64_t n, bool sorted) {
    const int64_t cap = call_.options.max_neighbors;
    if (cap > 0 && n > cap) {
      keep_nearest(worker, i, ids, n, cap);
      n = cap, sorted = false;
      call_.truncated.fetch_add(1, std::memory_order_relaxed);
    }
    if (!cell_ && !call_.options.half) {
      call_.order(ids, n, int32_t(graph_.begin), worker.writer.room(n));
      return worker.writer.keep(graph_.centre_begin + i, n);
    }
    if (!sorted) call_.order(ids, n, 0, ids);
    const int32_t* first = ids;
    if (call_.options.half)
      first = std::partition_point(ids, ids + n, [&](int32_t id) { return !first_of_pair(i, id); });
    commit(worker, i, first, ids + n - first);
  }

  void keep_nearest(Worker<T>& worker, int64_t i, int32_t* ids, int64_t n, int64_t cap) {
    worker.ranked.clear();
    for (int64_t k = 0; k < n; ++k) worker.ranked.emplace_back(exact(i, ids[k]), ids[k]);
    std::nth_element(worker.ranked.begin(), worker.ranked.begin() + cap, worker.ranked.end());
    for (int64_t k = 0; k < cap; ++k) ids[k] = worker.ranked[size_t(k)].second;
  }

  // Ids count the graph's points, or its images; images are sorted by (point, n), so ids sort like (neighbour, shift).
  int64_t neighbour(int32_t id) const { return graph_.begin + (wrapped_ ? images_.point[size_t(id)] : id); }

  Shift shift(int64_t i, int32_t id) const {
    if (!wrapped_) return {{0, 0, 0}};
    const Shift &n = images_.n[size_t(id)], &of_point = home_points().floor[size_t(images_.point[size_t(id)])],
                &of_centre = home_centres_.floor[size_t(i)];
    Shift s;
    for (int k = 0; k < 3; ++k) s.n[k] = n.n[k] - of_point.n[k] + of_centre.n[k];
    return s;
  }

  T exact(int64_t i, int32_t id) const {
    const int64_t centre = graph_.centre_begin + i;
    if (!wrapped_) return squared_norm(call_.pairs(centre, neighbour(id)));
    return squared_norm(call_.pairs(centre, neighbour(id), shift(i, id), cell_));
  }

  bool first_of_pair(int64_t i, int32_t id) const {
    const int64_t centre = graph_.centre_begin + i, other = neighbour(id);
    return centre < other || (centre == other && !negative(shift(i, id)));
  }

  // The id of (i, i, shift 0), which is no edge unless loops are wanted.
  int32_t self(int64_t i) const {
    if (!same() || call_.options.loop) return -1;
    return wrapped_ ? self_image_[size_t(i)] : int32_t(i);
  }

  void commit(Worker<T>& worker, int64_t i, const int32_t* ids, int64_t n) {
    int32_t* out = worker.writer.room(n);
    for (int64_t k = 0; k < n; ++k) {
      const int32_t id = ids[k];
      *out++ = int32_t(neighbour(id));
      if (!cell_) continue;
      const Shift s = shift(i, id);
      out = std::copy(s.n, s.n + 3, out);
    }
    worker.writer.keep(graph_.centre_begin + i, n);
  }

  // ---- the nearest of each centre --------------------------------------------------------------------------------

  // What a gap between image coordinates says about exact distances: nothing is lost in free space.
  T reach(T gap) const {
    if (!wrapped_) return gap;
    const double least = std::max(0.0, std::sqrt(double(gap)) * (1 - 1e-5) - images_.slack);
    return T(least * least * (1 - 1e-6));
  }

  // Calls finish(worker, i) for every open centre with its `count` nearest in worker.ranked, a heap.
  template <class Finish>
  void for_each_nearest(const KdTree<T>& tree, int64_t count, std::optional<T> limit, Worker<T>& own, int threads,
                        Finish&& finish) {
    const auto reach_of = [this](T gap) { return reach(gap); };
    const int64_t piece = std::max<int64_t>(centres_.n / kPieces, 64);
    share(call_.store, own, centres_.n, piece, threads, [&](Worker<T>& worker, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (!open_.empty() && !open_[size_t(i)]) continue;
        const auto exact_of = [&](int32_t id) { return exact(i, id); };
        NearestQuery<T, decltype(reach_of), decltype(exact_of)>(tree, centres_.xyz + 3 * i, self(i), count, limit,
                                                                reach_of, exact_of, worker.ranked);
        finish(worker, i);
      }
    });
  }

  void commit_ranked(Worker<T>& worker, int64_t i) {
    worker.ids.clear();
    for (const auto& found : worker.ranked) worker.ids.push_back(found.second);
    std::sort(worker.ids.begin(), worker.ids.end());
    commit(worker, i, worker.ids.data(), int64_t(worker.ids.size()));
  }

  // A cap on crowded neighbourhoods: asking for one more than the cap tells whether there are more.
  void nearest_within(const KdTree<T>& tree, Worker<T>& own, int threads) {
    const int64_t cap = call_.options.max_neighbors;
    for_each_nearest(tree, std::min(cap, points_.n) + 1, call_.r2, own, threads, [&](Worker<T>& worker, int64_t i) {
      if (int64_t(worker.ranked.size()) > cap) {
        std::pop_heap(worker.ranked.begin(), worker.ranked.end());
        worker.ranked.pop_back();
        call_.truncated.fetch_add(1, std::memory_order_relaxed);
      }
      commit_ranked(worker, i);
    });
  }

  // Centres that find k neighbours no further than `sure` are done; without `sure` every centre is.
  void nearest(Worker<T>& own, int threads, std::optional<T> sure) {
    const int64_t k = call_.options.k;
    for_each_nearest(KdTree<T>(points_), k, std::nullopt, own, threads, [&](Worker<T>& worker, int64_t i) {
      const auto& heap = worker.ranked;
      if (sure && (int64_t(heap.size()) < k || !(heap.front().first <= *sure))) return;
      if (!heap.empty() && !std::isfinite(heap.front().first))
        fail_value("pos: expected points whose squared distances are finite in their dtype, got too distant ones ",
                   "among the nearest of row ", graph_.centre_begin + i);
      commit_ranked(worker, i);
      if (!open_.empty()) open_[size_t(i)] = 0;
    });
  }

  // A radius that holds k neighbours at mean density. Along the shortest cell vector alone an atom meets two images of
  // itself per length, which bounds what can ever be needed.
  double first_radius(double& bound) const {
    bound = (0.5 * double(call_.options.k) + 1) * lattice_.shortest();
    double side = std::cbrt((double(call_.options.k) + 1) / double(centres_.n));  // roots first: a volume can underflow
    for (int k = 0; k < 3; ++k) {
      double low = home_centres_.fraction[size_t(k)], high = low;
      for (size_t i = size_t(k); i < home_centres_.fraction.size(); i += 3)
        low = std::min(low, home_centres_.fraction[i]), high = std::max(high, home_centres_.fraction[i]);
      side *= std::cbrt(lattice_.periodic[k] ? lattice_.spacing[k] : std::max(high - low, bound));
    }
    return std::min(bound, side);
  }

  void nearest_periodic(Worker<T>& worker, int threads) {
    double bound, radius = first_radius(bound);
    open_.assign(size_t(centres_.n), 1);
    for (;; radius = std::min(2 * radius, bound)) {
      use_images(radius);
      // The bound is a matter of mathematics; the edge test's own rounding comes on top.
      const T sure = T(radius >= bound ? std::numeric_limits<T>::infinity() : radius * radius);
      nearest(worker, threads, sure);
      if (std::find(open_.begin(), open_.end(), 1) == open_.end()) return;
    }
  }

  // ---- periodic graphs -------------------------------------------------------------------------------------------

  void run_periodic(Worker<T>& worker, int threads) {
    wrapped_ = true;
    const bool two_sets = !same();
    home_centres_ = wrap(lattice_, call_.pairs.centres, graph_.centre_begin, graph_.centre_end, two_sets ? "y" : "pos");
    if (two_sets) home_points_ = wrap(lattice_, call_.pairs.points, graph_.begin, graph_.end, "x");
    centre_xyz_.assign(home_centres_.home.begin(), home_centres_.home.end());
    centres_ = {centre_xyz_.data(), centres_.n};
    if (call_.options.k > 0) return nearest_periodic(worker, threads);
    const double radius = std::sqrt(double(call_.r2));
    use_images(radius);
    const double reach = radius * (1 + 1e-5) + images_.slack;
    const double sure = std::max(radius * (1 - 1e-5) - images_.slack, 0.0);
    sure2_ = T(sure * sure);
    within(worker, reach, T(reach * reach), threads);
  }

  const Wrapped& home_points() const { return same() ? home_centres_ : home_points_; }

  void use_images(double radius) {
    images_ = make_images<T>(lattice_, home_points(), home_centres_, radius);
    points_ = {images_.xyz.data(), int64_t(images_.point.size())};
    if (!same()) return;
    self_image_.assign(size_t(centres_.n), -1);
    for (int64_t id = 0; id < points_.n; ++id) {
      const Shift& n = images_.n[size_t(id)];
      if (!n.n[0] && !n.n[1] && !n.n[2]) self_image_[size_t(images_.point[size_t(id)])] = int32_t(id);
    }
  }

  const SearchCall<T>& call_;
  const Graph graph_;
  Lattice lattice_{};
  const T* cell_ = nullptr;
  View<T> points_{}, centres_{};
  T reach2_{}, sure2_{};  // squared distances of image coordinates: no edge beyond, nothing but edges below
  bool wrapped_ = false;
  Wrapped home_points_, home_centres_;
  std::vector<T> centre_xyz_;
  Images<T> images_{};
  std::vector<int32_t> self_image_;
  std::vector<char> open_;  // centres of a periodic k-nearest search that still lack neighbours
};

}  // namespace moeyard::cpu
