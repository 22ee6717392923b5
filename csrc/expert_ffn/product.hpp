// Products of small matrices on AVX-512: C = A B or C += A B, float32, 8 rows by 32 columns of C in registers.
//
// B comes in panels of 32 columns, packed [depth][32]; A is read as it lies, or packed in tiles of 8 columns for A^T.
// Eight rows and two vectors are 16 independent sums, enough to hide the latency of two fused multiply-adds a cycle,
// and divide the usual sizes.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "expert_ffn/expert_ffn.hpp"

namespace moeyard::cpu {
namespace {

constexpr int64_t kTile = 8, kPanel = 32;
/// Depth of one pass: 512 rows of a panel are 64 KiB, which the second-level cache delivers fast enough.
constexpr int64_t kDepth = 512;

/// Left factor: element (i, k) at data[i * row + k * step].
struct Left {
  const float* data;
  int64_t row, step;
};

inline __mmask16 first_lanes(int64_t n) { return __mmask16(n >= 16 ? 0xFFFF : n <= 0 ? 0 : (1u << n) - 1); }

template <int rows>
void tile(int64_t depth, const Left& a, const float* panel, float* c, int64_t c_row, __mmask16 low, __mmask16 high,
          bool add) {
  __m512 sum[rows][2];
  for (int i = 0; i < rows; ++i) {
    sum[i][0] = add ? _mm512_maskz_loadu_ps(low, c + i * c_row) : _mm512_setzero_ps();
    sum[i][1] = add ? _mm512_maskz_loadu_ps(high, c + i * c_row + 16) : _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < depth; ++k) {
    const __m512 b0 = _mm512_loadu_ps(panel + k * kPanel), b1 = _mm512_loadu_ps(panel + k * kPanel + 16);
    for (int i = 0; i < rows; ++i) {
      const __m512 left = _mm512_set1_ps(a.data[i * a.row + k * a.step]);
      sum[i][0] = _mm512_fmadd_ps(left, b0, sum[i][0]);
      sum[i][1] = _mm512_fmadd_ps(left, b1, sum[i][1]);
    }
  }
  for (int i = 0; i < rows; ++i) {
    _mm512_mask_storeu_ps(c + i * c_row, low, sum[i][0]);
    _mm512_mask_storeu_ps(c + i * c_row + 16, high, sum[i][1]);
  }
}

/// C[rows, columns] (+)= A[rows, depth] panel[depth, 32], columns <= 32; depth 0 counts as zeros.
inline void product(int64_t rows, int64_t depth, const Left& a, const float* panel, float* c, int64_t c_row,
                    int64_t columns, bool add) {
  using Tile = void (*)(int64_t, const Left&, const float*, float*, int64_t, __mmask16, __mmask16, bool);
  static constexpr Tile kTiles[] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>, tile<7>, tile<8>};
  const __mmask16 low = first_lanes(columns), high = first_lanes(columns - 16);
  for (int64_t k = 0; k == 0 || k < depth; k += kDepth) {
    const int64_t deep = std::min(kDepth, depth - k);
    for (int64_t i = 0; i < rows; i += kTile) {
      const Left part{a.data + i * a.row + k * a.step, a.row, a.step};
      kTiles[std::min(kTile, rows - i) - 1](deep, part, panel + k * kPanel, c + i * c_row, c_row, low, high,
                                            add || k > 0);
    }
  }
}

/// Right factor: element (k, j) at data[k * row + j * column].
struct Right {
  const float* data;
  int64_t row, column;
};

/// Packs `columns` <= 32 columns into a panel, zeros behind them.
inline void pack(const Right& b, int64_t depth, int64_t columns, float* panel) {
  const __mmask16 low = first_lanes(columns), high = first_lanes(columns - 16);
  if (b.column == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      _mm512_storeu_ps(panel + k * kPanel, _mm512_maskz_loadu_ps(low, b.data + k * b.row));
      _mm512_storeu_ps(panel + k * kPanel + 16, _mm512_maskz_loadu_ps(high, b.data + k * b.row + 16));
    }
    return;
  }
  // Columns lie apart: 32 of them at a time stay in the first-level cache while k runs along them.
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i place = _mm512_mullo_epi32(lane, _mm512_set1_epi32(int32_t(b.column)));
  for (int64_t k = 0; k < depth; ++k) {
    const float* from = b.data + k * b.row;
    const __m512 zero = _mm512_setzero_ps();
    _mm512_storeu_ps(panel + k * kPanel, _mm512_mask_i32gather_ps(zero, low, place, from, 4));
    _mm512_storeu_ps(panel + k * kPanel + 16, _mm512_mask_i32gather_ps(zero, high, place, from + 16 * b.column, 4));
  }
}

/// Packs A^T for A[depth, columns]: tiles of 8 columns, each [depth][8], zeros behind the last column.
inline void pack_transposed(const float* a, int64_t a_row, int64_t depth, int64_t columns, float* tiles) {
  for (int64_t j = 0; j < columns; j += kTile) {
    const auto lanes = __mmask8(columns - j >= kTile ? 0xFF : (1u << (columns - j)) - 1);
    for (int64_t k = 0; k < depth; ++k)
      _mm256_storeu_ps(tiles + (j * depth + k * kTile), _mm256_maskz_loadu_ps(lanes, a + k * a_row + j));
  }
}

}  // namespace
}  // namespace moeyard::cpu
