// What topk_gating sums over rows, in two stages: each chunk of rows on its own, then the chunks in order.
#pragma once
#include <algorithm>
#include <cstdint>

#include "topk_gating/scratch.hpp"
#include "topk_gating/topk_gating.hpp"

namespace moeyard::cpu {

/// The sums of one chunk, in the workspace. Scalars: [0] lse^2, [1] entropy.
template <class A>
struct ChunkSums {
  A *score, *weight, *scalar;
  int32_t* counts;

  ChunkSums(void* workspace, int64_t chunk, int64_t experts) {
    Carver carve(static_cast<char*>(workspace) + chunk * bytes(experts));
    score = carve.take<A>(experts), weight = carve.take<A>(experts), scalar = carve.take<A>(2);
    counts = carve.take<int32_t>(experts);
  }
  void clear(int64_t experts) {
    std::fill(score, scalar + 2, A(0));  // they lie together
    std::fill(counts, counts + experts, 0);
  }
  static int64_t bytes(int64_t experts) {
    const int64_t raw = (2 * experts + 2) * int64_t(sizeof(A)) + experts * int64_t(sizeof(int32_t));
    return (raw + 7) / 8 * 8;
  }
};

/// The second stage.
template <class A>
void add_chunks(const GatingProblem& g, const GatingOutputs& out, void* workspace, int64_t chunks) {
  A *score_sum = static_cast<A*>(out.score_sum), *weight_sum = static_cast<A*>(out.weight_sum);
  A lse_sq = 0, entropy = 0;
  std::fill(score_sum, score_sum + g.experts, A(0));
  std::fill(weight_sum, weight_sum + g.experts, A(0));
  std::fill(out.counts, out.counts + g.experts, 0);
  for (int64_t n = 0; n < chunks; ++n) {
    const ChunkSums<A> chunk(workspace, n, g.experts);
    for (int64_t i = 0; i < g.experts; ++i) {
      score_sum[i] += chunk.score[i];
      weight_sum[i] += chunk.weight[i];
      out.counts[i] += chunk.counts[i];
    }
    lse_sq += chunk.scalar[0], entropy += chunk.scalar[1];
  }
  *static_cast<A*>(out.logsumexp_sq) = lse_sq;
  *static_cast<A*>(out.entropy_sum) = entropy;
}

}  // namespace moeyard::cpu
