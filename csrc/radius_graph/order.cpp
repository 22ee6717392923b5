#include "radius_graph/order.hpp"

#include <algorithm>
#include <cstring>

namespace moeyard::cpu {
namespace {

void sort_any(const int32_t* ids, int64_t n, int32_t base, int32_t* out) {
  for (int64_t k = 0; k < n; ++k) out[k] = ids[k] + base;
  std::sort(out, out + n);
}

#ifdef __GNUC__

// Counts for every id how many are smaller, which is its place: n * n comparisons, but `Vectors` of them are a few
// instructions without any branch, and all counts stay in registers.
template <int Lanes, int Vectors>
MOEYARD_INLINE void rank(const int32_t* ids, int64_t n, int32_t base, int32_t* out) {
  typedef int32_t Ints __attribute__((vector_size(4 * Lanes)));
  Ints key[Vectors], place[Vectors];
  for (int v = 0; v < Vectors; ++v) std::memcpy(&key[v], ids + v * Lanes, sizeof(Ints)), place[v] = Ints{};
  for (int64_t k = 0; k < n; ++k) {
    const Ints id = Ints{} + ids[k];
    for (int v = 0; v < Vectors; ++v) place[v] -= id < key[v];
  }
  int32_t places[Lanes * Vectors];
  std::memcpy(places, place, sizeof(places));
  for (int64_t k = 0; k < n; ++k) out[places[k]] = ids[k] + base;
}

template <int Lanes>
MOEYARD_INLINE void order(const int32_t* ids, int64_t n, int32_t base, int32_t* out) {
  switch ((n + 15) / 16) {
    case 0: return;
    case 1: return rank<Lanes, 16 / Lanes>(ids, n, base, out);
    case 2: return rank<Lanes, 32 / Lanes>(ids, n, base, out);
    case 3: return rank<Lanes, 48 / Lanes>(ids, n, base, out);
    default: return sort_any(ids, n, base, out);
  }
}

#ifdef MOEYARD_X86
MOEYARD_TARGET_AVX512 void order_avx512(const int32_t* ids, int64_t n, int32_t base, int32_t* out) {
  order<16>(ids, n, base, out);
}
MOEYARD_TARGET_AVX2 void order_avx2(const int32_t* ids, int64_t n, int32_t base, int32_t* out) {
  order<8>(ids, n, base, out);
}
#endif
void order_baseline(const int32_t* ids, int64_t n, int32_t base, int32_t* out) { order<4>(ids, n, base, out); }

#else
constexpr Order order_baseline = sort_any;
#endif

}  // namespace

Order pick_order([[maybe_unused]] Simd level) {
#ifdef MOEYARD_X86
  if (level == Simd::avx512) return order_avx512;
  if (level == Simd::avx2) return order_avx2;
#endif
  return order_baseline;
}

}  // namespace moeyard::cpu
