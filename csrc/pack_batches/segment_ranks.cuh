// Segments in next-fit: a batch that starts with rank s takes ranks s and s + 1, where ranks count segments by their
// first appearance in the order. Here: those ranks, and the first place that a batch from a given start cannot take.
#pragma once
#include "common/device.cuh"
#include "common/grid.cuh"
#include "common/scan.cuh"
#include "common/workspace.hpp"
#include "pack_batches/pack_batches.hpp"

namespace moeyard::cuda {
namespace {

constexpr uint32_t kNever = 0xffffffffu;

__device__ inline int64_t id_at(const PackRequest& q, int64_t position) {
  return q.order ? q.order[position] : position;
}
__device__ inline bool known(const PackRequest& q, int64_t id) { return uint64_t(id) < uint64_t(q.samples); }

// ---- ranks ----------------------------------------------------------------------------------------------------------

/// A table of segments by hash, which holds the first position of each; all null without segments. Only the starts of
/// runs of one segment are entered: with chunks in a row they are few, and nobody waits for anybody.
struct SegmentTable {
  PackRequest q;
  uint32_t* slot;  // [slots]
  uint32_t slots;
  uint32_t* before;  // [length] segments that appear before a position
  uint32_t* rank;    // [length] of a position

  SegmentTable(const PackRequest& q_, Workspace& w) : q(q_), slots(q_.segments ? uint32_t(2 * q_.length + 1) : 0) {
    const int64_t length = q.segments ? q.length : 0;
    slot = w.take<uint32_t>(slots), before = w.take<uint32_t>(length), rank = w.take<uint32_t>(length);
  }

  __device__ int64_t segment(int64_t p) const {
    const int64_t id = id_at(q, p);
    return known(q, id) ? q.segments[id] : 0;
  }
  __device__ bool starts_run(int64_t p) const { return p == 0 || segment(p) != segment(p - 1); }
  __device__ uint32_t home(int64_t segment) const {
    const uint32_t hash = uint32_t(uint64_t(segment) * 0x9e3779b97f4a7c15u >> 32);
    return uint32_t(uint64_t(hash) * slots >> 32);
  }
  __device__ uint32_t next(uint32_t s) const { return s + 1 == slots ? 0 : s + 1; }

  __device__ void enter(uint32_t p) const {
    const int64_t mine = segment(p);
    for (uint32_t s = home(mine);; s = next(s)) {
      const uint32_t there = atomicCAS(slot + s, kNever, p);
      if (there == kNever) return;
      if (segment(there) != mine) continue;
      atomicMin(slot + s, p);
      return;
    }
  }
  __device__ uint32_t first_position(int64_t p) const {
    const int64_t mine = segment(p);
    uint32_t s = home(mine);
    while (segment(slot[s]) != mine) s = next(s);
    return slot[s];
  }

  /// Prefix sums of what is new give `before`.
  __device__ uint32_t operator()(int64_t p) const { return starts_run(p) && first_position(p) == p; }
  __device__ void operator()(int64_t p, uint32_t sum, uint32_t) const { before[p] = sum; }
  __device__ void total(uint32_t) const {}
};

__global__ void __launch_bounds__(kThreads) clear_table_kernel(SegmentTable t) {
  if (thread_number() < t.slots) t.slot[thread_number()] = kNever;
}
__global__ void __launch_bounds__(kThreads) enter_segments_kernel(SegmentTable t) {
  const int64_t p = thread_number();
  if (p < t.q.length && t.starts_run(p)) t.enter(uint32_t(p));
}
__global__ void __launch_bounds__(kThreads) rank_segments_kernel(SegmentTable t) {
  const int64_t p = thread_number();
  if (p < t.q.length) t.rank[p] = t.before[t.first_position(p)];
}

inline void rank_segments(const SegmentTable& t, uint32_t* sums, Stream stream) {
  const dim3 block(kThreads);
  cu_launch(clear_table_kernel, grid_of(t.slots), block, 0, stream, t);
  cu_launch(enter_segments_kernel, grid_of(t.q.length), block, 0, stream, t);
  prefix_sums(t, t, t.q.length, sums, stream);
  cu_launch(rank_segments_kernel, grid_of(t.q.length), block, 0, stream, t);
}

// ---- stops ----------------------------------------------------------------------------------------------------------

/// The places of packed samples as runs of one rank. A batch goes on while runs alternate between its two ranks, that
/// is while each run's rank is that of the run before the last.
struct RankRuns {
  const uint32_t* rank;                         // [length], of places; null without segments
  uint32_t *previous, *next_run, *next_change;  // [length] starts of runs: the last before a place; the next after it,
                                                // and the next whose rank is not that of the run before the last
  const PackSummary* summary;
  int64_t length;

  __device__ int64_t packed() const { return int64_t(summary->packed); }
  __device__ bool starts(int64_t c) const { return c == 0 || rank[c] != rank[c - 1]; }
  __device__ bool changes(int64_t c) const {
    return c > 0 && starts(c) && previous[c] > 0 && rank[c] != rank[previous[c] - 1];
  }
  /// The first place that a batch from c on cannot take.
  __device__ int64_t stop(int64_t c) const {
    const uint32_t end = next_run[c];
    if (end == kNever) return packed();
    if (rank[end] != rank[c] + 1) return end;
    return next_change[end] == kNever ? packed() : next_change[end];
  }
};

struct Latest {
  uint32_t at = 0;
  __device__ Latest operator+(const Latest& o) const { return {max(at, o.at)}; }
};
struct PreviousRuns {
  RankRuns runs;
  __device__ Latest operator()(int64_t c) const { return {c < runs.packed() && runs.starts(c) ? uint32_t(c) : 0}; }
  __device__ void operator()(int64_t c, Latest before, Latest) const { runs.previous[c] = before.at; }
  __device__ void total(Latest) const {}
};

struct Soonest {
  uint32_t run = kNever, change = kNever;
  __device__ Soonest operator+(const Soonest& o) const { return {min(run, o.run), min(change, o.change)}; }
};
struct NextRuns {  // from the end
  RankRuns runs;
  __device__ Soonest operator()(int64_t i) const {
    const int64_t c = runs.length - 1 - i;
    if (c >= runs.packed()) return {};
    return {runs.starts(c) ? uint32_t(c) : kNever, runs.changes(c) ? uint32_t(c) : kNever};
  }
  __device__ void operator()(int64_t i, const Soonest& after, const Soonest&) const {
    const int64_t c = runs.length - 1 - i;
    runs.next_run[c] = after.run, runs.next_change[c] = after.change;
  }
  __device__ void total(const Soonest&) const {}
};

inline void find_stops(const RankRuns& runs, void* sums, Stream stream) {
  prefix_sums(PreviousRuns{runs}, PreviousRuns{runs}, runs.length, static_cast<Latest*>(sums), stream);
  prefix_sums(NextRuns{runs}, NextRuns{runs}, runs.length, static_cast<Soonest*>(sums), stream);
}

}  // namespace
}  // namespace moeyard::cuda
