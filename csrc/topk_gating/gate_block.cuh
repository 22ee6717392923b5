// A row per block, in shared memory: any number of experts, slots and groups, and float64. What forward and backward
// share, and the choice, by sorting.
#pragma once
#include "topk_gating/gate_row.cuh"

namespace moeyard::cuda {
namespace {

/// term(0) + ... + term(n-1) in row_sum's order, for all lanes of the calling warp.
template <class A, class Term>
__device__ A warp_sum(int n, Term term) {
  A sum = 0;
  for (int i = int(threadIdx.x) % kLanes; i < n; i += kLanes) sum += term(i);
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
  return sum;
}

/// The same for all threads of the block, and for two sums at once.
template <class A, class First, class Second>
__device__ void block_sums(int n, First first, Second second, A& first_sum, A& second_sum) {
  CU_SHARED(A, sum, [2]);
  const int warp = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
  __syncthreads();
  if (warp == 0) {
    const A v = warp_sum<A>(n, first);
    if (lane == 0) sum[0] = v;
  } else if (warp == 1) {
    const A v = warp_sum<A>(n, second);
    if (lane == 0) sum[1] = v;
  }
  __syncthreads();
  first_sum = sum[0], second_sum = sum[1];
}
template <class A, class Term>
__device__ A block_sum(int n, Term term) {
  A sum, nothing;
  block_sums<A>(n, term, [](int) { return A(0); }, sum, nothing);
  return sum;
}

/// The largest of at(0) ... at(n-1) but for NaN, -inf if there is none; sets `nan` where there is one.
template <class A, class At>
__device__ A block_max(int n, At at, bool& nan) {
  CU_SHARED(A, largest, [kLanes]);
  const int warps = int(blockDim.x) / kLanes, warp = int(threadIdx.x) / kLanes;
  A max = kLowest<A>;
  bool seen = false;
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) {
    const A v = at(i);
    seen |= v != v;
    max = v > max ? v : max;
  }
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, max, d);
    max = other > max ? other : max;
  }
  nan = __syncthreads_or(seen) != 0;
  if (threadIdx.x % kLanes == 0) largest[warp] = max;
  __syncthreads();
  for (int w = 0; w < warps; ++w) max = largest[w] > max ? largest[w] : max;
  return max;
}

/// The softmax over at(0) ... at(n-1); writes the exponentials, not yet divided by their sum, to e.
template <class A, class At>
__device__ RowSoftmax<A> block_softmax(int n, At at, A* e, bool& nan) {
  using score_math::capped;
  RowSoftmax<A> row;
  const A max = block_max<A>(n, at, nan);
  const bool none = !(max > kLowest<A>);
  row.max = none ? A(0) : capped(max);
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) {
    const A v = at(i);
    e[i] = none || v != v ? A(0) : score_math::exp_nonpositive(capped(v) - row.max);
  }
  A sum, dot;
  const auto weighted = [&](int i) { return e[i] > A(0) ? e[i] * (capped(at(i)) - row.max) : A(0); };
  block_sums<A>(n, [&](int i) { return e[i]; }, weighted, sum, dot);
  if (none) return row;
  row.sum = sum;
  row.finish(dot);
  return row;
}

/// Logit i of a row, whatever the element type.
template <class A>
struct RowReader {
  const void* row;
  DType dtype;

  __device__ RowReader(const GatingProblem& g, const void* logits, int64_t t)
      : row(static_cast<const char*>(logits) + t * g.experts *
                                                   (sizeof(A) == 8                                    ? 8
                                                    : g.dtype == DType::bf16 || g.dtype == DType::f16 ? 2
                                                                                                      : 4)),
        dtype(g.dtype) {}
  __device__ A operator()(int i) const {
    if constexpr (sizeof(A) == 8) {
      return static_cast<const double*>(row)[i];
    } else {
      float x = 0;
      with_element(dtype, [&](auto* type) { x = widen(static_cast<decltype(type)>(row)[i]); });
      return x;
    }
  }
};

// ---- sorting ----------------------------------------------------------------------------------------------------

template <class A>
struct KeyBits;
template <>
struct KeyBits<float> {
  using type = uint32_t;
  __device__ static uint32_t of(float v) { return uint32_t(score_math::to_bits(v)); }
};
template <>
struct KeyBits<double> {
  using type = uint64_t;
  __device__ static uint64_t of(double v) { return uint64_t(score_math::to_bits(v)); }
};

/// A key as an unsigned number of the same order: NaN, which is not to be chosen, below everything; -0 equal to +0.
template <class A, class Bits = typename KeyBits<A>::type>
__device__ Bits ordered(A key) {
  constexpr Bits sign = Bits(1) << (8 * sizeof(A) - 1);
  if (key != key) return 0;
  const Bits bits = KeyBits<A>::of(key + A(0));
  return bits & sign ? ~bits : bits | sign;
}

/// Sorts n = 2^m entries, the largest key first, equal keys by id; entries of one `segment` stay together, lowest
/// segment first. A bitonic network: any two lists of the same entries end up alike. id < 2^13 with the segment above.
template <class Bits>
__device__ void sort_descending(Bits* key, int32_t* id, int n) {
  const auto later = [&](int a, int b) {
    const int segment_a = id[a] >> 13, segment_b = id[b] >> 13;
    if (segment_a != segment_b) return segment_a > segment_b;
    return key[a] != key[b] ? key[a] < key[b] : id[a] > id[b];
  };
  for (int length = 2; length <= n; length *= 2)
    for (int distance = length / 2; distance > 0; distance /= 2) {
      __syncthreads();
      for (int i = int(threadIdx.x); i < n / 2; i += int(blockDim.x)) {
        const int a = 2 * i - i % distance, b = a + distance;
        if (later(a, b) != ((a & length) != 0)) {
          const Bits k = key[a];
          const int32_t j = id[a];
          key[a] = key[b], id[a] = id[b];
          key[b] = k, id[b] = j;
        }
      }
    }
  __syncthreads();
}

}  // namespace
}  // namespace moeyard::cuda
