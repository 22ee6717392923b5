// Kernels are compiled with -fsanitize=alignment, and this is its runtime: a misaligned access becomes an error of the
// launch that names the line, where the machine would crash or, worse, forgive it.
#include "emulation/engine.hpp"

namespace {
struct MisalignedAccess {  // the beginning of what GCC and Clang pass
  const char* file;
  unsigned line, column;
};
}  // namespace

extern "C" void __ubsan_handle_type_mismatch_v1_abort(const MisalignedAccess* access, const void*) {
  moeyard::emulation::fail("misaligned access", {access->file, access->line, access->column});
}
