// Prefix sums of values that one functor gives and another takes. Every block adds up its strip, then starts from the
// strips before it: two launches, one where a single strip does. No block waits for another.
//
// T is an integer or the like: sums in any order are equal. `Values` has T operator()(int64_t i); `Sums` has
// void operator()(int64_t i, T before, T value), and void total(T all), which one thread calls.
#pragma once
#include <algorithm>
#include <cstring>

#include "common/device.cuh"

namespace moeyard::cuda {
namespace {

constexpr int kSumThreads = 512, kSumWarps = kSumThreads / 32;
constexpr int kSumItems = 4;  // per thread at a time
constexpr int64_t kSumTile = kSumThreads * kSumItems;
constexpr int64_t kMostSumStrips = 1024;  // then a strip has several tiles

/// The value of another lane, for a whole warp.
template <class T>
__device__ T of_lane(const T& value, int source) {
  static_assert(sizeof(T) % sizeof(unsigned) == 0);
  unsigned words[sizeof(T) / sizeof(unsigned)];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (unsigned& word : words) word = __shfl_sync(0xffffffffu, word, source);
  T there;
  memcpy(&there, words, sizeof(T));
  return there;
}

/// The sum over the lanes before this one; `sum` becomes that over all.
template <class T>
__device__ T sum_of_lanes(T& sum) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const T below = of_lane(sum, lane - d);
    if (lane >= d) sum = below + sum;
  }
  const T before = of_lane(sum, lane - 1);
  sum = of_lane(sum, 31);
  return lane == 0 ? T{} : before;
}

/// The sum over the warps before this one; `total` grows by that over all. For a whole block of so many warps.
template <int kWarps, class T>
__device__ T sum_of_warps(const T& mine, T& total) {
  CU_SHARED(T, sums, [kWarps]);
  const int warp = int(threadIdx.x) / 32;
  if (threadIdx.x % 32 == 0) sums[warp] = mine;
  __syncthreads();
  T before = total;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before = total;
    total = total + sums[w];
  }
  __syncthreads();
  return before;
}

template <class T, class Values>
__global__ void __launch_bounds__(kSumThreads) strip_sums_kernel(Values values, int64_t n, int64_t length, T* sums) {
  const int64_t begin = blockIdx.x * length, end = min(n, begin + length);
  T mine{}, total{};
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += kSumThreads) mine = mine + values(i);
  sum_of_lanes(mine);
  sum_of_warps<kSumWarps>(mine, total);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

template <class T, class Values, class Sums>
__global__ void __launch_bounds__(kSumThreads)
    prefix_sums_kernel(Values values, Sums out, int64_t n, int64_t length, const T* strips) {
  T earlier{}, total{};
  for (int s = int(threadIdx.x); s < int(blockIdx.x); s += kSumThreads) earlier = earlier + strips[s];
  sum_of_lanes(earlier);
  sum_of_warps<kSumWarps>(earlier, total);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int64_t begin = blockIdx.x * length, end = min(n, begin + length);
  for (int64_t first = begin; first < end; first += kSumTile) {
    const int64_t at = first + warp * (kSumItems * 32) + lane;  // a warp's values lie in a row
    T value[kSumItems], before[kSumItems], mine{};
#pragma unroll
    for (int j = 0; j < kSumItems; ++j) value[j] = at + j * 32 < end ? values(at + j * 32) : T{};
#pragma unroll
    for (int j = 0; j < kSumItems; ++j) {
      T row = value[j];
      before[j] = mine + sum_of_lanes(row);
      mine = mine + row;
    }
    const T base = sum_of_warps<kSumWarps>(mine, total);
#pragma unroll
    for (int j = 0; j < kSumItems; ++j)
      if (at + j * 32 < end) out(at + j * 32, base + before[j], value[j]);
  }
  if (blockIdx.x + 1 == gridDim.x && threadIdx.x == 0) out.total(total);
}

/// How the values are shared by blocks.
struct SumShape {
  int64_t n, length;
  int strips;

  explicit SumShape(int64_t n_) : n(n_) {
    const int64_t tiles = std::max<int64_t>(1, (n + kSumTile - 1) / kSumTile);
    length = (tiles + kMostSumStrips - 1) / kMostSumStrips * kSumTile;
    strips = int((tiles * kSumTile + length - 1) / length);
  }
};

/// Items of type T that prefix_sums needs as a workspace.
inline int64_t prefix_sums_workspace(int64_t n) { return SumShape(n).strips; }

template <class T, class Values, class Sums>
void prefix_sums(const Values& values, const Sums& out, int64_t n, T* workspace, Stream stream) {
  const SumShape shape(n);
  const dim3 grid(unsigned(shape.strips)), block(kSumThreads);
  if (shape.strips > 1)
    cu_launch(strip_sums_kernel<T, Values>, grid, block, 0, stream, values, n, shape.length, workspace);
  cu_launch(prefix_sums_kernel<T, Values, Sums>, grid, block, 0, stream, values, out, n, shape.length, workspace);
}

}  // namespace
}  // namespace moeyard::cuda
