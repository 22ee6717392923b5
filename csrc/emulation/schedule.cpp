// Which ready thread runs next. A right kernel gives the same result in every order.
#include <utility>

#include "emulation/state.hpp"

namespace moeyard::emulation {
namespace {

constexpr unsigned kRing = kMaxResident * kMaxBlockThreads;
Thread* ready[kRing];
unsigned first, count;
uint64_t random_state;

uint32_t random_bits() {  // xorshift
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return uint32_t(random_state >> 32);
}

}  // namespace

bool is_backward() { return options.seed == 1; }
bool is_shuffled() { return options.seed > 1; }
unsigned random_below(unsigned n) { return unsigned((uint64_t(random_bits()) * n) >> 32); }

void start_schedule() {
  first = count = 0;
  // The same seed gives every launch the same order, so that a failure comes again with its test alone.
  random_state = 0x9E3779B97F4A7C15u * (uint64_t(options.seed) + 1) | 1;
}

void make_ready(Thread* thread) {
  thread->state = State::ready;
  ready[(first + count++) % kRing] = thread;
}

Thread* next_ready() {
  if (count == 0) return nullptr;
  --count;
  if (!is_shuffled()) {
    Thread* const thread = ready[first];
    first = (first + 1) % kRing;
    return thread;
  }
  // Odd seeds mostly stay with the threads woken last: some run far ahead while others have not begun.
  const bool last = options.seed % 2 == 1 && random_below(8) != 0;
  Thread*& chosen = ready[(first + (last ? count : random_below(count + 1))) % kRing];
  return std::exchange(chosen, ready[(first + count) % kRing]);
}

void preempt() {
  if (!is_shuffled() || random_below(4) != 0) return;
  make_ready(running());
  wait();
}

}  // namespace moeyard::emulation
