// Choosing the best keys of W rows at once, one row per lane: key descending, then index ascending.
#pragma once
#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <utility>

#include "topk_gating/lane_rows.hpp"

namespace moeyard::cpu {
namespace {

/// With more slots a block is chosen from row by row.
constexpr int64_t kNetworkSlots = 16;

// ---- networks ---------------------------------------------------------------------------------------------------

struct Comparator {
  int8_t high, low;
};

/// Batcher's odd-even merge sort of K numbers, a power of 2 (K. E. Batcher, AFIPS Spring 1968): the comparators.
template <int K>
constexpr auto sorting_network() {
  constexpr int steps = std::bit_width(unsigned(K)) - 1;
  std::array<Comparator, K * steps*(steps - 1) / 4 + K - 1> network{};
  int count = 0;
  for (int p = 1; p < K; p *= 2)
    for (int d = p; d > 0; d /= 2)
      for (int j = d % p; j + d < K; j += 2 * d)
        for (int i = j; i < std::min(j + d, K - d); ++i)
          if (i / (2 * p) == (i + d) / (2 * p)) network[count++] = {int8_t(i), int8_t(i + d)};
  return network;
}

/// Sorts K numbers that rise and then fall, or the other way round.
template <int K>
constexpr auto bitonic_network() {
  constexpr int steps = std::bit_width(unsigned(K)) - 1;
  std::array<Comparator, K * steps / 2> network{};
  int count = 0;
  for (int d = K / 2; d > 0; d /= 2)
    for (int i = 0; i < K; ++i)
      if (!(i & d)) network[count++] = {int8_t(i), int8_t(i + d)};
  return network;
}

template <class V>
MOEYARD_INLINE void exchange(V& high, V& low) {
  const V least = lower(high, low);
  high = higher(high, low);
  low = least;
}

/// Descending. The comparators as constants, so that the numbers stay in registers.
template <auto network, class V, size_t... c>
MOEYARD_INLINE void sort_by(V* v, std::index_sequence<c...>) {
  (exchange(v[network[c].high], v[network[c].low]), ...);
}
template <auto network, class V>
MOEYARD_INLINE void sort_by(V* v) {
  sort_by<network>(v, std::make_index_sequence<network.size()>());
}

// ---- lists ------------------------------------------------------------------------------------------------------

/// The K best in order.
template <int K, class V>
struct Best {
  V slot[K];

  MOEYARD_INLINE explicit Best(element_t<V> none) {
    for (int s = 0; s < K; ++s) slot[s] = broadcast<V>(none);
  }
  /// From the first slot down, each keeps the better and hands on the other. Returns what falls out.
  MOEYARD_INLINE V insert(V v) {
    for (int s = 0; s < K; ++s) exchange(slot[s], v);
    return v;
  }
  /// K at once, which takes two thirds of the instructions, from 8 on. Returns the best of what falls out.
  MOEYARD_INLINE V insert_all(V (&run)[K]) {
    sort_by<sorting_network<K>()>(run);
    for (int s = 0; s < K; ++s) exchange(slot[s], run[K - 1 - s]);  // the K best of both, falling and then rising
    sort_by<bitonic_network<K>()>(slot);
    V best = run[0];
    for (int s = 1; s < K; ++s) best = higher(best, run[s]);
    return best;
  }
};

/// The same of keys with their ids, for keys above -inf: a later id loses a tie. Empty slots hold -inf.
template <int K, class V>
struct BestWithId {
  V key[K];
  int_lanes<V> id[K];

  MOEYARD_INLINE BestWithId() {
    for (int s = 0; s < K; ++s)
      key[s] = broadcast<V>(-std::numeric_limits<element_t<V>>::infinity()), id[s] = int_lanes<V>{};
  }

  // From the last slot up: each takes what the slot above held, the new one or nothing.
  MOEYARD_INLINE void insert(V v, int_lanes<V> i) {
    for (int s = K - 1; s >= 0; --s) {
      const mask_t<V> here = v > key[s];
      key[s] = here ? v : key[s];
      id[s] = here ? i : id[s];
      if (s == 0) break;
      const mask_t<V> above = v > key[s - 1];
      key[s] = above ? key[s - 1] : key[s];
      id[s] = above ? id[s - 1] : id[s];
    }
  }
};

/// A key and its index in one integer of the key's order: with integer minima and maxima, insertion takes two
/// instructions a slot instead of five. The lowest bits of a key have to make room, so that keys alike in all others
/// look like a tie.
template <class V>
class Packing {
  using I = int_lanes<V>;
  using Word = element_t<I>;

 public:
  static constexpr Word none = std::numeric_limits<Word>::min();

  MOEYARD_INLINE explicit Packing(int64_t n)
      : index_(Word(std::bit_ceil(uint64_t(n)) - 1)), next_(broadcast<I>(index_)) {}

  /// The keys one after another. Two's complement for sign and magnitude: -0 becomes 0, and zeros at the end stay
  /// there.
  MOEYARD_INLINE I pack(V key) {
    const I bits = score_math::to_bits(key), sign = bits >> int(8 * sizeof(Word) - 1);
    const I order = ((bits & std::numeric_limits<Word>::max()) ^ sign) - sign;
    seen_ |= order;
    const I packed = (order & ~index_) | next_;
    next_ -= 1;  // the lower index wins
    return packed;
  }
  MOEYARD_INLINE I index(I packed) const { return index_ - (packed & index_); }
  MOEYARD_INLINE mask_t<I> looks_tied(I a, I b) const { return ((a ^ b) & ~index_) == 0; }
  /// Whether a key had anything in the bits that made room.
  MOEYARD_INLINE mask_t<I> lossy() const { return (seen_ & index_) != 0; }
  /// Also false for finite keys next to -inf.
  MOEYARD_INLINE mask_t<I> finite(I packed) const {
    return packed > (-std::bit_cast<Word>(std::numeric_limits<element_t<V>>::infinity()) | index_);
  }

 private:
  Word index_;
  I next_, seen_{};
};

/// Calls f with the number of slots, at least `slots` <= kNetworkSlots, as a constant.
template <class F>
MOEYARD_INLINE auto with_slots(int64_t slots, F&& f) {
  if (slots <= 1) return f(std::integral_constant<int, 1>{});
  if (slots <= 2) return f(std::integral_constant<int, 2>{});
  if (slots <= 4) return f(std::integral_constant<int, 4>{});
  if (slots <= 8) return f(std::integral_constant<int, 8>{});
  return f(std::integral_constant<int, int(kNetworkSlots)>{});
}

template <class V>
using ids_ptr = element_t<int_lanes<V>>*;

/// As select_in_lanes, with whole keys.
template <class V>
mask_t<V> select_exactly(const element_t<V>* key, int64_t n, int64_t slots, ids_ptr<V> ids) {
  constexpr int W = kWidth<V>;
  using Word = element_t<int_lanes<V>>;
  return with_slots(slots, [&](auto constant) MOEYARD_INLINE_LAMBDA {
    constexpr int K = decltype(constant)::value;
    BestWithId<K, V> list;
    for (int64_t i = 0; i < n; ++i) list.insert(load_lanes<V>(key + i * W), broadcast<int_lanes<V>>(Word(i)));
    V last = list.key[0];
    for (int s = 0; s < K && s < slots; ++s) {
      store_lanes<int_lanes<V>>(ids + s * W, list.id[s]);
      last = list.key[s];
    }
    return last > -std::numeric_limits<element_t<V>>::infinity();
  });
}

/// The same with packed keys. `doubtful`: some that look tied may not be, and the ids are worth nothing.
template <int K, class V>
MOEYARD_INLINE mask_t<V> select_packed(const element_t<V>* key, int64_t n, int64_t slots, ids_ptr<V> ids,
                                       bool& doubtful) {
  constexpr int W = kWidth<V>;
  using I = int_lanes<V>;
  Packing<V> packing(n);
  Best<K, I> list(packing.none);
  I next = broadcast<I>(packing.none);
  const auto take = [&](int64_t i) MOEYARD_INLINE_LAMBDA { return packing.pack(load_lanes<V>(key + i * W)); };
  int64_t i = 0;
  if constexpr (K >= 8)
    for (; i + K <= n; i += K) {
      I run[K];
      for (int r = 0; r < K; ++r) run[r] = take(i + r);
      next = higher(next, list.insert_all(run));
    }
  for (; i < n; ++i) next = higher(next, list.insert(take(i)));
  mask_t<I> tied{};
  I last = list.slot[0];
  for (int s = 0; s < K && s < slots; ++s) {
    last = list.slot[s];
    store_lanes<I>(ids + s * W, packing.index(last));
    tied |= packing.looks_tied(last, s + 1 < K ? list.slot[s + 1] : next);
  }
  doubtful = any_lane(tied & packing.lossy());
  return packing.finite(last);
}

/// Writes the ids of the `slots` best of n keys per lane to ids[slots][W]; returns the lanes where so many are above
/// -inf, perhaps without some whose last key is next to it. Where packed keys look tied and may not be, it is done
/// again with whole ones: for 8 slots of normal float32 logits one block of 8 rows in 500 with 64 experts, and one in
/// 20 where sigmoids of 256 are the keys.
template <class V>
mask_t<V> select_in_lanes(const element_t<V>* key, int64_t n, int64_t slots, ids_ptr<V> ids) {
  // The baseline's 16 bytes come without a comparison of 64-bit integers.
  if constexpr (sizeof(V) == 16 && sizeof(element_t<V>) == 8) {
    return select_exactly<V>(key, n, slots, ids);
  } else {
    bool doubtful = false;
    const mask_t<V> filled = with_slots(slots, [&](auto constant) MOEYARD_INLINE_LAMBDA {
      return select_packed<decltype(constant)::value, V>(key, n, slots, ids, doubtful);
    });
    return doubtful ? select_exactly<V>(key, n, slots, ids) : filled;
  }
}

/// The K best of n keys, without their ids, in order.
template <int K, class V>
MOEYARD_INLINE Best<K, V> best_keys(const element_t<V>* key, int64_t n) {
  Best<K, V> list(-std::numeric_limits<element_t<V>>::infinity());
  for (int64_t i = 0; i < n; ++i) list.insert(load_lanes<V>(key + i * kWidth<V>));
  return list;
}

}  // namespace
}  // namespace moeyard::cpu
