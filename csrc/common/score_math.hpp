// The score functions of topk_gating, for float, double and vectors of them, the same source on CPU and CUDA. They use
// nothing but + - * / sqrt and integer operations, each correctly rounded by IEEE 754, so without contraction
// (-ffp-contract=off, --fmad=false) both devices and every SIMD level get the same bits: choices made on scores agree
// everywhere. Errors stay below 2.6 ulp (slopes: 4), as tests/ops measure.
#pragma once
#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>

#include "common/host_device.hpp"
#ifndef __CUDACC__
#include "common/lanes.hpp"
#endif

namespace moeyard::score_math {

// ---- the two formats --------------------------------------------------------------------------------------------

// round_magic: adding it rounds to an integer, which then stands in the low bits with the exponent's bias added, ready
// to be shifted to its place (1.5 * 2^mantissa_bits + exponent_bias). ln2_high has so few bits that n * ln2_high is
// exact for every exponent n; ln2_high + ln2_low = ln 2 (Cody & Waite). exp_cutoff: a little above the logarithm of the
// smallest normal number, so that no subnormal is ever made.
template <class A>
struct Format;
template <>
struct Format<float> {
  using Number = float;
  using Word = int32_t;
  using Int = Word;
  static constexpr int mantissa_bits = 23, exponent_bias = 127;
  static constexpr float round_magic = 0x1.8p23f + exponent_bias, largest = 0x1.fffffep127f;
  static constexpr float inv_ln2 = 0x1.715476p0f, ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr float exp_cutoff = -87.3f, sqrt2 = 0x1.6a09e6p0f;
  static constexpr int exp_terms = 7, atanh_terms = 8;
};
template <>
struct Format<double> {
  using Number = double;
  using Word = int64_t;
  using Int = Word;
  static constexpr int mantissa_bits = 52, exponent_bias = 1023;
  static constexpr double round_magic = 0x1.8p52 + exponent_bias, largest = 0x1.fffffffffffffp1023;
  static constexpr double inv_ln2 = 0x1.71547652b82fep0, ln2_high = 0x1.62e42fefa2p-1, ln2_low = 0x1.9ef35793c7673p-41;
  static constexpr double exp_cutoff = -708.3, sqrt2 = 0x1.6a09e667f3bcdp0;
  static constexpr int exp_terms = 13, atanh_terms = 17;
};

// One declaration for host and device, as nvcc wants it; only the bodies differ.
#ifdef __CUDA_ARCH__
#define MOEYARD_ON(device, host) device
#else
#define MOEYARD_ON(device, host) host
#endif
MOEYARD_HD int32_t to_bits(float v) { return MOEYARD_ON(__float_as_int(v), std::bit_cast<int32_t>(v)); }
MOEYARD_HD int64_t to_bits(double v) { return MOEYARD_ON(__double_as_longlong(v), std::bit_cast<int64_t>(v)); }
template <std::floating_point A>
MOEYARD_HD A from_bits(typename Format<A>::Int v) {
  if constexpr (sizeof(A) == 4)
    return MOEYARD_ON(__int_as_float(v), std::bit_cast<float>(v));
  else
    return MOEYARD_ON(__longlong_as_double(v), std::bit_cast<double>(v));
}
MOEYARD_HD float square_root(float v) { return MOEYARD_ON(__fsqrt_rn(v), std::sqrt(v)); }
MOEYARD_HD double square_root(double v) { return MOEYARD_ON(__dsqrt_rn(v), std::sqrt(v)); }
#undef MOEYARD_ON

/// c as an A, whichever of its lanes; an integer of A's width as an A.
template <std::floating_point A>
MOEYARD_HD A constant(double c) {
  return A(c);
}
template <std::floating_point A>
MOEYARD_HD A from_int(typename Format<A>::Int n) {
  return A(n);
}
/// A constant for x > c ? c : x: in vectors gcc makes one instruction of that only where it can't know the constant.
template <std::floating_point A>
MOEYARD_HD A bound(A c) {
  return c;
}

#ifdef MOEYARD_LANES
template <class V>
  requires(kWidth<V> > 1)
struct Format<V> : Format<element_t<V>> {
  using Int = Lanes<typename Format<element_t<V>>::Word, kWidth<V>>;
};
template <class V>
  requires(kWidth<V> > 1)
MOEYARD_HD V constant(double c) {
  return broadcast<V>(element_t<V>(c));
}
template <class V>
  requires(kWidth<V> > 1)
MOEYARD_HD V bound(element_t<V> c) {
  V v = broadcast<V>(c);
#ifdef MOEYARD_X86
  asm("" : "+x"(v));
#endif
  return v;
}
template <class V>
  requires(kWidth<V> > 1)
MOEYARD_HD V from_int(typename Format<V>::Int n) {
  return __builtin_convertvector(n, V);
}
template <class V>
  requires(kWidth<V> > 1)
MOEYARD_HD typename Format<V>::Int to_bits(V v) {
  return (typename Format<V>::Int)v;
}
template <class V>
  requires(kWidth<V> > 1)
MOEYARD_HD V from_bits(typename Format<V>::Int v) {
  return (V)v;
}
template <class V>
  requires(kWidth<V> > 1)
MOEYARD_HD V square_root(V v) {
  for (int l = 0; l < kWidth<V>; ++l) v[l] = square_root(v[l]);
  return v;
}
#endif

// ---- series, by Horner's rule -----------------------------------------------------------------------------------

MOEYARD_HD constexpr double inverse_factorial(int n) {
  double f = 1;
  for (int i = 2; i <= n; ++i) f *= i;
  return 1 / f;
}

/// sum over i >= N of r^(i-N) / i!, up to i = exp_terms: exp(r) for N = 0, |r| <= ln(2)/2.
template <class A, int N = 0>
MOEYARD_HD auto exp_series(A r) {
  constexpr auto coefficient = typename Format<A>::Number(inverse_factorial(N));
  if constexpr (N == Format<A>::exp_terms)
    return coefficient;
  else
    return coefficient + r * exp_series<A, N + 1>(r);
}

/// sum over i >= N of z2^(i-N) / (2i+1), up to i = atanh_terms.
template <class A, int N>
MOEYARD_HD auto atanh_series(A z2) {
  constexpr auto coefficient = typename Format<A>::Number(1.0 / (2 * N + 1));
  if constexpr (N == Format<A>::atanh_terms)
    return coefficient;
  else
    return coefficient + z2 * atanh_series<A, N + 1>(z2);
}

/// 2 atanh(z) for |z| <= 1/3. The leading term is added last, which halves the error.
template <class A>
MOEYARD_HD A twice_atanh(A z) {
  const A z2 = z * z, twice = constant<A>(2) * z;
  return twice + twice * (z2 * atanh_series<A, 1>(z2));
}

// ---- functions --------------------------------------------------------------------------------------------------

/// Below the cutoff the cutoff; NaN stays NaN.
template <class A>
MOEYARD_HD A above_cutoff(A x) {
  const A cutoff = bound<A>(Format<A>::exp_cutoff);
  return x < cutoff ? cutoff : x;
}

/// exp(x) for x <= 0 (-inf too); what would be below the smallest normal number is 0. NaN fails the comparison and
/// comes through the series. The factor is selected, not the result: of that nvcc would make a branch around the
/// series, and one exponential would wait for the other.
template <class A>
MOEYARD_HD A exp_nonpositive(A x) {
  using F = Format<A>;
  const A inside = above_cutoff(x);
  const A shifted = inside * F::inv_ln2 + F::round_magic, n = shifted - F::round_magic;
  const A r = (inside - n * F::ln2_high) - n * F::ln2_low;
  const A power = from_bits<A>(to_bits(shifted) << F::mantissa_bits);
  return exp_series(r) * (x < F::exp_cutoff ? A{} : power);
}

/// log(1 + e) for e in [0, 1]: 2 atanh(e / (2 + e)).
template <class A>
MOEYARD_HD A log1p_unit(A e) {
  return twice_atanh(e / (constant<A>(2) + e));
}

/// log(x) for a normal x > 0: x = 2^n m with m in [sqrt(1/2), sqrt(2)].
template <class A>
MOEYARD_HD A log_positive(A x) {
  using F = Format<A>;
  using Int = typename F::Int;
  using Word = typename F::Word;
  const Int bits = to_bits(x), fraction = bits & ((Word(1) << F::mantissa_bits) - 1);
  const Int exponent = (bits >> F::mantissa_bits) - Word(F::exponent_bias);
  const A whole = from_bits<A>(fraction | (Word(F::exponent_bias) << F::mantissa_bits));
  const A m = whole > F::sqrt2 ? whole * constant<A>(0.5) : whole;
  const A n = from_int<A>(whole > F::sqrt2 ? exponent + Word(1) : exponent);
  const A log_m = twice_atanh((m - constant<A>(1)) / (m + constant<A>(1)));
  return n * F::ln2_high + (log_m + n * F::ln2_low);
}

/// exp(-|x|), of which sigmoid and softplus are made without overflow.
template <class A>
MOEYARD_HD A exp_minus_abs(A x) {
  return exp_nonpositive(x > A{} ? -x : x);
}

/// 1 / (1 + e) or e / (1 + e), where e is in [0, 1].
template <class A>
MOEYARD_HD A unit_quotient(A numerator, A e) {
  return numerator / (constant<A>(1) + e);
}
#ifdef __CUDA_ARCH__
/// The instructions of nvcc's own division but for its branch, for exponents that cannot be met here: for an e so small
/// that the remainder would lose bits, 1 + e is 1.
__device__ __forceinline__ float unit_quotient(float numerator, float e) {
  const float d = 1.0f + e;
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(d));
  inverse = __fmaf_rn(inverse, __fmaf_rn(-d, inverse, 1.0f), inverse);
  const float q = numerator * inverse;
  return __fmaf_rn(inverse, __fmaf_rn(-d, q, numerator), q);
}
#endif

template <class A>
MOEYARD_HD A sigmoid(A x) {
  const A e = exp_minus_abs(x);
  return unit_quotient(x >= A{} ? constant<A>(1) : e, e);
}

/// s (1 - s) for s = sigmoid(x), without the cancellation.
template <class A>
MOEYARD_HD A sigmoid_slope(A x) {
  const A e = exp_minus_abs(x), d = constant<A>(1) + e;
  return e / (d * d);
}

template <class A>
MOEYARD_HD A softplus(A x) {
  const A tail = log1p_unit(exp_minus_abs(x));
  return x > A{} ? x + tail : tail;
}

/// Far below 0 softplus(x) rounds to exp(x), which vanishes where its root is still a normal number.
template <class A>
MOEYARD_HD A sqrtsoftplus(A x) {
  const A far = constant<A>(-64);
  return x < far ? exp_nonpositive(x < far ? constant<A>(0.5) * x : far) : square_root(softplus(x));
}

/// d sqrtsoftplus / dx = sigmoid(x) / (2 s), far below 0 s / 2; 0 where s has become 0.
template <class A>
MOEYARD_HD A sqrtsoftplus_slope(A x) {
  const A s = sqrtsoftplus(x);
  const A near = s > A{} ? sigmoid(x) / (constant<A>(2) * s) : A{};
  return x < constant<A>(-64) ? constant<A>(0.5) * s : near;
}

/// +inf counts as the largest finite number, so that weights stay finite.
template <class A>
MOEYARD_HD A capped(A x) {
  const A largest = bound<A>(Format<A>::largest);
  return x > largest ? largest : x;
}

}  // namespace moeyard::score_math
