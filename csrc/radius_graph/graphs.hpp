// Which points belong together: runs of equal graph ids in two sets, matched. Everything is proportional to the number
// of points (and of `ptr` entries), never to the largest id.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/check.hpp"
#include "common/parallel.hpp"
#include "radius_graph/check_request.hpp"
#include "radius_graph/radius_graph.hpp"

namespace moeyard::cpu {

struct Graph {
  int64_t id, begin, end, centre_begin, centre_end;
};

struct Run {
  int64_t id, begin, end;
};

/// The non-empty runs of a set. Throws for an unsorted or negative batch and for a ptr that is no partition.
std::vector<Run> graph_runs(const PointSet& set, const Names& names);

/// Graphs that have both points and centres, by rising id. `centres.xyz` null: the points are the centres.
std::vector<Graph> match_graphs(const PointSet& points, const PointSet& centres);

/// The graph id of one centre.
int64_t graph_of(const PointSet& set, int64_t i);

template <class T>
void check_finite(const PointSet& set, const char* name, int threads) {
  const T* p = static_cast<const T*>(set.xyz);
  std::atomic<bool> all{true};
  parallel_for(3 * set.count, 1 << 16, threads, [&](int64_t begin, int64_t end) {
    bool fine = true;
    for (int64_t i = begin; i < end; ++i) fine &= std::abs(p[i]) <= std::numeric_limits<T>::max();
    if (!fine) all = false;
  });
  for (int64_t i = 0; !all && i < 3 * set.count; ++i)
    if (!std::isfinite(p[i])) fail_value(name, ": expected finite coordinates, got ", p[i], " in row ", i / 3);
}

}  // namespace moeyard::cpu
