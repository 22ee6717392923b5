// Periodic graphs: atoms are wrapped into the cell along its periodic vectors, and every image that can lie within
// reach of a wrapped centre becomes a point of its own. All of it in double and only to propose candidates; the shift
// that is reported belongs to the caller's coordinates, and the edge test uses those.
#pragma once
#include <cstdint>
#include <vector>

#include "radius_graph/geometry.hpp"
#include "radius_graph/lattice_math.hpp"
#include "radius_graph/radius_graph.hpp"

namespace moeyard::cpu {

/// Throws for non-finite cells, for periodic vectors that are zero or (nearly) dependent, and for graphs without a
/// cell.
template <class T>
Lattice make_lattice(const Periodicity& periodic, int64_t graph);

/// Points moved into the cell: p = home + floor @ cell.
struct Wrapped {
  std::vector<double> home, fraction;
  std::vector<Shift> floor;
};
template <class T>
Wrapped wrap(const Lattice& lattice, const T* xyz, int64_t begin, int64_t end, const char* name);

/// The images of a graph's points near its centres, sorted by (point, n): image = home[point] + n @ cell.
template <class T>
struct Images {
  std::vector<T> xyz;
  std::vector<int32_t> point;
  std::vector<Shift> n;
  double slack;  // bounds the difference between a distance from image coordinates and one from the edge test
};

/// All images closer than `radius` to any centre, and some more.
template <class T>
Images<T> make_images(const Lattice& lattice, const Wrapped& points, const Wrapped& centres, double radius);

}  // namespace moeyard::cpu
