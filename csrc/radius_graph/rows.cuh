// All edges in free space: a thread per centre looks through the grid of cells and keeps the neighbours that it finds
// in a row of shared memory, which its warp sorts and stores; when all counts are known, a warp per centre writes the
// edges. Centres with more neighbours than a row holds are searched again, each by a warp.
#pragma once
#include "radius_graph/cells.cuh"
#include "radius_graph/edges.cuh"
#include "radius_graph/lists.cuh"

namespace moeyard::cuda {
namespace {

constexpr int kRowThreads = 128, kRowWarps = kRowThreads / 32;
constexpr int kRowLength = 48;  // neighbours, up to 64
constexpr int kLongRowBlocks = 2048;
constexpr int32_t kNobody = 0x7fffffff;  // sorts behind every row number

/// What the kernels of such a search read and write.
template <class T>
struct RowSearch {
  Call<T> call;
  Cells<T> cells;
  T limit2;          // the largest square of an edge's length
  int64_t* offsets;  // [centres + 1] first edges
  RadiusOutputs out;
  int32_t* rows;       // [centres, kRowLength] neighbours in order, where there are no more
  int32_t* long_rows;  // [*num_long_rows] the other centres
  unsigned* num_long_rows;
  uint64_t* keys;  // [capacity + 32] of the edges of long rows

  /// Centres in the order of the grid lie together, and so do the points that they ask for.
  __device__ int64_t centre(int64_t number) const { return call.pairs.same ? cells.items[number].id : number; }
};

// ---- sorting in registers -------------------------------------------------------------------------------------------

/// Sorts one value per lane, if they grow and then fall.
__device__ inline int32_t merge_lanes(int32_t value) {
#pragma unroll
  for (int stride = 16; stride > 0; stride /= 2) {
    const int32_t other = __shfl_xor_sync(kAllLanes, value, stride);
    value = lane_number() & stride ? max(value, other) : min(value, other);
  }
  return value;
}

/// Sorts one value per lane: runs of growing length, every other one backwards.
__device__ inline int32_t sort_lanes(int32_t value) {
#pragma unroll
  for (int size = 2; size < 32; size *= 2)
#pragma unroll
    for (int stride = size / 2; stride > 0; stride /= 2) {
      const int32_t other = __shfl_xor_sync(kAllLanes, value, stride);
      const bool larger = ((lane_number() & stride) != 0) != ((lane_number() & size) != 0);
      value = larger ? max(value, other) : min(value, other);
    }
  return merge_lanes(value);
}

/// A row of at most 64, sorted and stored.
__device__ inline void store_row(const int32_t* found, int n, int32_t* row) {
  const int lane = lane_number();
  int32_t low = sort_lanes(lane < n ? found[lane] : kNobody);
  if (n > 32) {
    const int32_t high = sort_lanes(lane + 32 < n ? found[lane + 32] : kNobody);
    const int32_t mirrored = __shfl_sync(kAllLanes, high, 31 - lane);
    const int32_t larger = merge_lanes(max(low, mirrored));
    low = merge_lanes(min(low, mirrored));
    if (lane + 32 < n) row[lane + 32] = larger;
  }
  if (lane < n) row[lane] = low;
}

// ---- kernels --------------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kRowThreads) find_rows_kernel(RowSearch<T> s) {
  CU_SHARED(int32_t, found, [kRowThreads][kRowLength + 1]);  // the odd length spreads the rows over the banks
  const int64_t number = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  const bool exists = number < s.call.centres.set.count;
  const int32_t i = exists ? int32_t(s.centre(number)) : 0;
  int32_t* const mine = found[threadIdx.x];
  int n = 0;
  if (exists) {
    const Centre<T> centre(s.call, i);
    if (!centre.isolated)
      for_each_item<1>(s.call, s.cells, centre, s.limit2, [&](bool hit, int32_t j) {
        if (hit & (n < kRowLength)) mine[n] = j;
        n += hit;
      });
    s.out.num_neighbors[i] = n;
    if (n > kRowLength) s.long_rows[atomicAdd(s.num_long_rows, 1u)] = i;
  }
  __syncwarp();
  for (int lane = 0; lane < 32; ++lane) {
    const int length = __shfl_sync(kAllLanes, n, lane);
    const int64_t row = __shfl_sync(kAllLanes, i, lane);
    if (length > 0 && length <= kRowLength)
      store_row(found[threadIdx.x / 32 * 32 + lane], length, s.rows + row * kRowLength);
  }
}

template <class T>
__global__ void __launch_bounds__(kRowThreads) write_rows_kernel(RowSearch<T> s) {
  const int64_t i = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / 32;
  if (i >= s.call.centres.set.count) return;
  const int64_t first = s.offsets[i], found = s.offsets[i + 1] - first, room = s.out.capacity - first;
  if (found > kRowLength || room <= 0) return;
  const int n = int(min(found, room));
  const int32_t* const row = s.rows + i * kRowLength;
#pragma unroll 1
  for (int k = lane_number(); k < n; k += 32) {
    s.out.centre[first + k] = i, s.out.neighbour[first + k] = row[k];
    if (s.out.distance) write_geometry(s.out, first + k, s.call.pairs(i, row[k]));
  }
}

template <class T>
__global__ void __launch_bounds__(kRowThreads) write_long_rows_kernel(RowSearch<T> s) {
  for (int64_t w = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / 32; w < int64_t(*s.num_long_rows);
       w += int64_t(gridDim.x) * kRowWarps) {
    const Centre<T> centre(s.call, s.long_rows[w]);
    KeyRow row(s.keys, s.offsets, centre.i, s.out.capacity);
    if (row.wanted <= 0) continue;
    for_each_item<32>(s.call, s.cells, centre, s.limit2, [&](bool hit, int32_t j) { row.take(hit, key_of(j, 0)); });
    row.tidy();
    write_edges(s.call, s.out, s.offsets[centre.i], centre, row.key, row.n);
  }
}

}  // namespace
}  // namespace moeyard::cuda
