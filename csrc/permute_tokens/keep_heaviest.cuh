// A plan that drops by weight: of every expert's list of slots, in slot order, the heaviest get its rows. A block per
// expert finds the lightest weight that is kept, by its digits, and then places the slots from that weight on.
#pragma once
#include "common/device.cuh"
#include "permute_tokens/permute_tokens.hpp"

namespace moeyard::cuda {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kFull = 0xffffffffu;

// ---- launch parameters ------------------------------------------------------------------------------------------

constexpr int kSelectThreads = 512, kSelectWarps = kSelectThreads / kWarp;
constexpr int64_t kMostSelectBlocks = 4096;  // then a block has several experts
constexpr int kRadixBits = 8, kRadix = 1 << kRadixBits;

// ---- kernel -----------------------------------------------------------------------------------------------------

__device__ inline int32_t first_row(const int32_t* offsets, int64_t expert) { return expert ? offsets[expert - 1] : 0; }

// Unsigned keys in the order of the weights, from their bits: NaN is lightest, and the two zeros are equal.
template <class Key>
__device__ Key weight_key(Key bits) {
  constexpr Key kSign = Key(1) << (8 * sizeof(Key) - 1);
  constexpr Key kInfinity = sizeof(Key) == 4 ? Key(0x7f800000u) : Key(0x7ff0000000000000u);
  const Key magnitude = bits & ~kSign;
  if (magnitude > kInfinity) return 0;
  if (magnitude == 0) return kSign;
  return bits & kSign ? ~bits : bits | kSign;
}

// The slots to keep: all with a key above `least`, and the first `ties` with that key.
template <class Key>
struct Threshold {
  Key least;
  unsigned ties;
};

struct Digit {
  int value;
  unsigned left;  // to be kept among the keys with this digit
};

// The digit of the lightest key that is kept. Each lane of the first warp looks at a part of the digits.
__device__ inline void find_digit(const unsigned* bins, unsigned kept, Digit* found) {
  constexpr int kPart = kRadix / kWarp;
  const int lane = int(threadIdx.x);
  unsigned own = 0;
  for (int d = 0; d < kPart; ++d) own += bins[lane * kPart + d];
  unsigned above = own;
  for (int d = 1; d < kWarp; d *= 2) {
    const unsigned heavier = __shfl_down_sync(kFull, above, d);
    if (lane + d < kWarp) above += heavier;
  }
  above -= own;
  if (above >= kept || above + own < kept) return;
  int digit = lane * kPart + kPart - 1;
  for (; above + bins[digit] < kept; --digit) above += bins[digit];
  *found = {digit, kept - above};
}

// Of n slots, more than `kept`.
template <class Key>
__device__ Threshold<Key> find_threshold(const Key* weights, const int32_t* slots, unsigned n, unsigned kept) {
  CU_SHARED(unsigned, bins, [kRadix]);
  CU_SHARED(Digit, found, [1]);
  Key least = 0, known = 0;
  for (int shift = 8 * int(sizeof(Key)) - kRadixBits; shift >= 0; shift -= kRadixBits) {
    for (int b = threadIdx.x; b < kRadix; b += kSelectThreads) bins[b] = 0;
    __syncthreads();
    for (unsigned i = threadIdx.x; i < n; i += kSelectThreads) {
      const Key key = weight_key(__ldg(weights + slots[i]));
      if ((key & known) == least) atomicAdd(&bins[key >> shift & (kRadix - 1)], 1u);
    }
    __syncthreads();
    if (threadIdx.x < kWarp) find_digit(bins, kept, found);
    __syncthreads();
    least |= Key(found->value) << shift;
    known |= Key(kRadix - 1) << shift;
    kept = found->left;
  }
  return {least, kept};
}

// Counts of slots above the threshold and on it, for all threads of the block before this one; `total` grows by those
// of all threads.
struct Ranks {
  unsigned above, ties;
};

__device__ inline Ranks rank_in_block(bool above, bool tie, Ranks& total) {
  CU_SHARED(Ranks, sums, [kSelectWarps]);
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const unsigned above_lanes = __ballot_sync(kFull, above), tie_lanes = __ballot_sync(kFull, tie);
  const unsigned lower_lanes = (1u << lane) - 1;
  if (lane == 0) sums[warp] = {unsigned(__popc(above_lanes)), unsigned(__popc(tie_lanes))};
  __syncthreads();
  Ranks before{total.above + unsigned(__popc(above_lanes & lower_lanes)),
               total.ties + unsigned(__popc(tie_lanes & lower_lanes))};
  for (int w = 0; w < kSelectWarps; ++w) {
    if (w < warp) before.above += sums[w].above, before.ties += sums[w].ties;
    total.above += sums[w].above, total.ties += sums[w].ties;
  }
  __syncthreads();
  return before;
}

// Gives the slots that are kept the rows from `row` on, in slot order.
template <class Key>
__device__ void place_heaviest(const Key* weights, const int32_t* slots, unsigned n, Threshold<Key> keep, int32_t row,
                               const PlanArrays& out) {
  Ranks total{};
  for (unsigned first = 0; first < n; first += kSelectThreads) {
    const unsigned i = first + threadIdx.x;
    const int32_t slot = i < n ? slots[i] : 0;
    const Key key = i < n ? weight_key(__ldg(weights + slot)) : 0;
    const bool above = i < n && key > keep.least, tie = i < n && key == keep.least;
    const Ranks before = rank_in_block(above, tie, total);
    if (above || (tie && before.ties < keep.ties)) {
      const int32_t to = row + int32_t(before.above + min(before.ties, keep.ties));
      out.slot_of_row[to] = slot;
      out.row_of_slot[slot] = to;
    }
  }
}

// start[e], routed[e]: where in the list the slots of an expert lie. Slots that are not kept have been given -1 before.
template <class Key>
__global__ void __launch_bounds__(kSelectThreads)
    keep_heaviest_kernel(const Key* weights, const int32_t* list, const unsigned* start, const unsigned* routed,
                         int64_t num_experts, PlanArrays out) {
  for (int64_t e = blockIdx.x; e < num_experts; e += gridDim.x) {
    const unsigned n = routed[e], kept = unsigned(out.counts[e]);
    if (kept == 0) continue;
    const int32_t* const slots = list + start[e];
    Threshold<Key> keep{0, n};
    if (kept < n) keep = find_threshold(weights, slots, n, kept);
    place_heaviest(weights, slots, n, keep, first_row(out.offsets, e), out);
  }
}

}  // namespace
}  // namespace moeyard::cuda
