#include "emulation/fibre.hpp"

#include <sys/mman.h>

#include <cstdint>
#include <new>

// The sanitizers' interfaces, if the process has them.
extern "C" {
#define WEAK __attribute__((weak))
void __sanitizer_start_switch_fiber(void**, const void*, size_t) WEAK;
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) WEAK;
void __sanitizer_set_death_callback(void (*)()) WEAK;
void __asan_unpoison_memory_region(const volatile void*, size_t) WEAK;
void* __tsan_get_current_fiber() WEAK;
void* __tsan_create_fiber(unsigned) WEAK;
void __tsan_destroy_fiber(void*) WEAK;
void __tsan_set_fiber_name(void*, const char*) WEAK;
void __tsan_switch_to_fiber(void*, unsigned) WEAK;
void __tsan_acquire(void*) WEAK;
void __tsan_release(void*) WEAK;
#undef WEAK

// Saves the registers that a function must keep, and the stack pointer at *save; goes on where `to` was saved.
void moeyard_switch_stack(void** save, void* to);
}

// By hand, because swapcontext() asks the kernel for the signal mask each time: 5 to 20 ns against 250.
#if defined(__x86_64__)
asm(R"(
.text
.globl moeyard_switch_stack
.hidden moeyard_switch_stack
.type moeyard_switch_stack, @function
moeyard_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size moeyard_switch_stack, . - moeyard_switch_stack
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl moeyard_switch_stack
.hidden moeyard_switch_stack
.type moeyard_switch_stack, %function
moeyard_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size moeyard_switch_stack, . - moeyard_switch_stack
)");
#else
#error "moeyard's emulation of CUDA runs on x86-64 and 64-bit ARM"
#endif

namespace moeyard::emulation {
namespace {

// Only pages that are touched take memory; sanitized frames are several times larger than others.
constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 64 << 10;

// What moeyard_switch_stack takes from a stack: the registers, then the address where it goes on.
#if defined(__x86_64__)
void** first_frame(void** top, void (*entry)()) {
  *--top = nullptr;  // where entry would return to; it also aligns the stack as a call does
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}
#else
void** first_frame(void** top, void (*entry)()) {
  for (int i = 0; i < 20; ++i) *--top = nullptr;
  top[11] = reinterpret_cast<void*>(entry);  // x30
  return top;
}
#endif

}  // namespace

Fibre make_fibre() {
  void* const pages = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  mprotect(pages, kGuardBytes, PROT_NONE);
  Fibre fibre;
  fibre.stack = static_cast<char*>(pages) + kGuardBytes;
  fibre.stack_bytes = kStackBytes;
  return fibre;
}

void destroy(Fibre& fibre) {
  // Frames that never returned have left their red zones behind.
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(fibre.stack, fibre.stack_bytes);
  if (fibre.own_identity) __tsan_destroy_fiber(fibre.own_identity);
  munmap(fibre.stack - kGuardBytes, kGuardBytes + fibre.stack_bytes);
}

void prepare(Fibre& fibre, void (*entry)(), size_t offset) {
  const auto top = (reinterpret_cast<uintptr_t>(fibre.stack) + fibre.stack_bytes - offset) & ~uintptr_t(15);
  fibre.stack_pointer = first_frame(reinterpret_cast<void**>(top), entry);
  fibre.fake_stack = nullptr;
}

void adopt_thread(Fibre& fibre) {
  fibre = Fibre();
  if (__tsan_get_current_fiber) fibre.identity = __tsan_get_current_fiber();
}

bool has_identities() { return __tsan_create_fiber; }

void run_as(Fibre& fibre, Fibre& whom, const char* name) {
  if (!whom.own_identity) whom.own_identity = __tsan_create_fiber(0);
  fibre.identity = whom.own_identity;
  __tsan_set_fiber_name(fibre.identity, name);
}

void on_death(void (*tell)()) {
  if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(tell);
}

void switch_to(Fibre& from, Fibre& to, bool from_is_done) {
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(from_is_done ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.identity, 1);  // 1: the switch itself orders nothing
  moeyard_switch_stack(&from.stack_pointer, to.stack_pointer);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

void entered(Fibre& home) {
  if (!__sanitizer_finish_switch_fiber) return;
  const void* before = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &before, &bytes);
  if (home.stack) return;
  // The first to be entered in a launch learns where the OS thread's own stack lies.
  home.stack = static_cast<char*>(const_cast<void*>(before));
  home.stack_bytes = bytes;
}

void release(void* at) {
  if (__tsan_release) __tsan_release(at);
}

void acquire(void* at) {
  if (__tsan_acquire) __tsan_acquire(at);
}

}  // namespace moeyard::emulation
