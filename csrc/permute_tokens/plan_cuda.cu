// The plan is a stable counting sort of slots by expert, as on the CPU. The slots are cut into strips, one per block:
// their slots are counted per expert, a scan over the strips turns counts into ranks, and every strip places its slots.
// Three launches, if there are at most kMostBins experts and capacity drops by position.
//
// More experts are sorted by the digits of their ids, the lowest first, three launches per digit, into a list of slots;
// so are the slots of a plan that drops by weight. The list is then laid out and placed. No kernel waits for another
// block, and all that the host knows are sizes.
#include <algorithm>
#include <utility>

#include "common/device.cuh"
#include "common/device_errors.hpp"
#include "permute_tokens/keep_heaviest.cuh"
#include "permute_tokens/permute_tokens.hpp"

namespace moeyard::cuda {
namespace {

// ---- launch parameters ------------------------------------------------------------------------------------------

constexpr int kThreads = 256, kWarps = kThreads / kWarp;  // count, place
constexpr int kItems = 4;                                 // slots per thread at a time: 131,072 slots are 128 blocks
constexpr int kTile = kThreads * kItems;
constexpr int64_t kMostStrips = 1024;                        // then a strip has several tiles
constexpr int kDigitBits = 10, kMostBins = 1 << kDigitBits;  // a bin has ten counters of shared memory in `place`
constexpr int kScanWarps = 32;                               // scan: each warp has a share of the strips of 32 bins
constexpr int kLayoutThreads = 1024;                         // one block

// ---- kernel -----------------------------------------------------------------------------------------------------

// What one digit's kernels sort: all slots, or the list that the digit before has made.
template <class Id>
struct Pass {
  const Id* ids;
  int64_t num_experts;
  const int32_t* list;     // null: all slots
  const unsigned* listed;  // how many the list holds: those that are not routed have left it
  int64_t slots;
  int64_t length;  // slots per strip, a multiple of kTile
  int strips, bins, shift;
};

constexpr int kNotRouted = -1, kBadId = -2;

template <class Id>
__device__ int expert_of(const Pass<Id>& p, int64_t slot) {
  const Id id = __ldg(p.ids + slot);
  if (id >= 0 && int64_t(id) < p.num_experts) return int(id);
  return id == -1 ? kNotRouted : kBadId;
}

template <class Id>
__device__ int64_t slot_at(const Pass<Id>& p, int64_t i) {
  return p.list ? p.list[i] : i;
}

template <class Id>
__device__ int64_t end_of_strip(const Pass<Id>& p) {
  const int64_t slots = p.list ? int64_t(*p.listed) : p.slots;
  return min(slots, (blockIdx.x + 1) * p.length);
}

// Each warp takes kItems * 32 slots in a row, so that slots of lower warps, items and lanes come first.
__device__ int64_t item(int64_t first, int j) {
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  return first + (warp * kItems + j) * kWarp + lane;
}

// The bins of a thread's slots of the tile at `first`; negative for none.
template <class Id>
__device__ void load_bins(const Pass<Id>& p, int64_t first, int64_t end, int (&bin)[kItems]) {
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const int64_t i = item(first, j);
    bin[j] = i < end ? expert_of(p, slot_at(p, i)) : kNotRouted;
  }
#pragma unroll
  for (int j = 0; j < kItems; ++j)
    if (bin[j] >= 0) bin[j] = bin[j] >> p.shift & (kMostBins - 1);
}

template <class Int>
__device__ void fill(Int* to, int64_t n, Int value) {
  if (!to) return;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
#pragma unroll 1  // else each thread divides 64-bit numbers, to know how often
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) to[i] = value;
}

// What the kernels after the first count only write in part.
struct Fills {
  int32_t *slot_of_row, *row_of_slot;  // -1
  unsigned* routed;                    // 0
  int64_t rows, slots, num_experts;
};

// counts[strip][bin].
template <class Id>
__global__ void __launch_bounds__(kThreads) count_kernel(Pass<Id> p, Fills fills, unsigned* counts, unsigned* errors) {
  CU_SHARED(unsigned, bins, [kMostBins]);
  for (int b = threadIdx.x; b < p.bins; b += kThreads) bins[b] = 0;
  __syncthreads();
  const int64_t end = end_of_strip(p);
  for (int64_t first = blockIdx.x * p.length; first < end; first += kTile) {
    int bin[kItems];
    load_bins(p, first, end, bin);
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (bin[j] >= 0) atomicAdd(&bins[bin[j]], 1u);
      if (bin[j] == kBadId) atomicOr(errors, unsigned(kBadExpertId));
    }
  }
  fill(fills.slot_of_row, fills.rows, -1);
  fill(fills.row_of_slot, fills.slots, -1);
  fill(fills.routed, fills.num_experts, 0u);
  __syncthreads();
  for (int b = threadIdx.x; b < p.bins; b += kThreads) counts[int64_t(blockIdx.x) * p.bins + b] = bins[b];
}

// Counts become those of the strips before, and their totals `routed`.
__global__ void __launch_bounds__(kScanWarps* kWarp)
    scan_kernel(unsigned* counts, int strips, int bins, unsigned* routed) {
  CU_SHARED(unsigned, sums, [kScanWarps][kWarp]);
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int bin = int(blockIdx.x) * kWarp + lane, share = (strips + kScanWarps - 1) / kScanWarps;
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
  if (warp == kScanWarps - 1 && bin < bins) routed[bin] = before;
}

// How experts share the rows, in 32 bits: nothing here reaches 2^31.
struct Shares {
  int64_t num_experts;
  unsigned capacity, align;
};

// Sums over the experts before one.
struct Extent {
  unsigned slots, rows, kept;
  __device__ void add(const Extent& o) { slots += o.slots, rows += o.rows, kept += o.kept; }
};

// The sum over the threads before this one; `total` grows by that over all. For a whole block.
__device__ Extent scan_block(const Extent& mine, Extent& total) {
  CU_SHARED(Extent, sums, [kLayoutThreads / kWarp]);
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  Extent sum = mine;
  for (int d = 1; d < kWarp; d *= 2) {
    const Extent below{__shfl_up_sync(kFull, sum.slots, d), __shfl_up_sync(kFull, sum.rows, d),
                       __shfl_up_sync(kFull, sum.kept, d)};
    if (lane >= d) sum.add(below);
  }
  if (lane == kWarp - 1) sums[warp] = sum;
  __syncthreads();
  Extent before = total;
  for (int w = 0; w < int(blockDim.x) / kWarp; ++w) {
    if (w < warp) before.add(sums[w]);
    total.add(sums[w]);
  }
  __syncthreads();
  before.add({sum.slots - mine.slots, sum.rows - mine.rows, sum.kept - mine.kept});
  return before;
}

// Calls visit(expert, sums before it, its own) for every expert, each by one thread of the block, and returns the sums.
template <class Visit>
__device__ Extent lay_out(const unsigned* routed, const Shares& q, Visit visit) {
  Extent total{};
  for (int64_t base = 0; base < q.num_experts; base += blockDim.x) {
    const int64_t e = base + threadIdx.x;
    Extent mine{};
    if (e < q.num_experts) {
      mine.slots = routed[e];
      mine.kept = min(mine.slots, q.capacity);
      mine.rows = q.align == 1 ? mine.kept : (mine.kept + q.align - 1) / q.align * q.align;
    }
    const Extent before = scan_block(mine, total);
    if (e < q.num_experts) visit(e, before, mine);
  }
  return total;
}

__device__ void write_expert(const PlanArrays& out, int64_t e, const Extent& before, const Extent& mine) {
  out.counts[e] = int32_t(mine.kept);
  out.offsets[e] = int32_t(before.rows + mine.rows);
}

// Ranks of a thread's slots among those of their bin in the warp, which `count` holds in the end; it begins with zeros.
__device__ void rank_in_warp(const int (&bin)[kItems], unsigned* count, unsigned (&rank)[kItems]) {
  const unsigned lower_lanes = (1u << threadIdx.x % kWarp) - 1;
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const unsigned same = __match_any_sync(kFull, bin[j]);
    const unsigned lower = unsigned(__popc(same & lower_lanes));
    rank[j] = bin[j] >= 0 ? count[bin[j]] + lower : 0;
    __syncwarp();
    if (bin[j] >= 0 && lower == 0) count[bin[j]] += unsigned(__popc(same));
    __syncwarp();
  }
}

// Places the slots of a strip, stably. `next`: the place of the bins' next slots; `counts`: [kWarps][bins].
template <class Id, class Put>
__device__ void place_strip(const Pass<Id>& p, int64_t end, int (&bin)[kItems], unsigned* next, unsigned* counts,
                            Put put) {
  const int warp = int(threadIdx.x) / kWarp;
  for (int64_t first = blockIdx.x * p.length; first < end; first += kTile) {
    for (int b = threadIdx.x; b < kWarps * p.bins; b += kThreads) counts[b] = 0;
    __syncthreads();
    unsigned rank[kItems];
    rank_in_warp(bin, counts + warp * p.bins, rank);
    __syncthreads();
    for (int b = threadIdx.x; b < p.bins; b += kThreads) {
      unsigned place = next[b];
      for (int w = 0; w < kWarps; ++w) {
        const unsigned here = counts[w * p.bins + b];
        counts[w * p.bins + b] = place;
        place += here;
      }
      next[b] = place;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int64_t i = item(first, j);
      if (i < end) put(i, bin[j], bin[j] >= 0 ? counts[warp * p.bins + bin[j]] + rank[j] : 0u);
    }
    load_bins(p, first + kTile, end, bin);
    __syncthreads();
  }
}

// The strip's ranks, before anything waits: `lay_out` gives each bin to the thread that has loaded it.
template <class Id>
__device__ void load_ranks(const Pass<Id>& p, const unsigned* ranks, unsigned* next) {
#pragma unroll 4
  for (int b = threadIdx.x; b < p.bins; b += kThreads) next[b] = ranks[int64_t(blockIdx.x) * p.bins + b];
}

// The last step of a plan by position for few experts: slots to rows. Every block lays the experts out for itself,
// which is cheaper than a launch.
template <class Id>
__global__ void __launch_bounds__(kThreads)
    place_rows_kernel(Pass<Id> p, Shares q, const unsigned* ranks, const unsigned* routed, PlanArrays out) {
  CU_DYN_SHARED(unsigned, shared);
  unsigned *const next = shared, *const limit = next + p.bins, *const counts = limit + p.bins;
  const int64_t end = end_of_strip(p);
  int bin[kItems];
  load_bins(p, blockIdx.x * p.length, end, bin);
  load_ranks(p, ranks, next);
  const Extent all = lay_out(routed, q, [&](int64_t e, const Extent& before, const Extent& mine) {
    next[e] += before.rows;
    limit[e] = before.rows + mine.kept;
    if (blockIdx.x == 0) write_expert(out, e, before, mine);
  });
  if (blockIdx.x == 0 && threadIdx.x == 0) *out.dropped = int32_t(all.slots - all.kept);
  place_strip(p, end, bin, next, counts, [&](int64_t slot, int b, unsigned row) {
    const bool kept = b >= 0 && row < limit[b];
    out.row_of_slot[slot] = kept ? int32_t(row) : -1;
    if (kept) out.slot_of_row[row] = int32_t(slot);
  });
}

// One step of a sort: slots to their place in the next list.
template <class Id>
__global__ void __launch_bounds__(kThreads)
    place_in_list_kernel(Pass<Id> p, const unsigned* ranks, const unsigned* totals, int32_t* list, unsigned* listed) {
  CU_DYN_SHARED(unsigned, shared);
  unsigned *const next = shared, *const counts = next + p.bins;
  const int64_t end = end_of_strip(p);
  int bin[kItems];
  load_bins(p, blockIdx.x * p.length, end, bin);
  load_ranks(p, ranks, next);
  const Shares all_bins{p.bins, 0, 1};
  const Extent all =
      lay_out(totals, all_bins, [&](int64_t b, const Extent& before, const Extent&) { next[b] += before.slots; });
  if (listed && blockIdx.x == 0 && threadIdx.x == 0) *listed = all.slots;
  place_strip(p, end, bin, next, counts, [&](int64_t i, int b, unsigned place) {
    if (b >= 0) list[place] = int32_t(slot_at(p, i));
  });
}

// Lengths of the runs of a sorted list, as the difference of their ends.
template <class Id>
__global__ void __launch_bounds__(kThreads) measure_runs_kernel(Pass<Id> p, unsigned* routed) {
  const int64_t n = *p.listed, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) {
    const int e = expert_of(p, p.list[i]);
    if (i == 0 || expert_of(p, p.list[i - 1]) != e) atomicAdd(&routed[e], 0u - unsigned(i));
    if (i + 1 == n || expert_of(p, p.list[i + 1]) != e) atomicAdd(&routed[e], unsigned(i) + 1);
  }
}

// One block. start[e]: the first place of the expert's slots in the list.
__global__ void __launch_bounds__(kLayoutThreads)
    lay_out_kernel(Shares q, const unsigned* routed, unsigned* start, PlanArrays out) {
  const Extent all = lay_out(routed, q, [&](int64_t e, const Extent& before, const Extent& mine) {
    start[e] = before.slots;
    write_expert(out, e, before, mine);
  });
  if (threadIdx.x == 0) *out.dropped = int32_t(all.slots - all.kept);
}

template <class Id>
__global__ void __launch_bounds__(kThreads) place_list_kernel(Pass<Id> p, const unsigned* start, PlanArrays out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < int64_t(*p.listed)) {
    const int32_t slot = p.list[i];
    const int e = expert_of(p, slot);
    const int rank = int(unsigned(i) - start[e]), row = first_row(out.offsets, e) + rank;
    if (rank < out.counts[e]) {
      out.row_of_slot[slot] = row;
      out.slot_of_row[row] = slot;
    }
  }
}

// ---- launcher ---------------------------------------------------------------------------------------------------

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a request is worked on, and where in the workspace what lies.
struct Work {
  int64_t slots, length;
  int strips, bins, digits;
  bool sorts;  // into a list first
  unsigned *counts, *totals, *listed, *start, *routed;
  int32_t* list[2];
  int64_t bytes;
};

Work make_work(const PlanRequest& q, void* workspace) {
  Work w{};
  w.slots = q.tokens * q.k;
  const int64_t tiles = std::max<int64_t>(1, ceil_div(w.slots, kTile));
  w.length = ceil_div(tiles, kMostStrips) * kTile;
  w.strips = int(ceil_div(tiles * kTile, w.length));
  w.bins = int(std::min<int64_t>(q.num_experts, kMostBins));
  while (w.digits == 0 || q.num_experts - 1 >> w.digits * kDigitBits) ++w.digits;
  w.sorts = q.weights || w.digits > 1;
  auto* const base = static_cast<unsigned*>(workspace);
  int64_t used = 0;
  const auto take = [&](int64_t items) { return base + std::exchange(used, used + items); };
  w.counts = take(int64_t(w.strips) * w.bins);
  w.totals = take(w.bins);
  if (w.sorts) {
    w.listed = take(1);
    w.start = take(q.num_experts);
    w.routed = w.digits > 1 ? take(q.num_experts) : w.totals;
    for (int i = 0; i < std::min(w.digits, 2); ++i) w.list[i] = reinterpret_cast<int32_t*>(take(w.slots));
  }
  w.bytes = used * int64_t(sizeof(unsigned));
  return w;
}

template <class Id>
Pass<Id> make_pass(const PlanRequest& q, const Work& w, const int32_t* list, int digit) {
  const int shift = digit * kDigitBits;
  const int bins = int(std::min<int64_t>((q.num_experts - 1 >> shift) + 1, kMostBins));
  return {
      static_cast<const Id*>(q.experts.data), q.num_experts, list, w.listed, w.slots, w.length, w.strips, bins, shift};
}

Shares make_shares(const PlanRequest& q, const Work& w) {
  constexpr int64_t kMost = (int64_t(1) << 31) - 1;  // a larger align pads no row: there are none
  return {q.num_experts, unsigned(std::min(q.capacity, w.slots)), unsigned(std::min(q.align, kMost))};
}

template <class Id>
void count_strips(const Pass<Id>& pass, const Fills& fills, const Work& w, unsigned* errors, Stream stream) {
  cu_launch(count_kernel<Id>, dim3(pass.strips), dim3(kThreads), 0, stream, pass, fills, w.counts, errors);
  cu_launch(scan_kernel, dim3(unsigned(ceil_div(pass.bins, kWarp))), dim3(kScanWarps * kWarp), 0, stream, w.counts,
            pass.strips, pass.bins, w.totals);
}

// Sorts all routed slots by expert and returns the list as a pass over it.
template <class Id>
Pass<Id> sort_slots(const PlanRequest& q, const PlanArrays& out, const Work& w, unsigned* errors, Stream stream) {
  const int32_t* list = nullptr;
  Fills fills{out.slot_of_row, out.row_of_slot, w.digits > 1 ? w.routed : nullptr, q.rows, w.slots, q.num_experts};
  for (int digit = 0; digit < w.digits; ++digit) {
    const Pass<Id> pass = make_pass<Id>(q, w, list, digit);
    count_strips(pass, fills, w, errors, stream);
    cu_launch(place_in_list_kernel<Id>, dim3(pass.strips), dim3(kThreads),
              size_t(1 + kWarps) * pass.bins * sizeof(unsigned), stream, pass, w.counts, w.totals, w.list[digit % 2],
              digit == 0 ? w.listed : nullptr);
    list = w.list[digit % 2];
    fills = {};
  }
  return make_pass<Id>(q, w, list, 0);
}

void keep_heaviest(const PlanRequest& q, const PlanArrays& out, const Work& w, const int32_t* list, Stream stream) {
  const dim3 grid(unsigned(std::min(q.num_experts, kMostSelectBlocks)));
  const auto launch = [&](auto key) {
    using Key = decltype(key);
    cu_launch(keep_heaviest_kernel<Key>, grid, dim3(kSelectThreads), 0, stream, static_cast<const Key*>(q.weights),
              list, w.start, w.routed, q.num_experts, out);
  };
  q.wide_weights ? launch(uint64_t{}) : launch(uint32_t{});
}

template <class Id>
void plan(const PlanRequest& q, const PlanArrays& out, const Work& w, unsigned* errors, Stream stream) {
  const Shares shares = make_shares(q, w);
  if (!w.sorts) {
    const Pass<Id> pass = make_pass<Id>(q, w, nullptr, 0);
    count_strips(pass, {out.slot_of_row, nullptr, nullptr, q.rows, 0, 0}, w, errors, stream);
    cu_launch(place_rows_kernel<Id>, dim3(pass.strips), dim3(kThreads),
              size_t(2 + kWarps) * pass.bins * sizeof(unsigned), stream, pass, shares, w.counts, w.totals, out);
    return;
  }
  const Pass<Id> sorted = sort_slots<Id>(q, out, w, errors, stream);
  const dim3 blocks(unsigned(std::max<int64_t>(1, ceil_div(w.slots, kThreads))));
  if (w.digits > 1) cu_launch(measure_runs_kernel<Id>, blocks, dim3(kThreads), 0, stream, sorted, w.routed);
  cu_launch(lay_out_kernel, dim3(1), dim3(kLayoutThreads), 0, stream, shares, w.routed, w.start, out);
  if (q.weights)
    keep_heaviest(q, out, w, sorted.list, stream);
  else
    cu_launch(place_list_kernel<Id>, blocks, dim3(kThreads), 0, stream, sorted, w.start, out);
}

}  // namespace

int64_t plan_permutation_workspace(const PlanRequest& q) { return make_work(q, nullptr).bytes; }

void plan_permutation(const PlanRequest& q, const PlanArrays& out, void* workspace, unsigned* errors, int device,
                      void* stream) {
  const LaunchScope scope("moeyard::plan_permutation", device);
  const Work w = make_work(q, workspace);
  // Nothing is returned early: a plan of no slots still has counts and offsets to write.
  if (q.experts.wide)
    plan<int64_t>(q, out, w, errors, static_cast<Stream>(stream));
  else
    plan<int32_t>(q, out, w, errors, static_cast<Stream>(stream));
}

}  // namespace moeyard::cuda
