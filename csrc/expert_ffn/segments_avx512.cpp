#include "expert_ffn/segments.hpp"

#include "common/simd.hpp"

#ifdef MOEYARD_X86
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/dtype.hpp"
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif
#include "expert_ffn/activation.hpp"
#include "expert_ffn/product.hpp"

namespace moeyard::cpu {
namespace {

/// Hands out pieces of a worker's scratch.
class Pieces {
 public:
  explicit Pieces(float* data) : next_(data) {}
  float* take(int64_t size) { return std::exchange(next_, next_ + size); }

 private:
  float* next_;
};

/// Numbers of the panel and of the tiles that the backward of `rows` rows uses, each for several matrices in turn.
int64_t backward_panel(const ExpertFfn& q, int64_t rows) { return std::max({q.dim, q.width(), rows}) * kPanel; }
int64_t backward_tiles(const ExpertFfn& q, int64_t rows) {
  return (std::max(q.hidden, q.dim) + kTile - 1) / kTile * kTile * rows;
}

/// Matrix e of a stack from column `from` on, and its transpose from row `from` on.
Right columns_of(const Weights& w, int64_t e, int64_t from) {
  return {w.data + e * w.expert + from * w.column, w.row, w.column};
}
Right rows_of(const Weights& w, int64_t e, int64_t from) {
  return {w.data + e * w.expert + from * w.row, w.column, w.row};
}

/// The first product of 8 rows at a time, for 32 hidden features: gate and, for swiglu, value.
class FirstProduct {
 public:
  FirstProduct(const ExpertFfn& q, const Segment& s, Pieces& pieces)
      : q_(q), s_(s), gate_(pieces.take(q.dim * kPanel)), value_(q.swiglu ? pieces.take(q.dim * kPanel) : nullptr) {}

  void take_columns(int64_t from, int64_t columns) {
    columns_ = columns;
    pack(columns_of(q_.up, s_.expert, from), q_.dim, columns, gate_);
    if (value_) pack(columns_of(q_.up, s_.expert, q_.hidden + from), q_.dim, columns, value_);
  }
  void run(int64_t row, int64_t rows, float* gate, float* value, int64_t h_row) const {
    const Left x{q_.x + row * q_.dim, q_.dim, 1};
    product(rows, q_.dim, x, gate_, gate, h_row, columns_, false);
    if (value_) product(rows, q_.dim, x, value_, value, h_row, columns_, false);
  }

 private:
  const ExpertFfn& q_;
  const Segment& s_;
  float *gate_, *value_;
  int64_t columns_ = 0;
};

/// grad[m, n] (+)= A^T B, with A in tiles of 8 columns and B as it lies: the gradient of a matrix of weights.
void weight_gradient(const float* tiles, int64_t m, const float* b, int64_t n, int64_t depth, float* panel, float* grad,
                     bool add) {
  for (int64_t j = 0; j < n; j += kPanel) {
    const int64_t columns = std::min(kPanel, n - j);
    pack({b + j, n, 1}, depth, columns, panel);
    for (int64_t i = 0; i < m; i += kTile)
      product(std::min(kTile, m - i), depth, {tiles + i * depth, 1, kTile}, panel, grad + i * n + j, n, columns, add);
  }
}

}  // namespace

int64_t forward_scratch(const ExpertFfn& q, int64_t rows) {
  return (q.swiglu ? 2 : 1) * q.dim * kPanel + q.hidden * kPanel + 2 * kTile * kPanel + rows * q.hidden;
}

void forward_segment(const ExpertFfn& q, const Segment& s, float* y, float* hidden, float* scratch) {
  Pieces pieces(scratch);
  FirstProduct first(q, s, pieces);
  float *down = pieces.take(q.hidden * kPanel), *tile_h = pieces.take(2 * kTile * kPanel);
  const int64_t rows = s.end - s.begin, width = q.width();
  float* active = pieces.take(rows * q.hidden);
  for (int64_t j = 0; j < q.hidden; j += kPanel) {
    const int64_t columns = std::min(kPanel, q.hidden - j);
    first.take_columns(j, columns);
    for (int64_t i = 0; i < rows; i += kTile) {
      const int64_t n = std::min(kTile, rows - i), h_row = hidden ? width : 2 * kPanel;
      float* gate = hidden ? hidden + (s.begin + i) * width + j : tile_h;
      float* value = gate + (hidden ? q.hidden : kPanel);
      first.run(s.begin + i, n, gate, value, h_row);
      activate(q.swiglu, n, columns, gate, value, h_row, active + i * q.hidden + j, q.hidden);
    }
  }
  for (int64_t j = 0; j < q.dim; j += kPanel) {
    const int64_t columns = std::min(kPanel, q.dim - j);
    pack(columns_of(q.down, s.expert, j), q.hidden, columns, down);
    product(rows, q.hidden, {active, q.hidden, 1}, down, y + s.begin * q.dim + j, q.dim, columns, false);
  }
}

int64_t backward_scratch(const ExpertFfn& q, int64_t rows) {
  return (q.swiglu ? 2 : 1) * q.dim * kPanel + 3 * kTile * kPanel + backward_panel(q, rows) + rows * q.width() +
         backward_tiles(q, rows);
}

void backward_segment(const ExpertFfn& q, const Segment& s, const float* grad, const float* hidden,
                      const ExpertFfnGradients& out, bool add, float* scratch) {
  Pieces pieces(scratch);
  FirstProduct first(q, s, pieces);
  const int64_t rows = s.end - s.begin, width = q.width();
  float *tile_h = pieces.take(2 * kTile * kPanel), *grad_active = pieces.take(kTile * kPanel);
  float *panel = pieces.take(backward_panel(q, rows)), *tiles = pieces.take(backward_tiles(q, rows));
  float* grad_hidden = pieces.take(rows * width);
  const float *x = q.x + s.begin * q.dim, *dy = grad + s.begin * q.dim;
  for (int64_t j = 0; j < q.hidden; j += kPanel) {
    const int64_t columns = std::min(kPanel, q.hidden - j);
    pack(rows_of(q.down, s.expert, j), q.dim, columns, panel);
    if (!hidden) first.take_columns(j, columns);
    for (int64_t i = 0; i < rows; i += kTile) {
      const int64_t n = std::min(kTile, rows - i), h_row = hidden ? width : 2 * kPanel;
      const float* gate = hidden ? hidden + (s.begin + i) * width + j : tile_h;
      const float* value = gate + (hidden ? q.hidden : kPanel);
      if (!hidden) first.run(s.begin + i, n, tile_h, tile_h + kPanel, h_row);
      product(n, q.dim, {dy + i * q.dim, q.dim, 1}, panel, grad_active, kPanel, columns, false);
      float* grad_gate = grad_hidden + i * width + j;
      activate_backward(q.swiglu, n, columns, gate, value, h_row, grad_active, grad_gate, grad_gate + q.hidden, width,
                        tiles + j * rows + i * kTile, rows);
    }
  }
  if (out.down) {
    weight_gradient(tiles, q.hidden, dy, q.dim, rows, panel, out.down, add);
    pack_transposed(x, q.dim, rows, q.dim, tiles);
    weight_gradient(tiles, q.dim, grad_hidden, width, rows, panel, out.up, add);
  }
  if (!out.x) return;
  for (int64_t j = 0; j < q.dim; j += kPanel) {
    const int64_t columns = std::min(kPanel, q.dim - j);
    pack(rows_of(q.up, s.expert, j), width, columns, panel);
    product(rows, width, {grad_hidden, width, 1}, panel, out.x + s.begin * q.dim + j, q.dim, columns, false);
  }
}

}  // namespace moeyard::cpu

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
