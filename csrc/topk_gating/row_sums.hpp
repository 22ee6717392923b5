// The first stage of the sums over rows. Row t of a chunk adds to lane t % 16, whether rows are taken one by one or as
// the lanes of vectors of any width; after 16 rows per lane they are folded into the chunk's sum, which keeps float32
// sums over many rows accurate.
#pragma once
#include "topk_gating/chunk_sums.hpp"
#include "topk_gating/lane_rows.hpp"
#include "topk_gating/row.hpp"

namespace moeyard::cpu {
namespace {

constexpr int64_t kRowsPerFold = 16;  // of each lane

/// Above this number of experts rows are taken one by one, and a sum has a single lane.
constexpr int64_t kLaneExperts = 1024, kSumLanes = 16;
constexpr int64_t sum_lanes(int64_t experts) { return experts <= kLaneExperts ? kSumLanes : 1; }

/// The sums of the rows since the last fold: [E][lanes], [E][lanes], [2][lanes]. Where experts and slots are few,
/// blocks count in lanes too.
template <class A, int W>
struct LaneSums {
  using Word = typename score_math::Format<A>::Word;
  int64_t experts, lanes;
  bool few;
  A *score, *weight, *scalar;
  Word* few_counts;

  LaneSums(Carver& carve, const GatingProblem& g) : experts(g.experts), lanes(sum_lanes(g.experts)), few(is_few(g)) {
    for (A** sums : {&score, &weight}) *sums = carve.take<A>(experts * lanes);
    scalar = carve.take<A>(2 * lanes);
    few_counts = carve.take<Word>(few ? experts * lanes : 0);
    clear();
  }
  static int64_t count(const GatingProblem& g) { return ((is_few(g) ? 3 : 2) * g.experts + 2) * sum_lanes(g.experts); }

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
    if (few) fold(few_counts, experts, chunk.counts);
    clear();
  }

 private:
  static bool is_few(const GatingProblem& g) { return g.experts * g.k <= 64; }

  void clear() {
    std::fill(score, scalar + 2 * lanes, A(0));  // they lie together
    if (few) std::fill(few_counts, few_counts + experts * lanes, Word(0));
  }

  // Halves are added to halves. W entries at a time are turned, so that their lanes are added as vectors.
  template <class Number, class Sum>
  void fold(Number* lane, int64_t n, Sum* sum) {
    using V = Lanes<Number, W>;
    constexpr int parts = kSumLanes / W;
    int64_t i = 0;
    for (; lanes == kSumLanes && i + W <= n; i += W) {
      V entry[W];
      for (int j = 0; j < W; ++j) {
        V part[parts];
        for (int h = 0; h < parts; ++h) part[h] = load_lanes<V>(lane + (i + j) * kSumLanes + h * W);
        entry[j] = add_halves<parts>(part);
      }
      rows_to_columns(entry);
      const V total = add_halves<W>(entry);
      for (int j = 0; j < W; ++j) sum[i + j] += Sum(total[j]);
    }
    for (; i < n; ++i) {
      Number* entry = lane + i * lanes;
      for (int64_t half = lanes / 2; half > 0; half /= 2)
        for (int64_t l = 0; l < half; ++l) entry[l] += entry[l + half];
      sum[i] += Sum(entry[0]);
    }
  }
};

}  // namespace
}  // namespace moeyard::cpu
