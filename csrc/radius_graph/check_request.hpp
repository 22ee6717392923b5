// What can be said about a search before any value on a device is read; and what the caller calls its arguments.
#pragma once
#include <cmath>

#include "common/check.hpp"
#include "radius_graph/lattice_math.hpp"
#include "radius_graph/radius_graph.hpp"

namespace moeyard {

/// `radius` has x and y, the others pos alone.
struct Names {
  const char *xyz, *batch, *ptr;
};
inline Names point_names(bool two_sets) {
  return two_sets ? Names{"x", "batch_x", "ptr_x"} : Names{"pos", "batch", "ptr"};
}
inline Names centre_names() { return {"y", "batch_y", "ptr_y"}; }

template <class T>
void check_request(const PointSet& points, const PointSet& centres, const Periodicity& periodic,
                   const RadiusOptions& options) {
  const bool two_sets = centres.xyz != nullptr;
  const T r = T(options.r), r2 = r * r;
  if (options.k < 1 && !(std::isfinite(r2) && r > 0 && r2 > 0))
    fail_value("r: expected a finite distance > 0 whose square is positive and finite in the dtype of ",
               point_names(two_sets).xyz, ", got ", options.r);
  if (periodic.cell && double(options.k) > kMaxImages)
    fail_value("k: expected at most 2^27 with a cell, got ", options.k);
  for (const PointSet* set : {&points, two_sets ? &centres : &points}) {
    if (periodic.num_cells >= 0 && set->ptr && set->num_graphs != periodic.num_cells)
      fail_value("cell: expected one cell per graph (", set->num_graphs, "), got ", periodic.num_cells);
    if (periodic.num_pbc >= 0 && set->ptr && set->num_graphs != periodic.num_pbc)
      fail_value("pbc: expected one row per graph (", set->num_graphs, "), got ", periodic.num_pbc);
  }
  if (two_sets && points.ptr && centres.ptr && points.num_graphs != centres.num_graphs)
    fail_value("ptr_y: expected as many graphs as ptr_x has (", points.num_graphs, "), got ", centres.num_graphs);
}

}  // namespace moeyard
