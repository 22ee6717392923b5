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

// Sums 32 columns of n rows, one per lane, in row_sum's order: warp w adds rows w, w + 32, ..., then halves are added.
template <class Number, class At>
__device__ Number column_sum(int n, Number (*partial)[kLanes + 1], bool inside, At at) {
  const int lane = int(threadIdx.x) % kLanes, warp = int(threadIdx.x) / kLanes;
  Number sum = 0;
#pragma unroll 8
  for (int i = warp; i < n; i += kLanes)
    if (inside) sum += at(i);
  partial[lane][warp] = sum;
  __syncthreads();
  // Turned over: warp w has column w, and the rows' sums are in its lanes.
  Number total = partial[warp][lane];
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) total += __shfl_xor_sync(kAllLanes, total, d);
  __syncthreads();
  return total;
}

/// One block of 32 warps per 32 experts; the first also adds up the two scalars.
template <class A>
__global__ void __launch_bounds__(1024) sums_kernel(BlockSums<A> from, int blocks, GatingOutputs out) {
  CU_SHARED(A, partial, [kLanes][kLanes + 1]);
  CU_SHARED(int32_t, counted, [kLanes][kLanes + 1]);
  const int lane = int(threadIdx.x) % kLanes, warp = int(threadIdx.x) / kLanes, first = int(blockIdx.x) * kLanes;
  const int column = first + lane, expert = first + warp;
  const bool inside = column < from.experts, writes = lane == 0 && expert < from.experts;
  const A score = column_sum<A>(blocks, partial, inside, [&](int b) { return from.score(b)[column]; });
  const A weight = column_sum<A>(blocks, partial, inside, [&](int b) { return from.weight(b)[column]; });
  const int32_t count = column_sum<int32_t>(blocks, counted, inside, [&](int b) { return from.count(b)[column]; });
  if (writes) {
    static_cast<A*>(out.score_sum)[expert] = score;
    static_cast<A*>(out.weight_sum)[expert] = weight;
    out.counts[expert] = count;
  }
  if (blockIdx.x > 0) return;
  const A scalar = column_sum<A>(blocks, partial, lane < 2, [&](int b) { return from.scalar(b)[lane]; });
  if (lane == 0 && warp < 2) *static_cast<A*>(warp == 0 ? out.logsumexp_sq : out.entropy_sum) = scalar;
}

}  // namespace
}  // namespace moeyard::cuda
