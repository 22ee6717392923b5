// Drives the thread pool as hard as Python programs may: callers in many threads with different thread counts, nested
// calls, exceptions, forks while it is busy, children of children. Built by test_pool.py, and with ThreadSanitizer by
// `make sanitize`. Exits with 0 when every call did each piece exactly once and on no more threads than asked for.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "common/parallel.hpp"

namespace {

using moeyard::parallel_for;

void expect(bool fine, const char* what) {
  if (fine) return;
  std::fprintf(stderr, "pool_stress: failed: %s\n", what);
  std::_Exit(1);
}

void pause_a_little(unsigned turns) {
  std::atomic<unsigned> turn{0};
  while (turn.fetch_add(1, std::memory_order_relaxed) < turns) {
  }
}

// Plain ints on purpose: a piece done twice, or read before it is done, is a race that ThreadSanitizer reports.
void every_piece_once(std::mt19937& random) {
  // Now and then many pieces with nothing in them: all threads are drawing the next one all the time.
  const bool empty = random() % 4 == 0;
  const int64_t n = 1 + random() % (empty ? 5000 : 300), grain = empty ? 1 : 1 + random() % 20;
  const int threads = 1 + int(random() % 6);
  const unsigned turns = empty ? 0 : random() % 2000;
  std::vector<int> done(size_t(n), 0);
  std::mutex mutex;
  std::set<std::thread::id> seen;
  parallel_for(n, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++done[size_t(i)];
    pause_a_little(turns);
    if (begin % 16) return;
    std::lock_guard<std::mutex> lock(mutex);
    seen.insert(std::this_thread::get_id());
  });
  for (int times : done) expect(times == 1, "every piece once");
  expect(int(seen.size()) <= threads, "no more threads than asked for");
}

void lowest_error_arrives(std::mt19937& random) {
  const int64_t n = 2 + random() % 200, first = random() % n, second = random() % n;
  const unsigned turns = random() % 500;
  try {
    parallel_for(n, 1, 4, [&](int64_t i, int64_t) {
      pause_a_little(turns);
      if (i == first || i == second) throw std::runtime_error(std::to_string(i));
    });
    expect(false, "an exception reaches the caller");
  } catch (const std::runtime_error& error) {
    expect(error.what() == std::to_string(std::min(first, second)), "the lowest failed piece is named");
  }
}

void nested(std::mt19937& random) {
  const int64_t outer = 1 + random() % 12, inner = 1 + random() % 40;
  std::vector<int> done(size_t(outer * inner), 0);
  parallel_for(outer, 1, 3, [&](int64_t i, int64_t) {
    parallel_for(inner, 3, 4, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) ++done[size_t(i * inner + j)];
    });
  });
  for (int times : done) expect(times == 1, "every nested piece once");
}

void calls(unsigned seed, int rounds) {
  std::mt19937 random(seed);
  for (int i = 0; i < rounds; ++i) {
    every_piece_once(random);
    if (i % 3 == 0) nested(random);
    if (i % 5 == 0) lowest_error_arrives(random);
  }
}

// The child's pool is its own, whatever the parent's was doing; so is the grandchild's.
void fork_and_call(unsigned seed, int generations) {
  const pid_t child = fork();
  expect(child >= 0, "fork");
  if (child == 0) {
    calls(seed, 10);
    if (generations > 1) fork_and_call(seed + 1, generations - 1);
    std::_Exit(0);
  }
  int status = 0;
  expect(waitpid(child, &status, 0) == child, "waitpid");
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child's calls");
}

}  // namespace

// usage: pool_stress [ROUNDS [FORKS]]: at least so many rounds in each thread, and more until the forks are done.
int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 1000, forks = argc > 2 ? std::atoi(argv[2]) : 20;
  std::atomic<bool> forking{true};
  std::vector<std::thread> callers;
  for (unsigned seed = 1; seed <= 4; ++seed)
    callers.emplace_back([&, seed] {
      calls(seed, rounds);
      for (unsigned more = 1; forking; ++more) calls(seed + 10 * more, 10);
    });
  for (int i = 0; i < forks; ++i) fork_and_call(100 + unsigned(i), 3);
  forking = false;
  for (std::thread& caller : callers) caller.join();
  std::printf("pool_stress: %d rounds in 4 threads, %d forks: clean\n", rounds, forks);
}
