#include <cstring>

#include "common/huge_pages.hpp"
#include "common/parallel.hpp"
#include "identity/identity.hpp"

namespace moeyard::cpu {

// Pieces smaller than this are not worth waking a thread for.
constexpr int64_t kGrain = 1 << 20;

void identity(const void* in, void* out, int64_t bytes, int threads) {
  advise_huge_pages(out, bytes);
  parallel_for(bytes, kGrain, threads, [&](int64_t begin, int64_t end) {
    std::memcpy(static_cast<char*>(out) + begin, static_cast<const char*>(in) + begin, size_t(end - begin));
  });
}

}  // namespace moeyard::cpu
