// What kernels (through the headers beside this one) and launchers ask of the engine. It is compiled without
// sanitizers, always: its own work must be neither reported nor preempted.
#pragma once
#include <cstddef>
#include <cstdint>
#include <source_location>

#include "emulation/vector_types.hpp"

namespace moeyard::emulation {

/// Where a kernel stands. The default argument of whatever can go wrong, made there by source_location::current().
struct Location {
  const char* file = "";
  unsigned line = 0, column = 0;

  constexpr Location() = default;
  constexpr Location(const char* file, unsigned line, unsigned column) : file(file), line(line), column(column) {}
  constexpr Location(std::source_location s) : Location(s.file_name(), s.line(), s.column()) {}
};

struct Options {
  unsigned seed = 0;             ///< 0: forward, 1: backward, even: uniformly random, odd: mostly the woken last
  unsigned char poison = 0xFF;   ///< fill of new shared memory and of undefined shuffle results
  unsigned resident_blocks = 0;  ///< blocks alive at a time; 0: one or three, as blocks_at_a_time() has it
  bool strict_exit = true;       ///< no barrier or collective may name a thread that has left the kernel
  unsigned identities = 0;       ///< as how many threads ThreadSanitizer sees a block; 0: as many as it has
};
extern Options options;

/// The part of a CUDA thread that kernels read.
struct ThreadView {
  uint3 index, block_index;
  unsigned lane, warp;
};
/// The thread that runs now; nullptr outside of kernels. Of each OS thread, because others may call the library too.
extern constinit thread_local const ThreadView* current;
extern dim3 block_dim, grid_dim;

enum class WarpOp { sync, shuffle, ballot, match, add, min_signed, min_unsigned, max_signed, max_unsigned };
enum class BarrierOp { plain, count, all, any };

/// Waits for all lanes of `mask` at this place, then gives the calling lane its result. `source` is the lane that a
/// shuffle reads.
uint64_t collective(const char* name, WarpOp op, unsigned mask, uint64_t value, unsigned source, Location where);
int barrier(BarrierOp op, int predicate, Location where);

/// A place where a shuffled scheduler may go on with another thread.
void preempt();
void fence();

/// Ends the launch: run_grid throws.
[[noreturn]] void fail(const char* what, Location where);
void check_aligned(const void* pointer, size_t bytes, Location where);

/// The block's array that `key` names: an exact heap block, filled with poison when its first thread arrives.
void* shared_array(const void* key, size_t bytes);
void* dynamic_shared();

/// Runs kernel(arguments) once per thread of the grid. Throws std::runtime_error that names block, thread and line.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(void*), void* arguments);

}  // namespace moeyard::emulation
