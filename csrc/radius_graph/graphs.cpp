#include "radius_graph/graphs.hpp"

#include <algorithm>

namespace moeyard::cpu {
namespace {

std::vector<Run> runs_of_batch(const PointSet& set, const Names& names) {
  std::vector<Run> runs;
  for (int64_t i = 0; i < set.count; ++i) {
    const int64_t id = set.batch[i], before = i ? set.batch[i - 1] : 0;
    if (id < 0) fail_value(names.batch, ": expected graph ids >= 0, got ", id, " in row ", i);
    if (id < before)
      fail_value(names.batch, ": expected sorted graph ids, got ", before, " before ", id, " in row ", i);
    if (i == 0 || id != before) runs.push_back({id, i, i});
    runs.back().end = i + 1;
  }
  return runs;
}

std::vector<Run> runs_of_ptr(const PointSet& set, const Names& names) {
  const int64_t *ptr = set.ptr, last = set.num_graphs;
  if (ptr[0] != 0) fail_value(names.ptr, ": expected to start with 0, got ", ptr[0]);
  if (ptr[last] != set.count)
    fail_value(names.ptr, ": expected to end with ", set.count, " (the rows of ", names.xyz, "), got ", ptr[last]);
  std::vector<Run> runs;
  for (int64_t g = 0; g < last; ++g) {
    if (ptr[g + 1] < ptr[g])
      fail_value(names.ptr, ": expected non-decreasing values, got ", ptr[g], " before ", ptr[g + 1], " at ", g + 1);
    if (ptr[g + 1] > ptr[g]) runs.push_back({g, ptr[g], ptr[g + 1]});
  }
  return runs;
}

}  // namespace

std::vector<Run> graph_runs(const PointSet& set, const Names& names) {
  if (set.batch) return runs_of_batch(set, names);
  if (set.ptr) return runs_of_ptr(set, names);
  if (set.count == 0) return {};
  return {{0, 0, set.count}};
}

std::vector<Graph> match_graphs(const PointSet& points, const PointSet& centres) {
  const bool two_sets = centres.xyz != nullptr;
  const std::vector<Run> of_points = graph_runs(points, point_names(two_sets));
  std::vector<Graph> graphs;
  if (!two_sets) {
    for (const Run& p : of_points) graphs.push_back({p.id, p.begin, p.end, p.begin, p.end});
    return graphs;
  }
  const std::vector<Run> of_centres = graph_runs(centres, centre_names());
  for (size_t p = 0, c = 0; p < of_points.size() && c < of_centres.size();) {
    const Run &a = of_points[p], &b = of_centres[c];
    if (a.id == b.id) graphs.push_back({a.id, a.begin, a.end, b.begin, b.end});
    p += a.id <= b.id, c += b.id <= a.id;
  }
  return graphs;
}

int64_t graph_of(const PointSet& set, int64_t i) {
  if (set.batch) return set.batch[i];
  if (set.ptr) return std::upper_bound(set.ptr, set.ptr + set.num_graphs + 1, i) - set.ptr - 1;
  return 0;
}

}  // namespace moeyard::cpu
