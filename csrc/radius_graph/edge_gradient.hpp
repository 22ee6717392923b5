// What an edge hands back to the points and the cell: on both devices alike, so that their sums have equal bits.
#pragma once
#include "radius_graph/geometry.hpp"
#include "radius_graph/radius_graph.hpp"

namespace moeyard {

/// The gradient with respect to one edge's vector.
template <class T>
MOEYARD_HD Vec3<T> edge_gradient(const RadiusEdges& edges, int64_t e) {
  Vec3<T> y{0, 0, 0};
  if (const T* g = static_cast<const T*>(edges.grad_vector)) y = {g[3 * e], g[3 * e + 1], g[3 * e + 2]};
  const T d = static_cast<const T*>(edges.distance)[e];
  if (!edges.grad_distance || !(d > 0)) return y;
  const T scale = static_cast<const T*>(edges.grad_distance)[e] / d;
  const T* v = static_cast<const T*>(edges.vector) + 3 * e;
  return {y.x + scale * v[0], y.y + scale * v[1], y.z + scale * v[2]};
}

/// s^T y of an edge, its part in the gradient of its graph's cell.
template <class T>
MOEYARD_HD void add_outer(const int32_t* s, const Vec3<T>& y, double* sum) {
  const double v[3] = {double(y.x), double(y.y), double(y.z)};
  for (int k = 0; k < 3; ++k)
    for (int c = 0; c < 3; ++c) sum[3 * k + c] += double(s[k]) * v[c];
}

}  // namespace moeyard
