// Next-fit without a loop over batches: prefix sums of the sizes in order, for every place the start of the batch after
// one that starts there, by searching in them, and the starts that are really reached by doubling: with the first 2^k
// starts and the jumps over 2^k batches, the next 2^k starts and the jumps over twice as many are one look-up each.
//
// Positions count `order`, places the samples that are packed. What would be an error on the CPU is noted in the
// summary by its place, and the sample is left out: the host reads the summary anyway, for the number of batches.
#include <algorithm>

#include "common/device.cuh"
#include "common/scan.cuh"
#include "common/workspace.hpp"
#include "pack_batches/pack_batches.hpp"
#include "pack_batches/segment_ranks.cuh"

namespace moeyard::cuda {
namespace {

constexpr int64_t kLargest = (uint64_t(1) << 63) - 1;
using Word = unsigned long long;  // what atomics take

// ---- kernels: which samples are packed ------------------------------------------------------------------------------

/// The arrays of a call. Sum: holds any sum of sizes.
template <class Sum>
struct PackArrays {
  PackRequest q;
  PackSummary* summary;
  uint32_t* first_seen;        // [samples] position of each id; null without order
  int64_t* index;              // [length] packed ids from the front, skipped ones from the back
  uint32_t* rank_of_place;     // [length]; null without segments
  Sum *total, *total2;         // [length + 1] sizes of the places before; total2 null without sizes2
  uint32_t *starts, *jump[2];  // [length + 1]

  PackArrays(const PackRequest& q_, int64_t* index_, PackSummary* summary_, Workspace& w)
      : q(q_), summary(summary_), index(index_) {
    const auto take = [&](bool wanted, int64_t items) { return wanted ? w.take<uint32_t>(items) : nullptr; };
    first_seen = take(bool(q.order), q.samples), rank_of_place = take(bool(q.segments), q.length);
    total = w.take<Sum>(q.length + 1), total2 = q.sizes2 ? w.take<Sum>(q.length + 1) : nullptr;
    starts = take(true, q.length + 1), jump[0] = take(true, q.length + 1), jump[1] = take(true, q.length + 1);
  }
  __device__ int64_t packed() const { return int64_t(summary->packed); }
};

__device__ inline void note(Word& first, int64_t place) { atomicMin(&first, Word(place)); }

__device__ inline bool oversize(const PackRequest& q, int64_t id) {
  return q.sizes[id] > q.budget || (q.sizes2 && q.sizes2[id] > q.budget2);
}

__global__ void begin_kernel(PackSummary* summary) {
  constexpr Word kNone = ~Word(0);
  *summary = {0, 0, kNone, kNone, kNone, kNone, kNone};
}

template <class Sum>
__global__ void __launch_bounds__(kThreads) check_sizes_kernel(PackArrays<Sum> a) {
  const int64_t id = thread_number();
  if (id >= a.q.samples) return;
  if (a.q.sizes[id] < 0) note(a.summary->negative, id);
  if (a.q.sizes2 && a.q.sizes2[id] < 0) note(a.summary->negative2, id);
  if (a.q.order) a.first_seen[id] = kNever;
}

template <class Sum>
__global__ void __launch_bounds__(kThreads) see_ids_kernel(PackArrays<Sum> a) {
  const int64_t p = thread_number();
  if (p >= a.q.length) return;
  const int64_t id = a.q.order[p];
  if (known(a.q, id))
    atomicMin(a.first_seen + id, uint32_t(p));
  else
    note(a.summary->bad_id, p);
}

/// Prefix sums of which positions are packed give the places.
template <class Sum>
struct Places {
  PackArrays<Sum> a;
  const uint32_t* rank;

  __device__ uint32_t operator()(int64_t p) const {
    const int64_t id = id_at(a.q, p);
    if (!known(a.q, id)) return 0;
    if (a.q.order && a.first_seen[id] != p) return note(a.summary->repeated, p), 0;
    if (a.q.oversize == Oversize::own_batch || !oversize(a.q, id)) return 1;
    if (a.q.oversize == Oversize::error) note(a.summary->oversize, p);
    return 0;
  }
  __device__ void operator()(int64_t p, uint32_t before, uint32_t packed) const {
    const int64_t id = id_at(a.q, p);
    a.index[packed ? before : a.q.length - 1 - (p - before)] = id;
    if (!packed) return;
    a.total[before] = Sum(counted(a.q.sizes[id], a.q.budget));
    if (a.total2) a.total2[before] = Sum(counted(a.q.sizes2[id], a.q.budget2));
    if (rank) a.rank_of_place[before] = rank[p];
  }
  __device__ void total(uint32_t packed) const { a.summary->packed = packed; }

 private:
  /// An oversize sample counts one more than fits, whatever its size: that ends the batch before it, and sums stay
  /// small.
  static __device__ int64_t counted(int64_t size, int64_t budget) {
    return size > budget ? budget + 1 : max(size, int64_t(0));
  }
};

/// Sizes become the sums before them, in place; past the last packed sample all is the sum of all.
template <class Sum>
struct Totals {
  Sum* sizes;
  const PackSummary* summary;
  int64_t length;
  __device__ Sum operator()(int64_t c) const { return c < int64_t(summary->packed) ? sizes[c] : Sum(0); }
  __device__ void operator()(int64_t c, Sum before, Sum) const { sizes[c] = before; }
  __device__ void total(Sum all) const { sizes[length] = all; }
};

// ---- kernels: where batches start -----------------------------------------------------------------------------------

/// The last end in [begin + 1, limit] of a batch from `begin` on whose sizes are within the budget; begin + 1 if none
/// is.
template <class Sum>
__device__ int64_t reach(const Sum* total, int64_t begin, int64_t limit, int64_t budget) {
  const Sum most = total[begin] + Sum(budget);
  int64_t low = begin + 1, step = 1;
  for (; low + step <= limit && total[low + step] <= most; step *= 2) low += step;
  int64_t high = min(low + step, limit + 1);
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (total[middle] <= most ? low : high) = middle;
  }
  return low;
}

template <class Sum>
__global__ void __launch_bounds__(kThreads) first_jumps_kernel(PackArrays<Sum> a, RankRuns runs) {
  const int64_t c = thread_number(), packed = a.packed();
  if (c > a.q.length) return;
  a.starts[c] = c == 0 ? 0 : uint32_t(packed);
  a.jump[0][c] = uint32_t(packed);
  if (c >= packed) return;
  int64_t end = a.q.max_samples < packed - c ? c + a.q.max_samples : packed;
  if (runs.rank) end = min(end, runs.stop(c));
  end = reach(a.total, c, end, a.q.budget);
  if (a.total2) end = reach(a.total2, c, end, a.q.budget2);
  a.jump[0][c] = uint32_t(end);
}

/// `known` starts become twice as many, and jumps over as many batches jumps over twice as many.
template <class Sum>
__global__ void __launch_bounds__(kThreads)
    double_kernel(PackArrays<Sum> a, const uint32_t* jump, uint32_t* twice, int64_t known) {
  const int64_t c = thread_number(), packed = a.packed();
  if (c > packed) return;
  if (jump[0] >= packed) {  // all starts are known; says so to the next launch
    if (c == 0) twice[0] = uint32_t(packed);
    return;
  }
  twice[c] = jump[jump[c]];
  if (c < known && known + c <= packed) a.starts[known + c] = jump[a.starts[c]];
}

template <class Sum>
__global__ void __launch_bounds__(kThreads) count_batches_kernel(PackArrays<Sum> a) {
  const int64_t b = thread_number(), packed = a.packed();
  if (b < packed && a.starts[b] < packed && a.starts[b + 1] >= packed) a.summary->batches = Word(b + 1);
}

template <class Sum>
__global__ void __launch_bounds__(kThreads)
    write_batches_kernel(PackArrays<Sum> a, int64_t batches, int64_t* ptr, int64_t* fill) {
  const int64_t b = thread_number();
  if (b > batches) return;
  const int64_t begin = b < batches ? a.starts[b] : a.packed(), end = b < batches ? a.starts[b + 1] : begin;
  ptr[b] = begin;
  if (b == batches) return;
  // A sample of its own may have counted less than its size.
  fill[b] = end - begin == 1 ? a.q.sizes[a.index[begin]] : int64_t(a.total[end] - a.total[begin]);
}

// ---- launcher ---------------------------------------------------------------------------------------------------

// Where in the workspace what lies.
template <class Sum>
struct PackWork {
  PackArrays<Sum> a;
  SegmentTable table;
  RankRuns runs;
  void* sums;

  PackWork(const PackRequest& q, int64_t* index, PackSummary* summary, Workspace& w)
      : a(q, index, summary, w), table(q, w), runs{} {
    const int64_t length = q.segments ? q.length : 0;
    runs = {a.rank_of_place, w.take<uint32_t>(length), w.take<uint32_t>(length), w.take<uint32_t>(length), summary,
            q.length};
    sums = w.take<__int128>(prefix_sums_workspace(q.length));
  }
  template <class T>
  T* sums_of() const {
    static_assert(sizeof(T) <= sizeof(__int128));
    return static_cast<T*>(sums);
  }
};

// Calls f with a number that holds any sum of sizes.
template <class F>
auto with_sum(const PackRequest& q, F&& f) {
  const int64_t largest = q.sizes2 ? std::max(q.budget, q.budget2) : q.budget;
  if (largest < kLargest / (q.length + 2)) return f(int64_t{});
  return f(__int128{});
}

template <class Sum>
void pack(const PackWork<Sum>& w, Stream stream) {
  const PackArrays<Sum>& a = w.a;
  const dim3 block(kThreads), places = grid_of(a.q.length + 1);
  cu_launch(begin_kernel, dim3(1), dim3(1), 0, stream, a.summary);
  cu_launch(check_sizes_kernel<Sum>, grid_of(a.q.samples), block, 0, stream, a);
  if (a.q.order) cu_launch(see_ids_kernel<Sum>, places, block, 0, stream, a);
  if (a.q.segments) rank_segments(w.table, w.template sums_of<uint32_t>(), stream);
  const Places<Sum> packed{a, a.q.segments ? w.table.rank : nullptr};
  prefix_sums(packed, packed, a.q.length, w.template sums_of<uint32_t>(), stream);
  const auto sum_up = [&](Sum* sizes) {
    const Totals<Sum> totals{sizes, a.summary, a.q.length};
    prefix_sums(totals, totals, a.q.length, w.template sums_of<Sum>(), stream);
  };
  sum_up(a.total);
  if (a.total2) sum_up(a.total2);
  if (a.q.segments) find_stops(w.runs, w.sums, stream);
  cu_launch(first_jumps_kernel<Sum>, places, block, 0, stream, a, w.runs);
  for (int64_t known = 1, round = 0; known <= a.q.length; known *= 2, ++round)
    cu_launch(double_kernel<Sum>, places, block, 0, stream, a, a.jump[round % 2], a.jump[1 - round % 2], known);
  cu_launch(count_batches_kernel<Sum>, places, block, 0, stream, a);
}

}  // namespace

int64_t pack_batches_workspace(const PackRequest& q) {
  return with_sum(q, [&](auto zero) {
    Workspace w(nullptr);
    PackWork<decltype(zero)>(q, nullptr, nullptr, w);
    return w.bytes();
  });
}

void pack_batches(const PackRequest& q, int64_t* index, PackSummary* summary, void* workspace, int device,
                  void* stream) {
  const LaunchScope scope("moeyard::pack_batches", device);
  with_sum(q, [&](auto zero) {
    Workspace w(workspace);
    pack(PackWork<decltype(zero)>(q, index, summary, w), static_cast<Stream>(stream));
  });
}

void pack_batches_fill(const PackRequest& q, const int64_t* index, const PackSummary* summary, int64_t batches,
                       void* workspace, int64_t* ptr, int64_t* fill, int device, void* stream) {
  const LaunchScope scope("moeyard::pack_batches_fill", device);
  with_sum(q, [&](auto zero) {
    using Sum = decltype(zero);
    Workspace w(workspace);
    const PackWork<Sum> work(q, const_cast<int64_t*>(index), const_cast<PackSummary*>(summary), w);
    cu_launch(write_batches_kernel<Sum>, grid_of(batches + 1), dim3(kThreads), 0, static_cast<Stream>(stream), work.a,
              batches, ptr, fill);
  });
}

}  // namespace moeyard::cuda
