// Barriers and warp collectives: the last thread to arrive computes the result for all. Here and not in the headers,
// whose code is instrumented with the kernels: ThreadSanitizer would report the exchange itself.
#include <algorithm>

#include "emulation/state.hpp"

namespace moeyard::emulation {
namespace {

bool has(unsigned mask, unsigned lane) { return mask >> lane & 1u; }

uint64_t matching(const Warp& warp, unsigned arrived, uint64_t value) {
  unsigned equal = 0;
  for (unsigned lane = 0; lane < kLanes; ++lane)
    if (has(arrived, lane) && warp.lanes[lane]->value == value) equal |= 1u << lane;
  return equal;
}

unsigned combined(WarpOp op, unsigned a, unsigned b) {
  switch (op) {
    case WarpOp::add: return a + b;
    case WarpOp::min_signed: return unsigned(std::min(int(a), int(b)));
    case WarpOp::min_unsigned: return std::min(a, b);
    case WarpOp::max_signed: return unsigned(std::max(int(a), int(b)));
    default: return std::max(a, b);
  }
}

uint64_t reduced(WarpOp op, const Warp& warp, unsigned arrived) {
  unsigned total = 0;
  bool is_first = true;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (!has(arrived, lane)) continue;
    const auto value = unsigned(warp.lanes[lane]->value);
    if (op == WarpOp::ballot)
      total |= value << lane;
    else
      total = is_first ? value : combined(op, total, value);
    is_first = false;
  }
  return total;
}

void compute(WarpOp op, const Warp& warp, unsigned arrived) {
  const bool same_for_all = op != WarpOp::shuffle && op != WarpOp::match;
  const uint64_t total = same_for_all ? reduced(op, warp, arrived) : 0;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (!has(arrived, lane)) continue;
    Thread& thread = *warp.lanes[lane];
    if (op == WarpOp::match)
      thread.result = matching(warp, arrived, thread.value);
    else if (op == WarpOp::shuffle)
      thread.result = has(arrived, thread.source) ? warp.lanes[thread.source]->value
                                                  : options.poison * uint64_t(0x0101010101010101);
    else
      thread.result = total;
  }
}

Collective& joined(Warp& warp, const char* name, WarpOp op, unsigned mask, Location where) {
  for (unsigned i = 0; i < warp.pending_count; ++i) {
    Collective& c = warp.pending[i];
    if (c.op == op && c.mask == mask && c.where.line == where.line && c.where.column == where.column) return c;
  }
  Collective& added = warp.pending[warp.pending_count++];
  added = {name, op, mask, 0, where};
  return added;
}

bool is_complete(const Warp& warp, const Collective& c) { return c.arrived == (c.mask & warp.alive); }

/// Gives all lanes their results and wakes them, but for `goes_on`, which need not wait.
void complete(Warp& warp, Collective& pending, const Thread* goes_on) {
  const Collective c = pending;
  if (options.strict_exit && c.arrived != (c.mask & warp.born))
    stop({.thread = running(),
          .what = "divergence: a lane has left the kernel that the mask names of ",
          .name = c.name,
          .show_threads = true,
          .where = c.where});
  pending = warp.pending[--warp.pending_count];
  compute(c.op, warp, c.arrived);
  for (unsigned i = 0; i < kLanes; ++i) {
    const unsigned lane = is_backward() ? kLanes - 1 - i : i;
    if (has(c.arrived, lane) && warp.lanes[lane] != goes_on) make_ready(warp.lanes[lane]);
  }
}

void open_barrier(Block& block) {
  block.at_barrier = 0;
  ++block.barriers;
  unsigned waiting = 0, holding = 0;
  for (const Thread* thread : block.threads) {
    if (thread->state != State::at_barrier) continue;
    ++waiting;
    holding += thread->predicate != 0;
  }
  const auto n = unsigned(block.threads.size());
  for (unsigned i = 0; i < n; ++i) {
    Thread* const thread = block.threads[is_backward() ? n - 1 - i : i];
    if (thread->state != State::at_barrier) continue;
    thread->result = uint64_t(waiting) << 32 | holding;
    make_ready(thread);
  }
}

}  // namespace

uint64_t collective(const char* name, WarpOp op, unsigned mask, uint64_t value, unsigned source, Location where) {
  Thread& self = *running();
  Warp& warp = self.block->warps[self.warp];
  if (!has(mask, self.lane))
    stop({.thread = &self, .what = "mask: the calling lane is not in that of ", .name = name, .where = where});
  self.value = value;
  self.source = source;
  self.state = State::in_collective;
  self.waits_in = name;
  self.mask = mask;
  self.where = where;
  // Of all collectives only __syncwarp orders memory.
  char* const sync = op == WarpOp::sync ? &warp.sync[(mask * 2654435761u) >> 26] : nullptr;
  if (sync) release(sync);
  Collective& c = joined(warp, name, op, mask, where);
  c.arrived |= 1u << self.lane;
  const bool is_last = is_complete(warp, c);
  if (is_last) complete(warp, c, is_shuffled() ? nullptr : &self);
  if (!is_last || is_shuffled()) wait();
  self.state = State::ready;
  if (sync) acquire(sync);
  return self.result;
}

int barrier(BarrierOp op, int predicate, Location where) {
  Thread& self = *running();
  Block& block = *self.block;
  self.state = State::at_barrier;
  self.waits_in = "__syncthreads";
  self.predicate = predicate;
  self.where = where;
  if (block.at_barrier++ == 0) block.barrier_at = where;
  if (block.barrier_at.line != where.line || block.barrier_at.column != where.column)
    stop({.thread = &self, .what = "divergence: threads wait at different barriers", .show_threads = true});
  if (options.strict_exit && block.alive != block.threads.size())
    stop({.thread = &self, .what = "divergence: a barrier after threads have left the kernel", .show_threads = true});
  char* const sync = &block.barrier_sync[block.barriers % 2];
  release(sync);
  if (block.at_barrier == block.alive) open_barrier(block);
  wait();
  acquire(sync);
  const auto waiting = unsigned(self.result >> 32), holding = unsigned(self.result);
  if (op == BarrierOp::all) return holding == waiting;
  return op == BarrierOp::any ? holding != 0 : int(holding);
}

void fence() {
  release(&launch.fence_sync);
  acquire(&launch.fence_sync);
  preempt();
}

void leave(Thread* thread) {
  Block& block = *thread->block;
  Warp& warp = block.warps[thread->warp];
  thread->state = State::left;
  --block.alive;
  warp.alive &= ~(1u << thread->lane);
  for (unsigned i = 0; i < warp.pending_count;) {
    if (is_complete(warp, warp.pending[i]))
      complete(warp, warp.pending[i], nullptr);
    else
      ++i;
  }
  if (block.at_barrier == 0) return;
  if (options.strict_exit)
    stop({.thread = thread,
          .what = "divergence: a thread leaves the kernel while others wait at a barrier",
          .show_threads = true});
  if (block.at_barrier == block.alive) open_barrier(block);
}

}  // namespace moeyard::emulation
