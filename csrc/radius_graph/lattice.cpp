#include "radius_graph/lattice.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/check.hpp"

namespace moeyard::cpu {

using lattice_math::dot;
using lattice_math::kInfinity;
using lattice_math::norm;

template <class T>
Lattice make_lattice(const Periodicity& p, int64_t graph) {
  if (p.num_cells >= 0 && graph >= p.num_cells)
    fail_value("cell: expected a cell for every graph, got ", p.num_cells, " cells for graph id ", graph);
  if (p.num_pbc >= 0 && graph >= p.num_pbc)
    fail_value("pbc: expected a row for every graph, got ", p.num_pbc, " rows for graph id ", graph);
  Lattice lattice{};
  const T* cell = static_cast<const T*>(p.cell) + (p.num_cells < 0 ? 0 : 9 * graph);
  const bool* pbc = p.pbc ? p.pbc + (p.num_pbc < 0 ? 0 : 3 * graph) : nullptr;
  const LatticeFault fault = find_lattice(cell, pbc, lattice);
  if (fault == LatticeFault::not_finite)
    fail_value("cell: expected finite vectors, got a non-finite one for graph ", graph);
  if (fault == LatticeFault::singular)
    fail_value("cell: expected linearly independent periodic vectors, got a singular cell for graph ", graph);
  return lattice;
}

template <class T>
Wrapped wrap(const Lattice& lattice, const T* xyz, int64_t begin, int64_t end, const char* name) {
  Wrapped w;
  w.home.resize(size_t(3 * (end - begin)));
  w.fraction.resize(w.home.size());
  w.floor.resize(size_t(end - begin));
  for (int64_t i = 0; i < end - begin; ++i) {
    const T* row = xyz + 3 * (begin + i);
    const double p[3] = {double(row[0]), double(row[1]), double(row[2])};
    const WrappedPoint point = wrap_point(lattice, p);
    if (const int k = point.far_axis(); k >= 0)
      fail_value(name, ": expected coordinates within 2^28 cells of the origin, got ", dot(p, lattice.reciprocal[k]),
                 " in row ", begin + i);
    for (int k = 0; k < 3; ++k) {
      w.home[size_t(3 * i + k)] = point.home[k];
      w.fraction[size_t(3 * i + k)] = point.fraction[k];
      w.floor[size_t(i)].n[k] = int32_t(point.moved[k]);
    }
  }
  return w;
}

namespace {

struct Bounds {
  double home_low[3], home_high[3], fraction_low[3], fraction_high[3];
};

Bounds bounds_of(const Wrapped& w) {
  Bounds b;
  for (int c = 0; c < 3; ++c) {
    b.home_low[c] = b.fraction_low[c] = kInfinity, b.home_high[c] = b.fraction_high[c] = -kInfinity;
    for (size_t i = size_t(c); i < w.home.size(); i += 3) {
      b.home_low[c] = std::min(b.home_low[c], w.home[i]), b.home_high[c] = std::max(b.home_high[c], w.home[i]);
      b.fraction_low[c] = std::min(b.fraction_low[c], w.fraction[i]);
      b.fraction_high[c] = std::max(b.fraction_high[c], w.fraction[i]);
    }
  }
  return b;
}

// Rounding of the edge test (in a type with `epsilon`) and of wrapped coordinates: a few epsilon times the largest
// number that takes part. 16 is generous.
double rounding(const Lattice& lattice, const Wrapped& points, const Wrapped& centres, double radius, double epsilon) {
  double largest = 0;
  for (const Wrapped* w : {&points, &centres}) {
    for (double h : w->home) largest = std::max(largest, std::abs(h));
    for (int k = 0; k < 3; ++k) {
      if (!lattice.periodic[k]) continue;
      double cells = radius / lattice.spacing[k] + 2;
      for (const Shift& s : w->floor) cells = std::max(cells, radius / lattice.spacing[k] + 2 + std::abs(s.n[k]));
      largest += 2 * cells * norm(lattice.vector[k]);
    }
  }
  return 16 * epsilon * largest;
}

}  // namespace

template <class T>
Images<T> make_images(const Lattice& lattice, const Wrapped& points, const Wrapped& centres, double radius) {
  Images<T> images;
  images.slack = rounding(lattice, points, centres, radius, double(std::numeric_limits<T>::epsilon()));
  images.slack += underflow_length<T>();
  // Images would be made for the rounding alone, more the farther off the points are.
  if (!(images.slack <= std::max(radius, lattice.shortest())))
    fail_value("pos: expected coordinates near enough to the cell that their rounding, here up to ", images.slack,
               ", stays below the distance (", radius, ") or the shortest cell vector (", lattice.shortest(),
               "); move them into the cell");
  const double reach = radius * (1 + 1e-5) + images.slack;
  const Bounds near = bounds_of(centres);
  double low[3], high[3], total = double(points.floor.size());
  for (int k = 0; k < 3; ++k) {
    const double width = lattice.periodic[k] ? reach / lattice.spacing[k] + 1e-9 : 0;
    low[k] = near.fraction_low[k] - width, high[k] = near.fraction_high[k] + width;
    if (lattice.periodic[k]) total *= high[k] - low[k] + 1;
  }
  if (!(total <= kMaxImages))
    fail_value("cell: expected at most 2^27 periodic images of its points within reach, got about ", total,
               " (distance ", radius, ", planes ", lattice.spacing[0], ", ", lattice.spacing[1], ", ",
               lattice.spacing[2], " apart)");
  for (size_t j = 0; j < points.floor.size(); ++j) {
    int32_t from[3] = {0, 0, 0}, to[3] = {0, 0, 0};
    for (int k = 0; k < 3; ++k) {
      if (!lattice.periodic[k]) continue;
      from[k] = int32_t(std::ceil(low[k] - points.fraction[3 * j + k]));
      to[k] = int32_t(std::floor(high[k] - points.fraction[3 * j + k]));
    }
    for (int32_t a = from[0]; a <= to[0]; ++a)
      for (int32_t b = from[1]; b <= to[1]; ++b)
        for (int32_t c = from[2]; c <= to[2]; ++c) {
          double p[3];
          bool inside = true;
          for (int d = 0; d < 3; ++d) {
            p[d] = points.home[3 * j + d] +
                   (a * lattice.vector[0][d] + b * lattice.vector[1][d] + c * lattice.vector[2][d]);
            inside &= p[d] >= near.home_low[d] - reach && p[d] <= near.home_high[d] + reach;
          }
          if (!inside) continue;
          for (double x : p) images.xyz.push_back(T(x));
          images.point.push_back(int32_t(j));
          images.n.push_back({{a, b, c}});
        }
  }
  return images;
}

template Lattice make_lattice<float>(const Periodicity&, int64_t);
template Lattice make_lattice<double>(const Periodicity&, int64_t);
template Wrapped wrap<float>(const Lattice&, const float*, int64_t, int64_t, const char*);
template Wrapped wrap<double>(const Lattice&, const double*, int64_t, int64_t, const char*);
template Images<float> make_images<float>(const Lattice&, const Wrapped&, const Wrapped&, double);
template Images<double> make_images<double>(const Lattice&, const Wrapped&, const Wrapped&, double);

}  // namespace moeyard::cpu
