// The one thread pool of the CPU kernels: made on first use, keyed by process id (a forked child makes its own), and
// never larger than what the caller asks for (Python passes torch.get_num_threads()).
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>

namespace moeyard {

/// Runs task(i) for i in [0, count) on at most `threads` threads, the caller included. Returns when all are done. What
/// the lowest task that failed has thrown is rethrown; tasks above it may not have run. Runs inline, in order, when the
/// pool is busy: with another caller's work, or with the task that makes this call.
void run_tasks(int64_t count, int threads, const std::function<void(int64_t)>& task);

/// Calls body(begin, end) over [0, n) in pieces of `grain`. The pieces depend on n and grain alone, never on the
/// number of threads: what a body computes per piece is the same on any machine. One piece runs inline. Workers stay
/// awake for 50 us after a job; one that sleeps costs the caller 2 to 5 us to wake and starts 5 to 50 us later. So a
/// grain should be 20 us of work or more.
template <class Body>
void parallel_for(int64_t n, int64_t grain, int threads, Body&& body) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t pieces = (n + grain - 1) / grain;
  const auto piece = [&](int64_t i) { body(i * grain, std::min(n, (i + 1) * grain)); };
  if (pieces == 1 || threads <= 1) {
    for (int64_t i = 0; i < pieces; ++i) piece(i);
    return;
  }
  run_tasks(pieces, threads, std::cref(piece));  // a reference: a std::function of the closure would allocate
}

}  // namespace moeyard
