// The activations on tiles of at most 8 by 32, 16 numbers at a time.
#pragma once
#include "common/score_math.hpp"
#include "expert_ffn/product.hpp"

namespace moeyard::cpu {
namespace {

using F16 = Lanes<float, 16>;

inline F16 masked(__mmask16 lanes, const float* from) { return (F16)_mm512_maskz_loadu_ps(lanes, from); }
inline void put(__mmask16 lanes, float* to, F16 v) { _mm512_mask_storeu_ps(to, lanes, (__m512)v); }

/// out = silu(gate) * value, or max(gate, 0); gate and value have rows of h_row, out of out_row.
inline void activate(bool swiglu, int64_t rows, int64_t columns, const float* gate, const float* value, int64_t h_row,
                     float* out, int64_t out_row) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += 16) {
      const __mmask16 lanes = first_lanes(columns - j);
      const F16 g = masked(lanes, gate + i * h_row + j);
      // A NaN fails the comparison and stays, as in torch.
      const F16 a = swiglu ? g * score_math::sigmoid(g) * masked(lanes, value + i * h_row + j) : g < F16{} ? F16{} : g;
      put(lanes, out + i * out_row + j, a);
    }
}

/// From da, the gradient of the activation: that of gate and value, and the activation itself in tiles of 8 columns
/// (see pack_transposed) of `depth` rows each.
inline void activate_backward(bool swiglu, int64_t rows, int64_t columns, const float* gate, const float* value,
                              int64_t h_row, const float* da, float* grad_gate, float* grad_value, int64_t grad_row,
                              float* tiles, int64_t depth) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += 16) {
      const __mmask16 lanes = first_lanes(columns - j);
      const F16 g = masked(lanes, gate + i * h_row + j), d = masked(lanes, da + i * kPanel + j);
      F16 a = g < F16{} ? F16{} : g;
      if (swiglu) {
        const F16 v = masked(lanes, value + i * h_row + j), s = score_math::sigmoid(g), silu = g * s;
        a = silu * v;
        put(lanes, grad_value + i * grad_row + j, d * silu);
        put(lanes, grad_gate + i * grad_row + j, d * v * (s + silu * (1.0f - s)));
      } else {
        put(lanes, grad_gate + i * grad_row + j, g <= F16{} ? F16{} : d);
      }
      // Lanes 0 to 7 go into one tile, 8 to 15 into the next: a masked store leaves out what lies before it.
      put(0x00FF, tiles + j * depth + i * kTile, a);
      if (j + kTile < columns) put(0xFF00, tiles + (j + kTile) * depth + i * kTile - kTile, a);
    }
}

}  // namespace
}  // namespace moeyard::cpu
