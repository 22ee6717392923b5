// expert_ffn: the two-layer networks of all experts over rows that lie sorted by expert, in float32.
//
//   swiglu:  y = (silu(x G_e) * (x U_e)) D_e        relu:  y = max(x U_e, 0) D_e
//
// x is [rows, dim], up [experts, dim, parts * hidden] (swiglu: gate and value side by side, parts = 2), down
// [experts, hidden, dim]. Weights may have any strides. Expert e's rows end at offsets[e].
#pragma once
#include <cstdint>

#include "common/int_view.hpp"

namespace moeyard {

/// A stack of matrices: element (e, i, j) lies at data[e * expert + i * row + j * column].
struct Weights {
  const float* data;
  int64_t expert, row, column;
};

struct ExpertFfn {
  const float* x;
  Weights up, down;
  IntView offsets;
  int64_t rows, experts, dim, hidden;
  bool swiglu;  ///< false: relu

  int64_t width() const { return swiglu ? 2 * hidden : hidden; }  ///< columns of `up`
};

/// Where the gradients go; null for those that nobody wants. grad_up and grad_down have the shapes of the weights, are
/// contiguous, and are zero for experts without rows.
struct ExpertFfnGradients {
  float *x, *up, *down;
};

namespace cpu {

/// Whether the kernels below are the better choice here: they need AVX-512, and are written for processors on which
/// the BLAS behind torch does not use it, which are AMD's.
bool expert_ffn_preferred();
bool expert_ffn_runs();

/// y[rows, dim], zero past the last offset; hidden[rows, width], what the first product gave (null: not kept). Throws
/// unless the offsets rise within [0, rows].
void expert_ffn(const ExpertFfn& problem, float* y, float* hidden, int threads);

/// From the gradient of y. `hidden` is what the forward kept; null: the first product is taken again.
void expert_ffn_backward(const ExpertFfn& problem, const float* grad, const float* hidden,
                         const ExpertFfnGradients& out, int threads);

}  // namespace cpu
}  // namespace moeyard
