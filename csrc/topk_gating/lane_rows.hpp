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

/// Adds the second half of v to the first, then of that, and so on.
template <int N, class V>
MOEYARD_INLINE V add_halves(V* v) {
  if constexpr (N == 1) return v[0];
  for (int l = 0; l < N / 2; ++l) v[l] += v[l + N / 2];
  return add_halves<(N + 1) / 2>(v);
}

/// Adds up n <= kPartials partial sums as row_sum does. v has room for bit_ceil(n).
template <class V>
MOEYARD_INLINE V fold_partials(V* v, int64_t n) {
  const int width = int(std::bit_ceil(uint64_t(n)));
  for (int64_t l = n; l < width; ++l) v[l] = V{};
  switch (width) {
    case 32: return add_halves<32>(v);
    case 16: return add_halves<16>(v);
    case 8: return add_halves<8>(v);
    case 4: return add_halves<4>(v);
    case 2: return add_halves<2>(v);
    default: return v[0];
  }
}

/// term(0) + ... + term(n-1) in row_sum's order.
template <class V, class Term>
MOEYARD_INLINE V lane_sum(int64_t n, Term&& term) {
  V partial[kPartials];
  for (int64_t l = 0; l < std::min<int64_t>(n, kPartials); ++l) {
    partial[l] = V{} + term(l);
    for (int64_t i = l + kPartials; i < n; i += kPartials) partial[l] += term(i);
  }
  return fold_partials(partial, std::min<int64_t>(n, kPartials));
}

/// Which of the W rows from row t on are to be looked at: all ones in their lanes.
template <class V>
MOEYARD_INLINE mask_t<V> live_lanes(const uint8_t* mask, int64_t t, int64_t rows) {
  if (rows == kWidth<V> && !mask) return ~mask_t<V>{};
  element_t<mask_t<V>> live[kWidth<V>];
  for (int l = 0; l < kWidth<V>; ++l) live[l] = l < rows && (!mask || mask[t + l]) ? -1 : 0;
  return load_lanes<mask_t<V>>(live);
}

// Fewer columns than lanes: a power of 2 of them lies in as many full vectors.
template <int N, class V, class T, class Each>
MOEYARD_INLINE void load_narrow(const T* from, element_t<V>* x, Each&& each) {
  V v[N];
  for (int j = 0; j < N; ++j) v[j] = load_as<V>(from + j * kWidth<V>);
  rows_to_columns(v);
  for (int j = 0; j < N; ++j) store_lanes<V>(x + j * kWidth<V>, v[j]), each(v[j]);
}

template <int N, class V, class T>
MOEYARD_INLINE void store_narrow(const element_t<V>* x, T* to) {
  V v[N];
  for (int j = 0; j < N; ++j) v[j] = load_lanes<V>(x + j * kWidth<V>);
  columns_to_rows(v);
  for (int j = 0; j < N; ++j) store_as<V>(to + j * kWidth<V>, v[j]);
}

// Integers too.
template <class V, class T>
MOEYARD_INLINE element_t<V> as_lane(T v) {
  if constexpr (std::is_same_v<element_t<V>, T>)
    return v;
  else
    return to_float(v);
}

/// Turns `rows` <= W rows of n numbers into a block and calls each(v) with every vector of it, with some perhaps twice.
/// The lanes that are left repeat the last row.
template <class V, class T, class Each>
MOEYARD_INLINE void load_block(const T* from, int64_t n, int64_t rows, element_t<V>* x, Each&& each) {
  constexpr int W = kWidth<V>;
  if (n >= W) {
    const T* row[W];
    for (int64_t r = 0; r < W; ++r) row[r] = from + std::min(r, rows - 1) * n;
    for (int64_t tile = 0; tile < n; tile += W) {
      const int64_t first = std::min(tile, n - W);  // the last tile may overlap the one before
      V v[W];
      for (int r = 0; r < W; ++r) {
        v[r] = load_as<V>(row[r] + first);
        // The next block: strides of whole rows are not foreseen by the hardware.
        __builtin_prefetch(row[r] + first + W * n);
      }
      rows_to_columns(v);
      for (int j = 0; j < W; ++j) store_lanes<V>(x + (first + j) * W, v[j]), each(v[j]);
    }
  } else if (rows == W && n == 2 && W > 2) {
    load_narrow<2, V>(from, x, each);
  } else if (rows == W && n == 4 && W > 4) {
    load_narrow<4, V>(from, x, each);
  } else if (rows == W && n == 8 && W > 8) {
    load_narrow<8, V>(from, x, each);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t r = 0; r < W; ++r) x[i * W + r] = as_lane<V>(from[std::min(r, rows - 1) * n + i]);
      each(load_lanes<V>(x + i * W));
    }
  }
}

/// The inverse of load_block: writes the lanes of `rows` <= W rows.
template <class V, class T>
MOEYARD_INLINE void store_block(const element_t<V>* x, int64_t n, int64_t rows, T* to) {
  constexpr int W = kWidth<V>;
  if (n >= W) {
    for (int64_t tile = 0; tile < n; tile += W) {
      const int64_t first = std::min(tile, n - W);
      T* row = to + first;
      V v[W];
      for (int j = 0; j < W; ++j) v[j] = load_lanes<V>(x + (first + j) * W);
      columns_to_rows(v);
      for (int r = 0; r < W; ++r, row += n)
        if (r < rows) store_as<V>(row, v[r]);
    }
  } else if (rows == W && n == 2 && W > 2) {
    store_narrow<2, V>(x, to);
  } else if (rows == W && n == 4 && W > 4) {
    store_narrow<4, V>(x, to);
  } else if (rows == W && n == 8 && W > 8) {
    store_narrow<8, V>(x, to);
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < n; ++i) to[r * n + i] = from_float<T>(x[i * W + r]);
  }
}

/// Entry id[l] of a block of n for lane l: of few by comparing, else one by one.
template <class V, class Id>
MOEYARD_INLINE V gather_lanes(const element_t<V>* x, int64_t n, const Id* id) {
  constexpr int W = kWidth<V>;
  if constexpr (sizeof(Id) == sizeof(element_t<V>))
    if (n <= W) {
      V v{};
      for (int64_t i = 0; i < n; ++i) v = load_lanes<Lanes<Id, W>>(id) == Id(i) ? load_lanes<V>(x + i * W) : v;
      return v;
    }
  return each_lane<V>([&](size_t l) MOEYARD_INLINE_LAMBDA { return x[size_t(id[l]) * W + l]; });
}

/// The same for ids[slots][W].
template <class V, class Id>
MOEYARD_INLINE void gather_block(const element_t<V>* x, int64_t n, const Id* ids, int64_t slots, element_t<V>* to) {
  for (int64_t s = 0; s < slots * kWidth<V>; s += kWidth<V>) store_lanes<V>(to + s, gather_lanes<V>(x, n, ids + s));
}

template <class V>
struct BlockMax {
  V max;
  mask_t<V> has_nan;

  MOEYARD_INLINE BlockMax() : max(broadcast<V>(-std::numeric_limits<element_t<V>>::infinity())), has_nan{} {}
  MOEYARD_INLINE void see(V v) {
    max = higher(v, max);
    has_nan = v != v ? ~mask_t<V>{} : has_nan;
  }
};

template <class V>
MOEYARD_INLINE BlockMax<V> block_max(const element_t<V>* x, int64_t n) {
  BlockMax<V> top;
  for (int64_t i = 0; i < n; ++i) top.see(load_lanes<V>(x + i * kWidth<V>));
  return top;
}

/// RowSoftmax of every lane.
template <class V>
struct BlockSoftmax {
  V max, sum, log_sum, entropy;

  MOEYARD_INLINE V log_sum_exp() const { return max + log_sum; }
};

/// row_softmax; of a row with a NaN the sum is NaN and nothing is right. Writes the exponentials, not yet divided by
/// their sum, to e (which may be x).
template <class V>
MOEYARD_INLINE BlockSoftmax<V> block_softmax(const element_t<V>* x, int64_t n, V max, element_t<V>* e) {
  using score_math::capped;
  constexpr int W = kWidth<V>;
  const mask_t<V> some = max > -std::numeric_limits<element_t<V>>::infinity();
  BlockSoftmax<V> block;
  block.max = some ? capped(max) : V{};
  // Two loops of one level, so that the constants of exp stay in registers.
  const int64_t partials = std::min<int64_t>(n, kPartials);
  V sums[kPartials], dots[kPartials];
  const auto step = [&](int64_t i, V& sum, V& dot) MOEYARD_INLINE_LAMBDA {
    const V below = capped(load_lanes<V>(x + i * W)) - block.max, exp = score_math::exp_nonpositive(below);
    sum += exp;
    dot += exp * score_math::above_cutoff(below);  // 0 * -inf would be NaN, and -0 adds nothing
    store_lanes<V>(e + i * W, exp);
  };
  for (int64_t l = 0; l < partials; ++l) step(l, sums[l] = V{}, dots[l] = V{});
  for (int64_t i = kPartials; i < n; ++i) step(i, sums[i % kPartials], dots[i % kPartials]);
  const V sum = fold_partials(sums, partials), dot = fold_partials(dots, partials);
  block.sum = sum == V{} ? score_math::constant<V>(1) : sum;  // 0 without a logit above -inf
  block.log_sum = score_math::log_positive(block.sum);
  block.entropy = block.log_sum - dot / block.sum;
  return block;
}

}  // namespace
}  // namespace moeyard::cpu
