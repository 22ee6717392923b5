// A matrix of words whose rows belong to segments, cut into tiles: a block marks in shared memory where segments start
// in its tile, and spreads the marks over the rows. Segments may be of any length, and a row has one look-up however
// many words it has.
#pragma once
#include <algorithm>

#include "common/device.cuh"
#include "common/grid.cuh"
#include "common/scan.cuh"
#include "common/words.cuh"

namespace moeyard::cuda {
namespace {

constexpr int kRowsEach = 4;  // of a thread, in a full tile
constexpr int64_t kTileRows = kThreads * kRowsEach;
constexpr int64_t kFewRows = 64, kBlocks = 528;  // small batches have tiles of fewer rows, to reach 132 multiprocessors
constexpr int64_t kTileWords = 4096;
constexpr int64_t kMostColumnTiles = 65535;

struct Tiles {
  int64_t total, row_words, columns;  // columns: words of a row in a tile
  int rows;
  uint64_t reciprocal;  // word / columns = word * reciprocal >> 32 inside a tile

  Tiles(int64_t total_, int64_t row_words_) : total(total_), row_words(row_words_) {
    columns = std::clamp<int64_t>(row_words, 1, std::max(kTileWords, ceil_div(row_words, kMostColumnTiles)));
    const int64_t most = std::clamp<int64_t>(kTileWords / columns, 1, kTileRows);
    rows = int(std::min(most, std::max(kFewRows, ceil_div(total, kBlocks))));
    // Exact, because words stay below 2^16 in a tile, unless it has one row: that needs no division.
    reciprocal = rows == 1 ? 0 : uint64_t(ceil_div(int64_t(1) << 32, columns));
  }
  dim3 grid() const {
    return {unsigned(ceil_div(total, rows)), unsigned(ceil_div(std::max<int64_t>(row_words, 1), columns))};
  }
  __device__ int64_t first_row() const { return blockIdx.x * int64_t(rows); }
  __device__ int rows_here() const { return int(min(int64_t(rows), total - first_row())); }
  __device__ int row_of(int word) const { return int(word * reciprocal >> 32); }
  /// The column of the tile's word, which may lie past the row's end.
  __device__ int64_t column_of(int word, int row) const { return blockIdx.y * columns + (word - row * columns); }
};

// The last i with start(i) <= row, -1 for none; for a whole warp.
template <class Starts>
__device__ int64_t last_start(const Starts& starts, int64_t row) {
  const int lane = int(threadIdx.x) % 32;
  int64_t low = -1, high = starts.count();
  while (high - low > 1) {
    const int64_t step = (high - low + 31) / 32, at = low + lane * step;
    const unsigned before = __ballot_sync(0xffffffffu, at < 0 || (at < high && starts(at) <= row));
    low += (__popc(before) - 1) * step;
    high = min(high, low + step);
  }
  return low;
}

struct Largest {
  int64_t i = -1;
  __device__ Largest operator+(const Largest& o) const { return {max(i, o.i)}; }
};

/// segment_of[r]: the last i with start(i) <= the tile's row r, -1 for none. Starts do not fall with i.
template <class Starts>
__device__ void number_rows(const Tiles& tiles, const Starts& starts, int64_t (&segment_of)[kTileRows]) {
  const int64_t first = tiles.first_row(), end = first + tiles.rows_here(), n = starts.count();
  const int64_t before = last_start(starts, first);
  for (int r = int(threadIdx.x); r < kTileRows; r += kThreads) segment_of[r] = before;
  __syncthreads();
  for (int64_t i = before + 1 + threadIdx.x; i < n; i += kThreads) {
    const int64_t start = starts(i);
    if (start >= end) break;  // and so do the thread's later ones
    if (i + 1 == n || starts(i + 1) > start) segment_of[start - first] = i;
  }
  __syncthreads();
  int64_t* const mine = segment_of + threadIdx.x * kRowsEach;
#pragma unroll
  for (int j = 1; j < kRowsEach; ++j) mine[j] = max(mine[j - 1], mine[j]);
  Largest sum{mine[kRowsEach - 1]}, all;
  const Largest below = sum_of_lanes(sum);
  const int64_t earlier = (sum_of_warps<kWarps>(sum, all) + below).i;
#pragma unroll
  for (int j = 0; j < kRowsEach; ++j) mine[j] = max(earlier, mine[j]);
  __syncthreads();
}

}  // namespace
}  // namespace moeyard::cuda
