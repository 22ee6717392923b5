// How many blocks and threads topk_gating's launchers take, forward and backward.
#pragma once
#include <algorithm>

#include "topk_gating/gate_row.cuh"

namespace moeyard::cuda {
namespace {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Whether a team of lanes can take a row: what is asked for has to fit its registers and slots.
inline bool fits_team(const GatingProblem& g) {
  const int64_t group = g.num_groups > 0 ? g.experts / g.num_groups : kLanes;
  return g.dtype != DType::f64 && g.experts <= kTeamExperts && g.k <= kTeamSlots && group % kLanes == 0 &&
         (g.num_groups == 0 || g.group_score_experts <= 2);
}

struct Shape {
  int64_t blocks;
  int threads;
};

/// At least one block, so that sums over no rows are written too.
template <class Team>
Shape team_shape(int64_t rows) {
  constexpr int64_t rows_per_warp = Team::per_warp, most_blocks = kMultiprocessors * gate_blocks_per_sm(Team::count);
  const int64_t warps = std::clamp<int64_t>(divide_up(rows, rows_per_warp * kSpread), 1, kGateThreads / kLanes);
  const int64_t blocks = divide_up(rows, rows_per_warp * warps);
  return {std::clamp<int64_t>(blocks, 1, most_blocks), int(warps) * kLanes};
}
inline Shape block_shape(const GatingProblem& g) {
  return {std::clamp<int64_t>(g.rows, 1, kMaxBlockRows),
          g.experts <= kSmallRow ? kSmallBlockRowThreads : kBlockRowThreads};
}

}  // namespace
}  // namespace moeyard::cuda
