#include "radius_graph/order.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

namespace moeyard::cpu {
namespace {

void sort_any(const int32_t* ids, int64_t n, int32_t base, int32_t* out) {
  for (int64_t k = 0; k < n; ++k) out[k] = ids[k] + base;
  std::sort(out, out + n);
}

/// Batcher's bitonic network over Lanes * Vectors numbers in registers: no branch depends on a value.
template <int Lanes, int Vectors>
struct Network {
  typedef int32_t Ints __attribute__((vector_size(4 * Lanes)));
  typedef uint32_t Words __attribute__((vector_size(4 * Lanes)));

  // In blocks of `Up`, alternately rising and falling, every number meets the one `Apart` places away.
  template <int Up, int Apart, size_t... Lane>
  static MOEYARD_INLINE void within(Ints* a, std::index_sequence<Lane...>) {
    for (int v = 0; v < Vectors; ++v) {
      const Ints other = __builtin_shufflevector(a[v], a[v], (Lane ^ Apart)...);
      const Ints low = a[v] < other ? a[v] : other, high = a[v] < other ? other : a[v];
      if (Up >= Lanes && (v * Lanes & Up))
        a[v] = __builtin_shufflevector(low, high, (Lane & Apart ? Lane : Lane + Lanes)...);
      else
        a[v] = __builtin_shufflevector(low, high, (!(Lane & Apart) == !(Lane & Up) ? Lane : Lane + Lanes)...);
    }
  }

  template <int Up, int Apart>
  static MOEYARD_INLINE void meet(Ints* a) {
    if constexpr (Apart >= Lanes) {
      for (int v = 0; v < Vectors; ++v) {
        const int w = v ^ (Apart / Lanes);
        if (w < v) continue;
        const Ints low = a[v] < a[w] ? a[v] : a[w], high = a[v] < a[w] ? a[w] : a[v];
        const bool rising = !(v * Lanes & Up);
        a[v] = rising ? low : high, a[w] = rising ? high : low;
      }
    } else {
      within<Up, Apart>(a, std::make_index_sequence<size_t(Lanes)>());
    }
    if constexpr (Apart > 1) meet<Up, Apart / 2>(a);
  }

  template <int Up>
  static MOEYARD_INLINE void sort(Ints* a) {
    if constexpr (Up > 2) sort<Up / 2>(a);
    meet<Up, Up / 2>(a);
  }

  static MOEYARD_INLINE void run(const int32_t* ids, int32_t n, int32_t base, int32_t* out) {
    Ints a[Vectors];
    std::memcpy(a, ids, sizeof(a));
    static constexpr int32_t kLane[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Ints lane;
    std::memcpy(&lane, kLane, sizeof(lane));
    for (int v = 0; v < Vectors; ++v) a[v] = lane < n - v * Lanes ? a[v] : Ints{} + std::numeric_limits<int32_t>::max();
    sort<Lanes * Vectors>(a);
    // The padding may run over, so not as signed numbers.
    for (int v = 0; v < Vectors; ++v) a[v] = (Ints)((Words)a[v] + uint32_t(base));
    std::memcpy(out, a, sizeof(a));
  }
};

template <int Lanes>
MOEYARD_INLINE void order(int32_t* ids, int64_t n, int32_t base, int32_t* out) {
  if (n <= 16)
    Network<Lanes, 16 / Lanes>::run(ids, int32_t(n), base, out);
  else if (n <= 32)
    Network<Lanes, 32 / Lanes>::run(ids, int32_t(n), base, out);
  else if (Lanes > 4 && n <= 64)
    Network<Lanes, 64 / Lanes>::run(ids, int32_t(n), base, out);
  else
    sort_any(ids, n, base, out);
}

#ifdef MOEYARD_X86
MOEYARD_TARGET_AVX512 void order_avx512(int32_t* ids, int64_t n, int32_t base, int32_t* out) {
  order<16>(ids, n, base, out);
}
MOEYARD_TARGET_AVX2 void order_avx2(int32_t* ids, int64_t n, int32_t base, int32_t* out) {
  order<8>(ids, n, base, out);
}
#endif
void order_baseline(int32_t* ids, int64_t n, int32_t base, int32_t* out) { order<4>(ids, n, base, out); }

}  // namespace

Order pick_order([[maybe_unused]] Simd level) {
#ifdef MOEYARD_X86
  if (level == Simd::avx512) return order_avx512;
  if (level == Simd::avx2) return order_avx2;
#endif
  return order_baseline;
}

}  // namespace moeyard::cpu
