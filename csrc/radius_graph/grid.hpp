// A dense grid of cells a little wider than the radius: all neighbours of a cell's points lie in the 27 cells around
// it. For one graph whose number of cells is in the order of its number of points; others take the tree.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "common/parallel.hpp"
#include "radius_graph/candidates.hpp"
#include "radius_graph/geometry.hpp"

namespace moeyard::cpu {

/// The smallest box around the points.
template <class T>
Box<T> bounding_box(const View<T>& points, int threads) {
  constexpr int64_t kGrain = 1 << 15;
  std::vector<Box<T>> parts(size_t((points.n + kGrain - 1) / kGrain));
  parallel_for(points.n, kGrain, threads, [&](int64_t begin, int64_t end) {
    // Twelve running bounds, because four points are three whole vectors.
    std::array<T, 12> low, high;
    low.fill(std::numeric_limits<T>::infinity()), high.fill(-std::numeric_limits<T>::infinity());
    int64_t k = 3 * begin;
    const auto take = [&](int64_t values) {
      for (int64_t l = 0; l < values; ++l) {
        const T v = points.xyz[k + l];
        low[size_t(l)] = v < low[size_t(l)] ? v : low[size_t(l)];
        high[size_t(l)] = v > high[size_t(l)] ? v : high[size_t(l)];
      }
    };
    for (; k + 12 <= 3 * end; k += 12) take(12);
    take(3 * end - k);
    Box<T>& box = parts[size_t(begin / kGrain)];
    for (size_t c = 0; c < 3; ++c) {
      box.low[c] = std::min({low[c], low[c + 3], low[c + 6], low[c + 9]});
      box.high[c] = std::max({high[c], high[c + 3], high[c + 6], high[c + 9]});
    }
  });
  for (const Box<T>& part : parts)
    for (size_t c = 0; c < 3; ++c) {
      parts[0].low[c] = std::min(parts[0].low[c], part.low[c]);
      parts[0].high[c] = std::max(parts[0].high[c], part.high[c]);
    }
  return parts[0];
}

/// Points sorted by cell, within a cell by index.
template <class T>
struct Bins {
  Columns<T> points;
  Buffer<int32_t> ends;  // of the cells; the last row of the table that the sort counts in
  int64_t first = 0;

  int32_t end(int64_t cell) const { return ends[first + cell]; }
  int32_t begin(int64_t cell) const { return cell ? end(cell - 1) : 0; }
};

template <class T>
class Grid {
 public:
  /// The grid for pairs closer than `radius`, or none when it would have too many cells.
  static std::optional<Grid> fit(const View<T>& points, double radius, int threads) {
    Grid grid;
    // Rounding is monotone: a computed square below r*r has |dx| < r along every axis, however small r is. So the side
    // must cover the rounding of dx (about 1e-7) and of cell numbers (cells * 2^-52), which it does by far.
    grid.inverse_ = 1 / (radius * (1 + 1e-4));
    const Box<T> box = bounding_box(points, threads);
    double cells = 1;
    for (int c = 0; c < 3; ++c) {
      const double size = std::floor((double(box.high[c]) - double(box.low[c])) * grid.inverse_) + 1;
      cells *= size;
      if (!(cells <= std::min(8.0 * double(points.n) + 1024, 2147483647.0))) return {};
      grid.low_[c] = double(box.low[c]), grid.size_[c] = int64_t(size);
    }
    return grid;
  }

  int64_t cells() const { return size_[0] * size_[1] * size_[2]; }

  /// A point outside the grid belongs to the nearest cell, which has at least its neighbours around it.
  int32_t cell_of(const T* p) const {
    int32_t at[3];
    for (int c = 0; c < 3; ++c)
      at[c] = int32_t(std::min(std::max((double(p[c]) - low_[c]) * inverse_, 0.0), double(size_[c] - 1)));
    return (at[2] * int32_t(size_[1]) + at[1]) * int32_t(size_[0]) + at[0];
  }

  /// A counting sort in pieces of the points, each with its own row of counts; few enough that the rows together are
  /// no larger than the columns.
  Bins<T> bin(const View<T>& points, int threads) const {
    const int64_t n = points.n, cells = this->cells();
    const int64_t grain = n / std::clamp<int64_t>(std::min(n >> 14, 2 * n / cells), 1, 8) + 1;
    const int64_t rows = (n + grain - 1) / grain;
    Bins<T> bins{Columns<T>(n), Buffer<int32_t>(rows * cells), (rows - 1) * cells};
    Buffer<int32_t> cell(n);
    parallel_for(n, grain, threads, [&](int64_t begin, int64_t end) {
      int32_t* count = bins.ends.data() + begin / grain * cells;
      std::fill_n(count, cells, 0);
      for (int64_t i = begin; i < end; ++i) ++count[cell[i] = cell_of(points.xyz + 3 * i)];
    });
    int32_t sum = 0;
    for (int64_t c = 0; c < cells; ++c)
      for (int64_t at = c; at < rows * cells; at += cells) sum += std::exchange(bins.ends[at], sum);
    // Starts become ends while the points take their places.
    parallel_for(n, grain, threads, [&](int64_t begin, int64_t end) {
      int32_t* next = bins.ends.data() + begin / grain * cells;
      for (int64_t i = begin; i < end; ++i) bins.points.id[next[cell[i]]++] = int32_t(i);
    });
    parallel_for(n, 1 << 14, threads, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int32_t i = bins.points.id[k];
        bins.points.set(k, points.xyz + 3 * int64_t(i), i);
      }
    });
    return bins;
  }

  /// Packs the points of the 27 cells around `cell`: nine runs along x.
  void collect(const Bins<T>& bins, int64_t cell, Columns<T>& block) const {
    const int64_t x = cell % size_[0], y = cell / size_[0] % size_[1], z = cell / size_[0] / size_[1];
    const int64_t x_low = std::max<int64_t>(x - 1, 0), x_high = std::min(x + 1, size_[0] - 1);
    Range rows[9];
    int count = 0;
    for (int64_t v = std::max<int64_t>(z - 1, 0); v <= std::min(z + 1, size_[2] - 1); ++v)
      for (int64_t u = std::max<int64_t>(y - 1, 0); u <= std::min(y + 1, size_[1] - 1); ++u) {
        const int64_t row = (v * size_[1] + u) * size_[0];
        rows[count++] = {bins.begin(row + x_low), bins.end(row + x_high)};
      }
    pack(bins.points, rows, count, block);
  }

 private:
  Grid() = default;
  double low_[3], inverse_;
  int64_t size_[3];
};

}  // namespace moeyard::cpu
