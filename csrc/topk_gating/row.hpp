// What forward and backward on the CPU compute of one row of logits, already converted to A (float or double).
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/score_math.hpp"
#include "topk_gating/topk_gating.hpp"

namespace moeyard::cpu {
namespace {

constexpr int kPartials = 32;

/// term(0) + ... + term(n-1) in the order that a warp takes on CUDA: partial sum l adds l, l+32, l+64, ..., then halves
/// are folded. It is the one order of all sums along a row.
template <class A, class Term>
A row_sum(int64_t n, Term&& term) {
  A partial[kPartials] = {};
  int64_t i = 0;
  for (; i + kPartials <= n; i += kPartials)
    for (int l = 0; l < kPartials; ++l) partial[l] += term(i + l);
  for (int l = 0; i + l < n; ++l) partial[l] += term(i + l);
  for (int half = kPartials / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) partial[l] += partial[l + half];
  return partial[0];
}

/// The softmax of a row over its logits above -inf; NaN logits are left out (and reported), +inf is capped. A row with
/// no logit above -inf has the initial values: every probability, the log-sum-exp and the entropy are 0.
template <class A>
struct RowSoftmax {
  A max = 0, sum = 1, log_sum = 0, entropy = 0;
  bool has_nan = false;

  A log_sum_exp() const { return max + log_sum; }
};

/// `at(i)` is logit i of n. Writes the exponentials, not yet divided by their sum, to e and returns the rest.
template <class A, class At>
RowSoftmax<A> row_softmax(int64_t n, At&& at, A* e) {
  using score_math::capped;
  RowSoftmax<A> row;
  // As many maxima as row_sum has sums, so that the compiler makes vectors of them.
  A top[kPartials];
  int has_nan = 0;
  std::fill(top, top + kPartials, -std::numeric_limits<A>::infinity());
  const auto see = [&](int l, A v) { has_nan |= v != v, top[l] = v > top[l] ? v : top[l]; };
  int64_t i = 0;
  for (; i + kPartials <= n; i += kPartials)
    for (int l = 0; l < kPartials; ++l) see(l, at(i + l));
  for (int l = 0; i + l < n; ++l) see(l, at(i + l));
  const A max = *std::max_element(top, top + kPartials);
  row.has_nan = has_nan != 0;
  if (!(max > -std::numeric_limits<A>::infinity())) {
    std::fill(e, e + n, A(0));
    return row;
  }
  row.max = capped(max);
  for (i = 0; i < n; ++i) {
    const A v = at(i);
    e[i] = v == v ? score_math::exp_nonpositive(capped(v) - row.max) : A(0);
  }
  row.sum = row_sum<A>(n, [&](int64_t i) { return e[i]; });
  row.log_sum = score_math::log_positive(row.sum);
  // -sum p log p with log p = (x - max) - log_sum; 0 log 0 = 0, also where x - max is -inf.
  const A dot = row_sum<A>(n, [&](int64_t i) { return e[i] > A(0) ? e[i] * (capped(at(i)) - row.max) : A(0); });
  row.entropy = row.log_sum - dot / row.sum;
  return row;
}

/// The elementwise scores (sigmoid, sqrtsoftplus) of one logit or of one per lane; NaN stays NaN.
template <class A>
MOEYARD_INLINE A elementwise_score(Score kind, A x) {
  x = score_math::capped(x);
  return kind == Score::sigmoid ? score_math::sigmoid(x) : score_math::sqrtsoftplus(x);
}

template <class A>
MOEYARD_INLINE A elementwise_slope(Score kind, A x) {
  x = score_math::capped(x);
  return kind == Score::sigmoid ? score_math::sigmoid_slope(x) : score_math::sqrtsoftplus_slope(x);
}

/// Whether the choice is made on the logits themselves.
inline bool selects_raw(const GatingProblem& g, const void* bias) {
  return g.score == Score::softmax_topk || (!bias && g.num_groups == 0);
}

inline bool is_elementwise(Score kind) { return kind == Score::sigmoid || kind == Score::sqrtsoftplus; }

}  // namespace
}  // namespace moeyard::cpu
