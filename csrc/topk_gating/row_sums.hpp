// The first stage of the sums over rows. Row t of a chunk adds to lane t % 16, whether rows are taken one by one or as
// the lanes of vectors of any width; after 64 rows the lanes are folded into the chunk's sum, which keeps float32 sums
// over many rows accurate.
#pragma once
#include "topk_gating/chunk_sums.hpp"
#include "topk_gating/row.hpp"

namespace moeyard::cpu {
namespace {

constexpr int64_t kBlockRows = 64;

/// Above this number of experts rows are taken one by one, and a sum has a single lane.
constexpr int64_t kLaneExperts = 512;
constexpr int64_t sum_lanes(int64_t experts) { return experts <= kLaneExperts ? 16 : 1; }

/// The sums of the rows since the last fold: [E][lanes], [E][lanes], [2][lanes].
template <class A>
struct LaneSums {
  int64_t experts, lanes;
  A *score, *weight, *scalar;

  LaneSums(Carver& carve, int64_t experts) : experts(experts), lanes(sum_lanes(experts)) {
    for (A** sums : {&score, &weight}) *sums = carve.take<A>(experts * lanes);
    scalar = carve.take<A>(2 * lanes);
  }
  static int64_t count(int64_t experts) { return (2 * experts + 2) * sum_lanes(experts); }

  void clear() { std::fill(score, score + count(experts), A(0)); }

  void add_row_scalars(int64_t lane, const RowSoftmax<A>& row) {
    const A lse = row.log_sum_exp();
    scalar[lane] += row.has_nan ? std::numeric_limits<A>::quiet_NaN() : lse * lse;
    scalar[lanes + lane] += row.entropy;
  }

  /// Joins the chunk's sums and starts again at 0.
  void fold_into(ChunkSums<A>& chunk) {
    fold(score, experts, chunk.score);
    fold(weight, experts, chunk.weight);
    fold(scalar, 2, chunk.scalar);
    clear();
  }

 private:
  void fold(A* lane, int64_t n, A* sum) {
    for (int64_t i = 0; i < n; ++i, lane += lanes) {
      for (int64_t half = lanes / 2; half > 0; half /= 2)
        for (int64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
      sum[i] += lane[0];
    }
  }
};

}  // namespace
}  // namespace moeyard::cpu
