// Fibres: stacks, the switch between them, and what the sanitizers want to know about it.
#pragma once
#include <cstddef>

namespace moeyard::emulation {

struct Fibre {
  void* stack_pointer = nullptr;
  char* stack = nullptr;  // lowest byte; below it lies a guard page
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;    // AddressSanitizer's
  void* own_identity = nullptr;  // ThreadSanitizer's, once somebody runs as this fibre
  void* identity = nullptr;      // as whom it runs
};

Fibre make_fibre();
/// Also for a fibre that was abandoned in the middle of a kernel.
void destroy(Fibre& fibre);
/// The next switch to `fibre` calls `entry`, which must begin with entered() and never return. `offset` bytes at the
/// top of the stack stay free, so that the stacks of a block do not meet in the same cache sets.
void prepare(Fibre& fibre, void (*entry)(), size_t offset);
/// Makes `fibre` stand for the stack of the calling OS thread.
void adopt_thread(Fibre& fibre);

/// Whether ThreadSanitizer is there.
bool has_identities();
/// To ThreadSanitizer `fibre` is `whom` from now on, and `name` what its reports call that.
void run_as(Fibre& fibre, Fibre& whom, const char* name);
/// Called when a sanitizer is about to end the process.
void on_death(void (*tell)());

void switch_to(Fibre& from, Fibre& to, bool from_is_done);
/// `home` is the fibre of adopt_thread() from which a launch makes its first switch.
void entered(Fibre& home);

/// Order for ThreadSanitizer: what came before release(at) came before what follows acquire(at).
void release(void* at);
void acquire(void* at);

}  // namespace moeyard::emulation
