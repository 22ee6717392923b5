// What the engine knows while a grid runs: threads, warps, blocks, who is ready, what went wrong.
//
// Fixed arrays, and neither malloc nor memmove where a fibre runs: ThreadSanitizer sees those calls even from here, and
// would take the engine's own work for races of the kernel.
#pragma once
#include <string>
#include <vector>

#include "emulation/engine.hpp"
#include "emulation/fibre.hpp"

namespace moeyard::emulation {

constexpr unsigned kLanes = 32, kMaxBlockThreads = 1024, kMaxResident = 8, kMaxSharedArrays = 16;

enum class State { ready, in_collective, at_barrier, left };

struct Block;

struct Thread : ThreadView {
  Fibre fibre;
  Block* block = nullptr;
  State state = State::left;
  const char* waits_in = "";  // name, mask and place of what it waits in
  unsigned mask = 0;
  Location where = {};
  uint64_t value = 0, result = 0;
  unsigned source = 0;
  int predicate = 0;
};

struct Collective {
  const char* name = "";
  WarpOp op = WarpOp::sync;
  unsigned mask = 0, arrived = 0;
  Location where;
};

struct Warp {
  Thread* lanes[kLanes] = {};
  unsigned born = 0, alive = 0;
  Collective pending[kLanes];
  unsigned pending_count = 0;
  char sync[64] = {};  // one per mask (hashed): __syncwarp of disjoint groups orders nothing between them
};

struct SharedArray {
  const void* key = nullptr;
  void* data = nullptr;
};

struct Block {
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  unsigned alive = 0, at_barrier = 0, barriers = 0;
  Location barrier_at;
  SharedArray arrays[kMaxSharedArrays];
  unsigned array_count = 0;
  size_t static_bytes = 0;
  char barrier_sync[2] = {}, shared_sync = 0;
};

struct Failure {
  const Thread* thread = nullptr;  // nullptr: none happened
  const char* what = "";
  const char* name = "";      // of the collective concerned, behind `what`
  bool show_threads = false;  // where all threads of the block wait
  Location where = {};        // without a line: none
};

/// One launch.
struct Launch {
  void (*kernel)(void*) = nullptr;
  void* arguments = nullptr;
  size_t shared_bytes = 0;
  Fibre home;
  std::vector<Thread*> slots;  // fibres live longer than launches
  Failure failure;
  char begin_sync = 0, end_sync = 0, fence_sync = 0;
};
extern Launch launch;

Thread* running();
/// Switches to `thread`, or with nullptr back to where the launch began.
void go_on_with(Thread* thread);
/// Lets others run until this thread is made ready and chosen.
void wait();
[[noreturn]] void stop(const Failure& failure);

// ---- schedule.cpp ----
void start_schedule();
bool is_shuffled();
bool is_backward();
unsigned random_below(unsigned n);
void make_ready(Thread* thread);
/// The next thread to run, taken from the ready ones; nullptr when there is none.
Thread* next_ready();

// ---- collectives.cpp ----
/// What a thread's departure means for those that wait.
void leave(Thread* thread);

// ---- report.cpp ----
std::string describe(const Failure& failure);
std::string name_of(const ThreadView& thread);
std::string name_of_block(const ThreadView& thread);

}  // namespace moeyard::emulation
