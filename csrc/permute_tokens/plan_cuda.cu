// The plan is a stable sort of slots by expert (common/digit_sort.cuh). If there are at most kMostBins experts and
// capacity drops by position, its last step writes rows instead of a list: three launches. Else the sorted list of
// slots is laid out and placed. All that the host knows are sizes.
#include <algorithm>

#include "common/device.cuh"
#include "common/device_errors.hpp"
#include "common/digit_sort.cuh"
#include "permute_tokens/keep_heaviest.cuh"
#include "permute_tokens/permute_tokens.hpp"

namespace moeyard::cuda {
namespace {

// ---- launch parameters ------------------------------------------------------------------------------------------

constexpr int kThreads = kSortThreads;
constexpr int kLayoutThreads = 1024;  // one block

// ---- kernel -----------------------------------------------------------------------------------------------------

// The experts of slots.
constexpr int kNotRouted = -1, kBadId = -2;
template <class Id>
struct Experts {
  const Id* ids;
  int64_t num_experts;

  __device__ int operator()(int64_t slot) const {
    const Id id = __ldg(ids + slot);
    if (id >= 0 && int64_t(id) < num_experts) return int(id);
    return id == -1 ? kNotRouted : kBadId;
  }
};

template <class Int>
__device__ void fill(Int* to, int64_t n, Int value) {
  if (!to) return;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
#pragma unroll 1  // else each thread divides 64-bit numbers, to know how often
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) to[i] = value;
}

// Beside the first count: what kernels after it only write in part, and bad ids.
struct Fills {
  int32_t *slot_of_row, *row_of_slot;  // -1
  unsigned* routed;                    // 0
  int64_t rows, slots, num_experts;
  unsigned* errors;

  __device__ void see(int bin) const {
    if (bin == kBadId) atomicOr(errors, unsigned(kBadExpertId));
  }
  __device__ void finish() const {
    fill(slot_of_row, rows, -1);
    fill(row_of_slot, slots, -1);
    fill(routed, num_experts, 0u);
  }
};

// How experts share the rows, in 32 bits: nothing here reaches 2^31.
struct Shares {
  int64_t num_experts;
  unsigned capacity, align;
};

// Sums over the experts before one.
struct Extent {
  unsigned slots = 0, rows = 0, kept = 0;
  __device__ Extent operator+(const Extent& o) const { return {slots + o.slots, rows + o.rows, kept + o.kept}; }
};

// Calls visit(expert, sums before it, its own) for every expert, each by one thread of the block, and returns the sums.
template <int kBlock, class Visit>
__device__ Extent lay_out(const unsigned* routed, const Shares& q, Visit visit) {
  Extent total{};
  for (int64_t base = 0; base < q.num_experts; base += kBlock) {
    const int64_t e = base + threadIdx.x;
    Extent mine{};
    if (e < q.num_experts) {
      mine.slots = routed[e];
      mine.kept = min(mine.slots, q.capacity);
      mine.rows = q.align == 1 ? mine.kept : (mine.kept + q.align - 1) / q.align * q.align;
    }
    Extent sum = mine;
    const Extent below = sum_of_lanes(sum);
    const Extent before = sum_of_warps<kBlock / 32>(sum, total) + below;
    if (e < q.num_experts) visit(e, before, mine);
  }
  return total;
}

__device__ void write_expert(const PlanArrays& out, int64_t e, const Extent& before, const Extent& mine) {
  out.counts[e] = int32_t(mine.kept);
  out.offsets[e] = int32_t(before.rows + mine.rows);
}

// The last step of a plan by position for few experts: slots to rows. Every block lays the experts out for itself,
// which is cheaper than a launch.
template <class Id>
__global__ void __launch_bounds__(kThreads) place_rows_kernel(SortPass<Experts<Id>> p, Shares q, const unsigned* ranks,
                                                              const unsigned* routed, PlanArrays out) {
  CU_DYN_SHARED(unsigned, shared);
  unsigned *const next = shared, *const limit = next + p.bins, *const counts = limit + p.bins;
  const int64_t end = p.end_of_strip();
  int bin[kSortItems];
  load_bins(p, blockIdx.x * p.length, end, bin);
  load_ranks(p, ranks, next);
  const Extent all = lay_out<kThreads>(routed, q, [&](int64_t e, const Extent& before, const Extent& mine) {
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

// Lengths of the runs of a sorted list, as the difference of their ends.
template <class Id>
__global__ void __launch_bounds__(kThreads) measure_runs_kernel(SortPass<Experts<Id>> p, unsigned* routed) {
  const int64_t n = *p.listed, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) {
    const int e = p.keys(p.list[i]);
    if (i == 0 || p.keys(p.list[i - 1]) != e) atomicAdd(&routed[e], 0u - unsigned(i));
    if (i + 1 == n || p.keys(p.list[i + 1]) != e) atomicAdd(&routed[e], unsigned(i) + 1);
  }
}

// One block. start[e]: the first place of the expert's slots in the list.
__global__ void __launch_bounds__(kLayoutThreads)
    lay_out_kernel(Shares q, const unsigned* routed, unsigned* start, PlanArrays out) {
  const Extent all = lay_out<kLayoutThreads>(routed, q, [&](int64_t e, const Extent& before, const Extent& mine) {
    start[e] = before.slots;
    write_expert(out, e, before, mine);
  });
  if (threadIdx.x == 0) *out.dropped = int32_t(all.slots - all.kept);
}

template <class Id>
__global__ void __launch_bounds__(kThreads)
    place_list_kernel(SortPass<Experts<Id>> p, const unsigned* start, PlanArrays out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < int64_t(*p.listed)) {
    const int32_t slot = p.list[i];
    const int e = p.keys(slot);
    const int rank = int(unsigned(i) - start[e]), row = first_row(out.offsets, e) + rank;
    if (rank < out.counts[e]) {
      out.row_of_slot[slot] = row;
      out.slot_of_row[row] = slot;
    }
  }
}

// ---- launcher ---------------------------------------------------------------------------------------------------

// How a request is worked on, and where in the workspace what lies.
struct Work {
  SortShape shape;
  bool sorts;  // into a list first
  SortRoom room;
  unsigned *start, *routed;  // of a list

  Work(const PlanRequest& q, Workspace& w)
      : shape(q.tokens * q.k, q.num_experts - 1), sorts(q.weights || shape.digits > 1), room(shape, sorts, w) {
    start = w.take<unsigned>(sorts ? q.num_experts : 0);
    routed = shape.digits > 1 ? w.take<unsigned>(q.num_experts) : room.totals;
  }
};

Shares make_shares(const PlanRequest& q) {
  constexpr int64_t kMost = (int64_t(1) << 31) - 1;  // a larger align pads no row: there are none
  return {q.num_experts, unsigned(std::min(q.capacity, q.tokens * q.k)), unsigned(std::min(q.align, kMost))};
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
  const Shares shares = make_shares(q);
  const Experts<Id> experts{static_cast<const Id*>(q.experts.data), q.num_experts};
  const int64_t slots = w.shape.items;
  if (!w.sorts) {
    const auto pass = make_pass(experts, w.shape, w.room, nullptr, 0);
    count_digit(pass, Fills{out.slot_of_row, nullptr, nullptr, q.rows, 0, 0, errors}, w.room, stream);
    cu_launch(place_rows_kernel<Id>, dim3(unsigned(pass.strips)), dim3(kThreads),
              size_t(2 + kSortWarps) * pass.bins * sizeof(unsigned), stream, pass, shares, w.room.counts, w.room.totals,
              out);
    return;
  }
  const bool measures = w.shape.digits > 1;  // else the totals of the only digit are the experts'
  const Fills fills{out.slot_of_row, out.row_of_slot, measures ? w.routed : nullptr, q.rows, slots,
                    q.num_experts,   errors};
  const auto sorted = sort_items(experts, w.shape, w.room, fills, stream);
  const dim3 blocks(unsigned(std::max<int64_t>(1, (slots + kThreads - 1) / kThreads)));
  if (measures) cu_launch(measure_runs_kernel<Id>, blocks, dim3(kThreads), 0, stream, sorted, w.routed);
  cu_launch(lay_out_kernel, dim3(1), dim3(kLayoutThreads), 0, stream, shares, w.routed, w.start, out);
  if (q.weights)
    keep_heaviest(q, out, w, sorted.list, stream);
  else
    cu_launch(place_list_kernel<Id>, blocks, dim3(kThreads), 0, stream, sorted, w.start, out);
}

}  // namespace

int64_t plan_permutation_workspace(const PlanRequest& q) {
  Workspace workspace(nullptr);
  Work(q, workspace);
  return workspace.bytes();
}

void plan_permutation(const PlanRequest& q, const PlanArrays& out, void* workspace, unsigned* errors, int device,
                      void* stream) {
  const LaunchScope scope("moeyard::plan_permutation", device);
  Workspace parts(workspace);
  const Work w(q, parts);
  // Nothing is returned early: a plan of no slots still has counts and offsets to write.
  if (q.experts.wide)
    plan<int64_t>(q, out, w, errors, static_cast<Stream>(stream));
  else
    plan<int32_t>(q, out, w, errors, static_cast<Stream>(stream));
}

}  // namespace moeyard::cuda
