#include "common/huge_pages.hpp"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace moeyard {

void advise_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  // Below this, malloc hands out recycled memory, which is resident already, and a system call does not pay.
  constexpr int64_t kWorthIt = int64_t(4) << 20;
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  if (bytes < kWorthIt) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = (begin + uintptr_t(bytes)) / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace moeyard
