// The sums over rows, in two stages without float atomics: every block writes its own into the workspace, then
// sums_kernel adds those up in a fixed order.
#pragma once
#include "topk_gating/gate_row.cuh"

namespace moeyard::cuda {
namespace {

/// The workspace: per block E scores, E weights, the sums of lse^2 and of the entropy, all A; then E counts per block.
template <class A>
struct BlockSums {
  A* sums;
  int32_t* counts;
  int experts;

  __host__ __device__ BlockSums(void* workspace, int blocks, int64_t experts_)
      : sums(static_cast<A*>(workspace)),
        counts(reinterpret_cast<int32_t*>(sums + blocks * (2 * experts_ + 2))),
        experts(int(experts_)) {}
  static int64_t bytes(int64_t blocks, int64_t experts) {
    return blocks * ((2 * experts + 2) * int64_t(sizeof(A)) + experts * int64_t(sizeof(int32_t)));
  }
  __device__ A* score(int block) const { return sums + int64_t(block) * (2 * experts + 2); }
  __device__ A* weight(int block) const { return score(block) + experts; }
  __device__ A* scalar(int block) const { return score(block) + 2 * experts; }
  __device__ int32_t* count(int block) const { return counts + int64_t(block) * experts; }
};

/// What a lane adds up of one column of the blocks' sums.
template <class A>
struct ColumnSums {
  A score, weight;
  int32_t count;
};

// The sum over the warps of a block of what each has of 32 columns, one per lane; warp w gets that of column w. Warp w
// adds rows w, w + 32, ..., so all is in row_sum's order.
template <class Number>
__device__ Number column_sum(Number mine, Number (*partial)[kLanes + 1]) {
  const int lane = int(threadIdx.x) % kLanes, warp = int(threadIdx.x) / kLanes;
  partial[lane][warp] = mine;
  __syncthreads();
  Number total = partial[warp][lane];
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) total += __shfl_xor_sync(kAllLanes, total, d);
  return total;
}

/// One block of 32 warps per 32 experts, and a last one for the two scalars.
template <class A>
__global__ void __launch_bounds__(1024) sums_kernel(BlockSums<A> from, int blocks, GatingOutputs out) {
  CU_SHARED(A, scores, [kLanes][kLanes + 1]);
  CU_SHARED(A, weights, [kLanes][kLanes + 1]);
  CU_SHARED(int32_t, counts, [kLanes][kLanes + 1]);
  const int lane = int(threadIdx.x) % kLanes, warp = int(threadIdx.x) / kLanes, first = int(blockIdx.x) * kLanes;
  if (first >= from.experts) {
    A scalar = 0;
    for (int b = warp; b < blocks; b += kLanes)
      if (lane < 2) scalar += from.scalar(b)[lane];
    scalar = column_sum(scalar, scores);
    if (lane == 0 && warp < 2) *static_cast<A*>(warp == 0 ? out.logsumexp_sq : out.entropy_sum) = scalar;
    return;
  }
  const int column = first + lane, expert = first + warp;
  ColumnSums<A> sum{};
  // Unrolled, so that the loads of several rows are on their way together.
#pragma unroll 4
  for (int b = warp; b < blocks && column < from.experts; b += kLanes) {
    sum.score += from.score(b)[column];
    sum.weight += from.weight(b)[column];
    sum.count += from.count(b)[column];
  }
  const A score = column_sum(sum.score, scores), weight = column_sum(sum.weight, weights);
  const int32_t count = column_sum(sum.count, counts);
  if (lane == 0 && expert < from.experts) {
    static_cast<A*>(out.score_sum)[expert] = score;
    static_cast<A*>(out.weight_sum)[expert] = weight;
    out.counts[expert] = count;
  }
}

}  // namespace
}  // namespace moeyard::cuda
