// A stable sort of the items 0 ... n - 1 by keys that a functor gives, ten bits at a time, the lowest first. Items are
// cut into strips, one per block: a strip's items are counted per digit, a scan over the strips turns counts into
// ranks, and every strip places its items. Three launches per digit; no block waits for another.
//
// `Keys` has operator()(int64_t item), a signed integer; items with negative keys are left out.
#pragma once
#include <algorithm>

#include "common/device.cuh"
#include "common/scan.cuh"
#include "common/workspace.hpp"

namespace moeyard::cuda {
namespace {

constexpr int kSortThreads = 256, kSortWarps = kSortThreads / 32;
constexpr int kSortItems = 4;  // per thread at a time: 131,072 items are 128 blocks
constexpr int kSortTile = kSortThreads * kSortItems;
constexpr int64_t kMostStrips = 1024;                        // then a strip has several tiles
constexpr int kDigitBits = 10, kMostBins = 1 << kDigitBits;  // a bin has ten counters of shared memory in place_strip
constexpr int kRankWarps = 32;                               // each has a share of the strips of 32 bins

/// How many items are sorted by keys from 0 to last_key, and how they are shared by blocks.
struct SortShape {
  int64_t items, last_key, length;  // length: items per strip, a multiple of kSortTile
  int strips, digits;

  SortShape(int64_t items_, int64_t last_key_) : items(items_), last_key(last_key_), digits(1) {
    const int64_t tiles = std::max<int64_t>(1, (items + kSortTile - 1) / kSortTile);
    length = (tiles + kMostStrips - 1) / kMostStrips * kSortTile;
    strips = int((tiles * kSortTile + length - 1) / length);
    while (digits * kDigitBits < 63 && last_key >> digits * kDigitBits) ++digits;
  }
  int bins(int digit) const { return int(std::min<int64_t>((last_key >> digit * kDigitBits) + 1, kMostBins)); }
};

/// Where a sort keeps what: parts of a workspace.
struct SortRoom {
  unsigned *counts, *totals, *listed;
  int32_t* list[2];

  /// Counts alone need no lists.
  SortRoom(const SortShape& shape, bool lists, Workspace& w) {
    counts = w.take<unsigned>(int64_t(shape.strips) * shape.bins(0));
    totals = w.take<unsigned>(shape.bins(0)), listed = w.take<unsigned>(1);
    for (int i = 0; i < 2; ++i) list[i] = w.take<int32_t>(lists && i < shape.digits ? shape.items : 0);
  }
};

/// What one digit's kernels sort: all items, or the list that the digit before has made.
template <class Keys>
struct SortPass {
  Keys keys;
  const int32_t* list;     // null: all items
  const unsigned* listed;  // how many the list holds: those without a key have left it
  int64_t items, length;
  int strips, bins, shift;

  __device__ int64_t item(int64_t i) const { return list ? list[i] : i; }
  __device__ int64_t end_of_strip() const { return min(list ? int64_t(*listed) : items, (blockIdx.x + 1) * length); }
};

/// Each warp takes kSortItems * 32 places in a row, so that those of lower warps, items and lanes come first.
__device__ inline int64_t sort_place(int64_t first, int j) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  return first + (warp * kSortItems + j) * 32 + lane;
}

/// The bins of a thread's items of the tile at `first`; negative keys as they are.
template <class Keys>
__device__ void load_bins(const SortPass<Keys>& p, int64_t first, int64_t end, int (&bin)[kSortItems]) {
  decltype(p.keys(0)) key[kSortItems];
#pragma unroll
  for (int j = 0; j < kSortItems; ++j) {
    const int64_t i = sort_place(first, j);
    key[j] = i < end ? p.keys(p.item(i)) : -1;
  }
#pragma unroll
  for (int j = 0; j < kSortItems; ++j) bin[j] = key[j] < 0 ? int(key[j]) : int(key[j] >> p.shift) & (kMostBins - 1);
}

/// counts[strip][bin]. `Side` does more on the way: see(bin) for every item, finish() once per thread.
template <class Keys, class Side>
__global__ void __launch_bounds__(kSortThreads) count_kernel(SortPass<Keys> p, Side side, unsigned* counts) {
  CU_SHARED(unsigned, bins, [kMostBins]);
  for (int b = threadIdx.x; b < p.bins; b += kSortThreads) bins[b] = 0;
  __syncthreads();
  const int64_t end = p.end_of_strip();
  for (int64_t first = blockIdx.x * p.length; first < end; first += kSortTile) {
    int bin[kSortItems];
    load_bins(p, first, end, bin);
#pragma unroll
    for (int j = 0; j < kSortItems; ++j) {
      if (bin[j] >= 0) atomicAdd(&bins[bin[j]], 1u);
      side.see(bin[j]);
    }
  }
  side.finish();
  __syncthreads();
  for (int b = threadIdx.x; b < p.bins; b += kSortThreads) counts[int64_t(blockIdx.x) * p.bins + b] = bins[b];
}

struct NoSide {
  __device__ void see(int) const {}
  __device__ void finish() const {}
};

/// Counts become those of the strips before; their sums go to `totals`.
__global__ void __launch_bounds__(kRankWarps * 32)
    rank_kernel(unsigned* counts, int strips, int bins, unsigned* totals) {
  CU_SHARED(unsigned, sums, [kRankWarps][32]);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int bin = int(blockIdx.x) * 32 + lane, share = (strips + kRankWarps - 1) / kRankWarps;
  const int begin = warp * share, end = bin < bins ? min(strips, begin + share) : 0;
  unsigned sum = 0;
  for (int s = begin; s < end; ++s) sum += counts[int64_t(s) * bins + bin];
  sums[warp][lane] = sum;
  __syncthreads();
  unsigned before = 0;
  for (int w = 0; w < warp; ++w) before += sums[w][lane];
  for (int s = begin; s < end; ++s) {
    const unsigned here = counts[int64_t(s) * bins + bin];
    counts[int64_t(s) * bins + bin] = before;
    before += here;
  }
  if (warp == kRankWarps - 1 && bin < bins) totals[bin] = before;
}

/// Ranks of a thread's items among those of their bin in the warp, which `count` holds in the end; it begins with
/// zeros.
__device__ inline void rank_in_warp(const int (&bin)[kSortItems], unsigned* count, unsigned (&rank)[kSortItems]) {
  const unsigned lower_lanes = (1u << threadIdx.x % 32) - 1;
#pragma unroll
  for (int j = 0; j < kSortItems; ++j) {
    const unsigned same = __match_any_sync(0xffffffffu, bin[j]);
    const unsigned lower = unsigned(__popc(same & lower_lanes));
    rank[j] = bin[j] >= 0 ? count[bin[j]] + lower : 0;
    __syncwarp();
    if (bin[j] >= 0 && lower == 0) count[bin[j]] += unsigned(__popc(same));
    __syncwarp();
  }
}

/// Places the items of a strip, stably, whose first bins are loaded: put(i, bin, place) for the i-th of the list.
/// `next`: the place of the bins' next items; `counts`: [kSortWarps][bins].
template <class Keys, class Put>
__device__ void place_strip(const SortPass<Keys>& p, int64_t end, int (&bin)[kSortItems], unsigned* next,
                            unsigned* counts, Put put) {
  const int warp = int(threadIdx.x) / 32;
  for (int64_t first = blockIdx.x * p.length; first < end; first += kSortTile) {
    for (int b = threadIdx.x; b < kSortWarps * p.bins; b += kSortThreads) counts[b] = 0;
    __syncthreads();
    unsigned rank[kSortItems];
    rank_in_warp(bin, counts + warp * p.bins, rank);
    __syncthreads();
    for (int b = threadIdx.x; b < p.bins; b += kSortThreads) {
      unsigned place = next[b];
      for (int w = 0; w < kSortWarps; ++w) {
        const unsigned here = counts[w * p.bins + b];
        counts[w * p.bins + b] = place;
        place += here;
      }
      next[b] = place;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kSortItems; ++j) {
      const int64_t i = sort_place(first, j);
      if (i < end) put(i, bin[j], bin[j] >= 0 ? counts[warp * p.bins + bin[j]] + rank[j] : 0u);
    }
    load_bins(p, first + kSortTile, end, bin);
    __syncthreads();
  }
}

/// The strip's ranks, before anything waits: each bin is loaded by the thread that goes on with it.
template <class Keys>
__device__ void load_ranks(const SortPass<Keys>& p, const unsigned* ranks, unsigned* next) {
#pragma unroll 4
  for (int b = threadIdx.x; b < p.bins; b += kSortThreads) next[b] = ranks[int64_t(blockIdx.x) * p.bins + b];
}

/// Items to their place in the next list.
template <class Keys>
__global__ void __launch_bounds__(kSortThreads)
    place_kernel(SortPass<Keys> p, const unsigned* ranks, const unsigned* totals, int32_t* list, unsigned* listed) {
  CU_DYN_SHARED(unsigned, shared);
  unsigned *const next = shared, *const counts = next + p.bins;
  const int64_t end = p.end_of_strip();
  int bin[kSortItems];
  load_bins(p, blockIdx.x * p.length, end, bin);
  load_ranks(p, ranks, next);
  unsigned all = 0;
  for (int base = 0; base < p.bins; base += kSortThreads) {
    const int b = base + int(threadIdx.x);
    unsigned sum = b < p.bins ? totals[b] : 0;
    const unsigned before = sum_of_lanes(sum);
    const unsigned start = sum_of_warps<kSortWarps>(sum, all) + before;
    if (b < p.bins) next[b] += start;
  }
  if (listed && blockIdx.x == 0 && threadIdx.x == 0) *listed = all;
  place_strip(p, end, bin, next, counts, [&](int64_t i, int b, unsigned place) {
    if (b >= 0) list[place] = int32_t(p.item(i));
  });
}

// ---- launcher ---------------------------------------------------------------------------------------------------

template <class Keys>
SortPass<Keys> make_pass(const Keys& keys, const SortShape& shape, const SortRoom& room, const int32_t* list,
                         int digit) {
  return {keys, list, room.listed, shape.items, shape.length, shape.strips, shape.bins(digit), digit * kDigitBits};
}

template <class Keys, class Side>
void count_digit(const SortPass<Keys>& pass, const Side& side, const SortRoom& room, Stream stream) {
  cu_launch(count_kernel<Keys, Side>, dim3(unsigned(pass.strips)), dim3(kSortThreads), 0, stream, pass, side,
            room.counts);
  cu_launch(rank_kernel, dim3(unsigned((pass.bins + 31) / 32)), dim3(kRankWarps * 32), 0, stream, room.counts,
            pass.strips, pass.bins, room.totals);
}

/// Sorts, and returns a pass over the sorted list: `list`, of *listed items. `side` rides with the first count.
template <class Keys, class Side>
SortPass<Keys> sort_items(const Keys& keys, const SortShape& shape, const SortRoom& room, const Side& side,
                          Stream stream) {
  const int32_t* list = nullptr;
  for (int digit = 0; digit < shape.digits; ++digit) {
    const SortPass<Keys> pass = make_pass(keys, shape, room, list, digit);
    if (digit == 0)
      count_digit(pass, side, room, stream);
    else
      count_digit(pass, NoSide{}, room, stream);
    cu_launch(place_kernel<Keys>, dim3(unsigned(pass.strips)), dim3(kSortThreads),
              size_t(1 + kSortWarps) * pass.bins * sizeof(unsigned), stream, pass, room.counts, room.totals,
              room.list[digit % 2], digit == 0 ? room.listed : nullptr);
    list = room.list[digit % 2];
  }
  return make_pass(keys, shape, room, list, 0);
}

}  // namespace
}  // namespace moeyard::cuda
