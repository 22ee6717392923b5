// Kernels are compiled with -fsanitize=thread, and this is its runtime: every access is a place where the scheduler may
// switch, so that a lost update shows in the result.
#include <cstddef>

#include "emulation/engine.hpp"

namespace {
void access() {
  if (moeyard::emulation::current) moeyard::emulation::preempt();
}
}  // namespace

#define ACCESSES(bytes)                                  \
  void __tsan_read##bytes(void*) { access(); }           \
  void __tsan_write##bytes(void*) { access(); }          \
  void __tsan_unaligned_read##bytes(void*) { access(); } \
  void __tsan_unaligned_write##bytes(void*) { access(); }
#define ATOMICS(bits, T)                                                                                  \
  T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_RELAXED); } \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* expected, T value, int, int) {      \
    return __atomic_compare_exchange_n(p, expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);    \
  }

extern "C" {
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
ATOMICS(32, unsigned)
ATOMICS(64, unsigned long)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void*, size_t) { access(); }
void __tsan_write_range(void*, size_t) { access(); }
void __tsan_vptr_update(void**, void*) {}
}
