// The cell of one graph and what follows from its vectors, in double, on both devices: only to propose candidates.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/host_device.hpp"
#include "radius_graph/radius_graph.hpp"

namespace moeyard {

/// Along non-periodic axes the caller's vector is ignored; a unit vector across takes its place.
struct Lattice {
  bool periodic[3];
  double vector[3][3];
  double reciprocal[3][3];  // fractional coordinate k of p is dot(p, reciprocal[k])
  double spacing[3];        // between lattice planes; infinite along non-periodic axes

  MOEYARD_HD bool any() const { return periodic[0] || periodic[1] || periodic[2]; }
  MOEYARD_HD double shortest() const;
};

enum class LatticeFault { none, not_finite, singular };

// Keeps n - floor + floor within int32.
constexpr double kMaxCells = 1 << 28;
// Images of one graph's points: some gigabytes. More is a distance in the wrong unit, and would fill any memory.
constexpr double kMaxImages = 1 << 27;

namespace lattice_math {

// Unit vectors that span less than this are called dependent: their images could not be enumerated anyway.
constexpr double kSingular = 1e-8;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

MOEYARD_HD double dot(const double* a, const double* b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }

/// Without overflow.
MOEYARD_HD double norm(const double* a) {
  double largest = 0;
  for (int c = 0; c < 3; ++c) largest = fmax(largest, fabs(a[c]));
  if (!(largest > 0)) return largest;
  const double scaled[3] = {a[0] / largest, a[1] / largest, a[2] / largest};
  return largest * sqrt(dot(scaled, scaled));
}

// A zero vector becomes NaN, which the test for a singular cell catches.
MOEYARD_HD void normalize(double* a) {
  const double length = norm(a);
  for (int c = 0; c < 3; ++c) a[c] /= length;
}

MOEYARD_HD void cross(const double* a, const double* b, double* out) {
  for (int c = 0; c < 3; ++c) out[c] = a[(c + 1) % 3] * b[(c + 2) % 3] - a[(c + 2) % 3] * b[(c + 1) % 3];
}

// Two free axes in a row, a and then u: u is across b and the coordinate axis in which b is smallest.
MOEYARD_HD void complete_two(const double* b, double* u, double* a) {
  int smallest = 0;
  for (int c = 1; c < 3; ++c)
    if (fabs(b[c]) < fabs(b[smallest])) smallest = c;
  const double axis[3] = {double(smallest == 0), double(smallest == 1), double(smallest == 2)};
  cross(b, axis, u);
  cross(b, u, a);
  normalize(u);
  normalize(a);
}

// Replaces the unit vectors of non-periodic axes by such that are orthogonal to the periodic ones.
MOEYARD_HD void complete(const bool* periodic, double (&unit)[3][3]) {
  const int count = periodic[0] + periodic[1] + periodic[2];
  for (int k = 0; k < 3; ++k) {
    if (periodic[k]) continue;
    double *u = unit[k], *a = unit[(k + 1) % 3], *b = unit[(k + 2) % 3];
    if (count == 0) {
      for (int c = 0; c < 3; ++c) u[c] = c == k;
    } else if (count == 1 && !periodic[(k + 1) % 3]) {
      return complete_two(b, u, a);
    } else if (count == 2) {
      cross(a, b, u);
      normalize(u);
    }
  }
}

}  // namespace lattice_math

MOEYARD_HD double Lattice::shortest() const {
  double best = lattice_math::kInfinity;
  for (int k = 0; k < 3; ++k)
    if (periodic[k]) best = fmin(best, lattice_math::norm(vector[k]));
  return best;
}

/// A point moved into the cell: p = home + moved @ vectors.
struct WrappedPoint {
  double home[3], fraction[3], moved[3];

  /// The first axis along which the point is too many cells away, -1 for none.
  MOEYARD_HD int far_axis() const {
    for (int k = 0; k < 3; ++k)
      if (!(fabs(moved[k]) <= kMaxCells)) return k;
    return -1;
  }
};

MOEYARD_HD WrappedPoint wrap_point(const Lattice& lattice, const double* p) {
  WrappedPoint w;
  for (int k = 0; k < 3; ++k) {
    const double f = lattice_math::dot(p, lattice.reciprocal[k]);
    w.moved[k] = lattice.periodic[k] ? floor(f) : 0;
    w.fraction[k] = f - w.moved[k];
  }
  for (int c = 0; c < 3; ++c)
    w.home[c] = p[c] - (w.moved[0] * lattice.vector[0][c] + w.moved[1] * lattice.vector[1][c] +
                        w.moved[2] * lattice.vector[2][c]);
  return w;
}

/// The lattice of a cell with vectors as rows; null `pbc`: periodic along all three.
template <class T>
MOEYARD_HD LatticeFault find_lattice(const T* cell, const bool* pbc, Lattice& lattice) {
  using namespace lattice_math;
  double length[3], unit[3][3], normal[3][3];
  bool finite = true;
  for (int k = 0; k < 3; ++k) {
    lattice.periodic[k] = pbc ? pbc[k] : true;
    for (int c = 0; c < 3; ++c) finite &= fabs(lattice.vector[k][c] = double(cell[3 * k + c])) < kInfinity;
    length[k] = norm(lattice.vector[k]);
    for (int c = 0; c < 3; ++c) unit[k][c] = length[k] > 0 ? lattice.vector[k][c] / length[k] : 0;
  }
  if (!finite) return LatticeFault::not_finite;
  complete(lattice.periodic, unit);
  for (int k = 0; k < 3; ++k) cross(unit[(k + 1) % 3], unit[(k + 2) % 3], normal[k]);
  const double volume = dot(unit[0], normal[0]);
  if (!(fabs(volume) > kSingular)) return LatticeFault::singular;
  for (int k = 0; k < 3; ++k) {
    const double scale = lattice.periodic[k] ? length[k] : 1;
    for (int c = 0; c < 3; ++c) {
      lattice.reciprocal[k][c] = normal[k][c] / (volume * scale);
      if (!lattice.periodic[k]) lattice.vector[k][c] = 0;
    }
    lattice.spacing[k] = lattice.periodic[k] ? fabs(volume) * length[k] / norm(normal[k]) : kInfinity;
  }
  return LatticeFault::none;
}

}  // namespace moeyard
