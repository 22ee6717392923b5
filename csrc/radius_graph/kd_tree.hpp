// A balanced k-d tree (Bentley 1975) with bounding boxes: candidates for graphs too sparse or too uneven for a dense
// grid, and the k nearest. Its cost depends on counts only, so a point at 1e30 does no harm.
//
// A box's distance is computed like the edge test, (ex*ex + ey*ey) + ez*ez in T. Rounding is monotone, so it is an
// exact lower bound of what the test gives for any point inside, and pruning by it loses nothing, ties included.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "radius_graph/candidates.hpp"
#include "radius_graph/geometry.hpp"

namespace moeyard::cpu {

template <class T>
T gap2(const Box<T>& a, const Box<T>& b) {
  T e[3];
  for (int c = 0; c < 3; ++c) e[c] = std::max({a.low[c] - b.high[c], b.low[c] - a.high[c], T(0)});
  return squared_norm(Vec3<T>{e[0], e[1], e[2]});
}

template <class T>
Box<T> box_of(const T* p) {
  return {{p[0], p[1], p[2]}, {p[0], p[1], p[2]}};
}

template <class T>
class KdTree {
 public:
  struct Node {
    Box<T> box;
    int32_t begin, end, left, right, min_id;  // left < 0: a leaf
  };

  explicit KdTree(const View<T>& points) {
    std::vector<int32_t> order(size_t(points.n));
    std::iota(order.begin(), order.end(), 0);
    nodes_.reserve(size_t(points.n / kLeaf * 4 + 1));
    if (points.n) build(points, order, 0, int32_t(points.n));
    points_ = Columns<T>(points.n);
    for (int64_t k = 0; k < points.n; ++k) points_.set(k, points.xyz + 3 * order[size_t(k)], order[size_t(k)]);
  }

  const Columns<T>& points() const { return points_; }
  const Node& node(int32_t at) const { return nodes_[size_t(at)]; }
  const std::vector<int32_t>& leaves() const { return leaves_; }
  bool empty() const { return nodes_.empty(); }

  /// Packs the leaves that may hold a point closer to `box` than r2 allows; false as soon as more than `limit` came.
  bool collect(const Box<T>& box, T r2, int64_t limit, Columns<T>& block) const {
    block.n = 0;
    const bool all = empty() || gather(0, box, r2, limit, block);
    block.reserve(block.n);
    block.pad();
    return all;
  }

 private:
  static constexpr int32_t kLeaf = 16;

  int32_t build(const View<T>& points, std::vector<int32_t>& order, int32_t begin, int32_t end) {
    const auto at = int32_t(nodes_.size());
    nodes_.push_back({box_of(points.xyz + 3 * order[size_t(begin)]), begin, end, -1, -1, order[size_t(begin)]});
    Node node = nodes_.back();
    for (int32_t k = begin; k < end; ++k) {
      const T* p = points.xyz + 3 * order[size_t(k)];
      for (int c = 0; c < 3; ++c)
        node.box.low[c] = std::min(node.box.low[c], p[c]), node.box.high[c] = std::max(node.box.high[c], p[c]);
      node.min_id = std::min(node.min_id, order[size_t(k)]);
    }
    if (end - begin > kLeaf) {
      int axis = 0;
      for (int c = 1; c < 3; ++c)
        if (node.box.high[c] - node.box.low[c] > node.box.high[axis] - node.box.low[axis]) axis = c;
      const int32_t middle = begin + (end - begin) / 2;
      // Ties by index: coincident points are split into ranges of indices, which min_id can prune.
      std::nth_element(order.begin() + begin, order.begin() + middle, order.begin() + end, [&](int32_t a, int32_t b) {
        const T u = points.xyz[3 * int64_t(a) + axis], v = points.xyz[3 * int64_t(b) + axis];
        return u != v ? u < v : a < b;
      });
      node.left = build(points, order, begin, middle);
      node.right = build(points, order, middle, end);
    } else {
      leaves_.push_back(at);
    }
    nodes_[size_t(at)] = node;
    return at;
  }

  bool gather(int32_t at, const Box<T>& box, T r2, int64_t limit, Columns<T>& block) const {
    const Node& n = nodes_[size_t(at)];
    if (!(gap2(n.box, box) < r2)) return true;
    if (n.left >= 0) return gather(n.left, box, r2, limit, block) && gather(n.right, box, r2, limit, block);
    if (block.n + kLeaf > block.room()) block.reserve(2 * block.n + 64);
    block.append(points_, n.begin, n.end);
    return block.n <= limit;
  }

  Columns<T> points_;
  std::vector<Node> nodes_;
  std::vector<int32_t> leaves_;
};

/// A point in the order of nearness.
template <class T>
using Ranked = std::pair<T, int32_t>;

/// The k nearest points of one centre with exact squared distance below `limit`. `reach(gap2)` bounds from below the
/// squared distance `exact(id)` of points whose gap is at least gap2; the free case is the identity, a periodic one
/// subtracts the rounding of wrapped coordinates.
template <class T, class Reach, class Exact>
class NearestQuery {
 public:
  NearestQuery(const KdTree<T>& tree, const T* centre, int32_t self, int64_t k, std::optional<T> limit,
               const Reach& reach, const Exact& exact, std::vector<Ranked<T>>& heap)
      : tree_(tree),
        at_(box_of(centre)),
        self_(self),
        k_(size_t(k)),
        limit_(limit),
        reach_(reach),
        exact_(exact),
        heap_(heap) {
    heap_.clear();
    if (!tree.empty()) visit(0);
  }

 private:
  bool useful(T gap, int32_t id) const { return useful(Ranked<T>{reach_(gap), id}); }
  bool useful(const Ranked<T>& point) const {
    return (!limit_ || point.first < *limit_) && (heap_.size() < k_ || point < heap_.front());
  }

  void visit(int32_t index) {
    const auto& n = tree_.node(index);
    if (!useful(gap2(n.box, at_), n.min_id)) return;
    if (n.left < 0) return leaf(n.begin, n.end);
    const auto &l = tree_.node(n.left), &r = tree_.node(n.right);
    const bool left_first = Ranked<T>{gap2(l.box, at_), l.min_id} < Ranked<T>{gap2(r.box, at_), r.min_id};
    visit(left_first ? n.left : n.right);
    visit(left_first ? n.right : n.left);
  }

  void leaf(int32_t begin, int32_t end) {
    const Columns<T>& p = tree_.points();
    for (int32_t k = begin; k < end; ++k) {
      const int32_t id = p.id[k];
      const Vec3<T> d{p.x[k] - at_.low[0], p.y[k] - at_.low[1], p.z[k] - at_.low[2]};
      if (id == self_ || !useful(squared_norm(d), id)) continue;
      const Ranked<T> found{exact_(id), id};
      if (!useful(found)) continue;
      if (heap_.size() == k_) {
        std::pop_heap(heap_.begin(), heap_.end());
        heap_.pop_back();
      }
      heap_.push_back(found);
      std::push_heap(heap_.begin(), heap_.end());
    }
  }

  const KdTree<T>& tree_;
  const Box<T> at_;
  const int32_t self_;
  const size_t k_;
  const std::optional<T> limit_;
  const Reach& reach_;
  const Exact& exact_;
  std::vector<Ranked<T>>& heap_;
};

}  // namespace moeyard::cpu
