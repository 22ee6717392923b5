// Several rows at once, one per lane: what forward and backward share. A block is a [n][W] array of A, lane l of entry
// i belonging to row l; each lane sees the operations of row.hpp in the same order, so its bits are a single row's.
#pragma once
#include <algorithm>
#include <bit>
#include <limits>

#include "common/lanes.hpp"
#include "topk_gating/row.hpp"

namespace moeyard::cpu {
namespace {

template <class V>
using mask_t = decltype(V{} > V{});
template <class V>
using int_lanes = typename score_math::Format<V>::Int;

/// v where the mask holds, else 0.
template <class V>
MOEYARD_INLINE V keep_lanes(mask_t<V> mask, V v) {
  return (V)((int_lanes<V>)v & mask);
}

/// Adds up v[0], ..., v[n-1] as row_sum does once n <= kPartials partial sums are left. v has room for bit_ceil(n)
/// entries.
template <class V>
MOEYARD_INLINE V fold_lanes(V* v, int64_t n) {
  const int64_t width = int64_t(std::bit_ceil(uint64_t(n)));
  for (int64_t l = n; l < width; ++l) v[l] = V{};
  for (int64_t half = width / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) v[l] += v[l + half];
  return v[0];
}

/// term(0) + ... + term(n-1) in row_sum's order.
template <class V, class Term>
MOEYARD_INLINE V lane_sum(int64_t n, Term&& term) {
  V partial[kPartials];
  for (int64_t l = 0; l < std::min<int64_t>(n, kPartials); ++l) {
    partial[l] = V{} + term(l);
    for (int64_t i = l + kPartials; i < n; i += kPartials) partial[l] += term(i);
  }
  return fold_lanes(partial, std::min<int64_t>(n, kPartials));
}

/// Which of the W rows from row t on are to be looked at: all ones in their lanes.
template <class V>
MOEYARD_INLINE mask_t<V> live_lanes(const uint8_t* mask, int64_t t, int64_t rows) {
  element_t<mask_t<V>> live[kWidth<V>];
  for (int l = 0; l < kWidth<V>; ++l) live[l] = l < rows && (!mask || mask[t + l]) ? -1 : 0;
  return load_lanes<mask_t<V>>(live);
}

template <class V>
struct BlockMax {
  V max;
  mask_t<V> has_nan;
};

// Fewer experts than lanes: a power of 2 of them lies in as many full vectors.
template <int N, class V, class T>
MOEYARD_INLINE void load_narrow(const T* logits, element_t<V>* x) {
  V v[N];
  for (int j = 0; j < N; ++j) v[j] = load_as<V>(logits + j * kWidth<V>);
  rows_to_columns(v);
  for (int j = 0; j < N; ++j) store_lanes<V>(x + j * kWidth<V>, v[j]);
}

template <int N, class V, class T>
MOEYARD_INLINE void store_narrow(const element_t<V>* x, T* out) {
  V v[N];
  for (int j = 0; j < N; ++j) v[j] = load_lanes<V>(x + j * kWidth<V>);
  columns_to_rows(v);
  for (int j = 0; j < N; ++j) store_as<V>(out + j * kWidth<V>, v[j]);
}

/// Turns `rows` <= W rows of n logits into a block; the lanes that are left repeat the last row.
template <class V, class T>
MOEYARD_INLINE void load_block(const T* logits, int64_t n, int64_t rows, element_t<V>* x) {
  constexpr int W = kWidth<V>;
  const T* row[W];
  for (int r = 0; r < W; ++r) row[r] = logits + std::min<int64_t>(r, rows - 1) * n;
  if (n >= W) {
    for (int64_t tile = 0; tile < n; tile += W) {
      const int64_t first = std::min(tile, n - W);  // the last tile may overlap the one before
      V v[W];
      for (int r = 0; r < W; ++r) v[r] = load_as<V>(row[r] + first);
      rows_to_columns(v);
      for (int j = 0; j < W; ++j) store_lanes<V>(x + (first + j) * W, v[j]);
    }
  } else if (rows == W && n == 2 && W > 2) {
    load_narrow<2, V>(logits, x);
  } else if (rows == W && n == 4 && W > 4) {
    load_narrow<4, V>(logits, x);
  } else if (rows == W && n == 8 && W > 8) {
    load_narrow<8, V>(logits, x);
  } else {
    for (int64_t i = 0; i < n; ++i)
      for (int r = 0; r < W; ++r) x[i * W + r] = to_float(row[r][i]);
  }
}

/// The inverse of load_block: writes the lanes of `rows` <= W rows.
template <class V, class T>
MOEYARD_INLINE void store_block(const element_t<V>* x, int64_t n, int64_t rows, T* out) {
  constexpr int W = kWidth<V>;
  if (n >= W) {
    for (int64_t tile = 0; tile < n; tile += W) {
      const int64_t first = std::min(tile, n - W);
      V v[W];
      for (int j = 0; j < W; ++j) v[j] = load_lanes<V>(x + (first + j) * W);
      columns_to_rows(v);
      for (int r = 0; r < W; ++r)
        if (r < rows) store_as<V>(out + r * n + first, v[r]);
    }
  } else if (rows == W && n == 2 && W > 2) {
    store_narrow<2, V>(x, out);
  } else if (rows == W && n == 4 && W > 4) {
    store_narrow<4, V>(x, out);
  } else if (rows == W && n == 8 && W > 8) {
    store_narrow<8, V>(x, out);
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < n; ++i) out[r * n + i] = from_float<T>(x[i * W + r]);
  }
}

template <class V>
MOEYARD_INLINE BlockMax<V> block_max(const element_t<V>* x, int64_t n) {
  BlockMax<V> m{broadcast<V>(-std::numeric_limits<element_t<V>>::infinity()), {}};
  for (int64_t i = 0; i < n; ++i) {
    const V v = load_lanes<V>(x + i * kWidth<V>);
    m.max = v > m.max ? v : m.max;
    m.has_nan = v != v ? ~mask_t<V>{} : m.has_nan;
  }
  return m;
}

/// RowSoftmax of every lane.
template <class V>
struct BlockSoftmax {
  V max, sum, log_sum, entropy;

  MOEYARD_INLINE V log_sum_exp() const { return max + log_sum; }
};

/// row_softmax without NaN: writes the exponentials, not yet divided by their sum, to e (which may be x).
template <class V>
MOEYARD_INLINE BlockSoftmax<V> block_softmax(const element_t<V>* x, int64_t n, V max, element_t<V>* e) {
  using score_math::capped;
  constexpr int W = kWidth<V>;
  const mask_t<V> some = max > -std::numeric_limits<element_t<V>>::infinity();
  BlockSoftmax<V> block;
  block.max = some ? capped(max) : V{};
  V sums[kPartials], dots[kPartials];
  for (int64_t l = 0; l < std::min<int64_t>(n, kPartials); ++l) {
    V sum{}, dot{};
    for (int64_t i = l; i < n; i += kPartials) {
      const V below = capped(load_lanes<V>(x + i * W)) - block.max, exp = score_math::exp_nonpositive(below);
      sum += exp;
      dot += exp > V{} ? exp * below : V{};
      store_lanes<V>(e + i * W, exp);
    }
    sums[l] = sum, dots[l] = dot;
  }
  const V sum = fold_lanes(sums, std::min<int64_t>(n, kPartials)),
          dot = fold_lanes(dots, std::min<int64_t>(n, kPartials));
  block.sum = some ? sum : score_math::constant<V>(1);
  block.log_sum = score_math::log_positive(block.sum);
  block.entropy = block.log_sum - dot / block.sum;
  return block;
}

// ---- selection --------------------------------------------------------------------------------------------------

/// With more slots a block is chosen from row by row.
constexpr int64_t kNetworkSlots = 16;

/// The K best of the keys above -inf, in order, by insertion: a later index loses a tie. Empty slots hold -inf.
template <int K, class V>
struct Best {
  V key[K];
  int_lanes<V> id[K];

  MOEYARD_INLINE Best() {
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

/// Calls f with the number of slots, at least `slots` <= kNetworkSlots, as a constant.
template <class F>
MOEYARD_INLINE auto with_slots(int64_t slots, F&& f) {
  if (slots <= 1) return f(std::integral_constant<int, 1>{});
  if (slots <= 2) return f(std::integral_constant<int, 2>{});
  if (slots <= 4) return f(std::integral_constant<int, 4>{});
  if (slots <= 6) return f(std::integral_constant<int, 6>{});
  if (slots <= 8) return f(std::integral_constant<int, 8>{});
  return f(std::integral_constant<int, int(kNetworkSlots)>{});
}

/// Writes the ids of the `slots` best of n keys per lane to ids[slots][W], their keys to best; returns the lanes where
/// so many are above -inf.
template <class V>
mask_t<V> select_in_lanes(const element_t<V>* key, int64_t n, int64_t slots, element_t<V>* best,
                          typename score_math::Format<V>::Word* ids) {
  constexpr int W = kWidth<V>;
  using Word = typename score_math::Format<V>::Word;
  return with_slots(slots, [&](auto constant) MOEYARD_INLINE_LAMBDA {
    constexpr int K = decltype(constant)::value;
    Best<K, V> list;
    for (int64_t i = 0; i < n; ++i) list.insert(load_lanes<V>(key + i * W), broadcast<int_lanes<V>>(Word(i)));
    V last = list.key[0];
    for (int s = 0; s < K; ++s) {
      if (s >= slots) break;
      store_lanes<V>(best + s * W, list.key[s]);
      store_lanes<int_lanes<V>>(ids + s * W, list.id[s]);
      last = list.key[s];
    }
    return last > -std::numeric_limits<element_t<V>>::infinity();
  });
}

}  // namespace
}  // namespace moeyard::cpu
