// A dense grid of cells a little wider than the radius: all neighbours of a cell's points lie in the 27 cells around
// it. For one graph whose number of cells is in the order of its number of points; others take the tree.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "radius_graph/scan.hpp"

namespace moeyard::cpu {

/// Points sorted by cell (stable): `start` has one entry per cell and one more.
template <class T>
struct Bins {
  Columns<T> points;
  std::vector<int32_t> start;
};

template <class T>
class Grid {
 public:
  /// The grid for pairs closer than `radius`, or none when it would have too many cells.
  static std::optional<Grid> fit(const View<T>& points, double radius) {
    Grid grid;
    // The side covers the rounding of the edge test (about 1e-7) and of cell numbers (cells * 2^-52) by far.
    grid.inverse_ = 1 / (radius * (1 + 1e-4));
    double cells = 1;
    for (int c = 0; c < 3; ++c) {
      T low = points.xyz[c], high = low;
      for (int64_t i = 1; i < points.n; ++i)
        low = std::min(low, points.xyz[3 * i + c]), high = std::max(high, points.xyz[3 * i + c]);
      const double size = std::floor((double(high) - double(low)) * grid.inverse_) + 1;
      cells *= size;
      if (!(cells <= 8.0 * double(points.n) + 1024)) return {};
      grid.low_[c] = double(low), grid.size_[c] = int64_t(size);
    }
    return grid;
  }

  int64_t cells() const { return size_[0] * size_[1] * size_[2]; }

  /// A point outside the grid belongs to the nearest cell, which has at least its neighbours around it.
  int64_t cell_of(const T* p) const {
    int64_t at[3];
    for (int c = 0; c < 3; ++c) {
      const double exact = std::floor((double(p[c]) - low_[c]) * inverse_);
      at[c] = int64_t(std::clamp(exact, 0.0, double(size_[c] - 1)));
    }
    return (at[2] * size_[1] + at[1]) * size_[0] + at[0];
  }

  Bins<T> bin(const View<T>& points) const {
    Bins<T> bins;
    bins.start.assign(size_t(cells() + 1), 0);
    bins.points.resize(points.n);
    std::vector<int64_t> cell(size_t(points.n));
    for (int64_t i = 0; i < points.n; ++i) ++bins.start[size_t(cell[i] = cell_of(points.xyz + 3 * i))];
    // Counts become ends; filling from the back turns ends into starts and keeps the order within a cell.
    int32_t sum = 0;
    for (int32_t& s : bins.start) s = sum += s;
    for (int64_t i = points.n; i-- > 0;) bins.points.set(--bins.start[size_t(cell[i])], points.xyz + 3 * i, i);
    return bins;
  }

  /// Packs the points of the 27 cells around `cell`: nine runs along x.
  void collect(const Bins<T>& bins, int64_t cell, Columns<T>& block) const {
    const int64_t x = cell % size_[0], y = cell / size_[0] % size_[1], z = cell / size_[0] / size_[1];
    const int64_t x_low = std::max<int64_t>(x - 1, 0), x_high = std::min(x + 1, size_[0] - 1);
    block.n = 0;
    for (int64_t v = std::max<int64_t>(z - 1, 0); v <= std::min(z + 1, size_[2] - 1); ++v)
      for (int64_t u = std::max<int64_t>(y - 1, 0); u <= std::min(y + 1, size_[1] - 1); ++u) {
        const int64_t row = (v * size_[1] + u) * size_[0];
        block.append(bins.points, bins.start[size_t(row + x_low)], bins.start[size_t(row + x_high + 1)]);
      }
    block.pad();
  }

 private:
  Grid() = default;
  double low_[3], inverse_;
  int64_t size_[3];
};

}  // namespace moeyard::cpu
