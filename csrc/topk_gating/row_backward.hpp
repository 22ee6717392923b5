// The backward pass over one row.
#pragma once
#include "topk_gating/kernels.hpp"
#include "topk_gating/row.hpp"
#include "topk_gating/topk_gating.hpp"

namespace moeyard::cpu {
namespace {

template <class A>
struct Gradients {
  const A *weights, *score_sum, *weight_sum;
  A logsumexp_sq, entropy_sum;

  explicit Gradients(const GatingGradients& g)
      : weights(static_cast<const A*>(g.weights)),
        score_sum(static_cast<const A*>(g.score_sum)),
        weight_sum(static_cast<const A*>(g.weight_sum)),
        logsumexp_sq(g.logsumexp_sq ? *static_cast<const A*>(g.logsumexp_sq) : A(0)),
        entropy_sum(g.entropy_sum ? *static_cast<const A*>(g.entropy_sum) : A(0)) {}

  bool of_softmax() const { return logsumexp_sq != A(0) || entropy_sum != A(0); }
  bool of_weights_only() const { return !score_sum && !of_softmax(); }
};

/// Scores divided by their sum are the softmax over the chosen logits, whose gradient needs no other logit: where it is
/// only the weights that have one, and no chosen score vanishes beside the row's largest.
template <class A>
bool may_skip_others(const GatingProblem& g, const Gradients<A>& grads) {
  return g.score == Score::softmax && g.renormalize && grads.of_weights_only();
}
template <class V>
MOEYARD_INLINE auto vanishes(V chosen, V max) {
  using A = element_t<V>;
  constexpr A low = A(0.75) * score_math::Format<A>::exp_cutoff;
  const auto finite = chosen > -std::numeric_limits<A>::infinity();
  return finite & (score_math::capped(chosen) - score_math::capped(max) < low);
}

// Scratch of one row: p probabilities, gs gradient of the scores, gx gradient of the logits (all [E]); per slot (also
// sized E) c the chosen scores and gc their gradient.
template <class A>
struct Row {
  A *p, *gs, *gx, *c, *gc;

  Row(Carver& carve, int64_t experts) {
    for (A** row : {&p, &gs, &gx, &c, &gc}) *row = carve.take<A>(experts);
  }
  static int64_t count(int64_t experts) { return 5 * experts; }
};

// x_i' = p_i (g_i - sum p g), added to `out` by `add(i, x_i')`.
template <class A, class Add>
void softmax_backward(int64_t n, const A* p, const A* g, Add&& add) {
  const A dot = row_sum<A>(n, [&](int64_t i) { return p[i] > A(0) ? p[i] * g[i] : A(0); });
  for (int64_t i = 0; i < n; ++i)
    if (p[i] > A(0)) add(i, p[i] * (g[i] - dot));
}

// Writes row.gc: the gradient that reaches slot s's chosen score row.c through weights and weight_sum; with
// `renormalize` that times row.c, the gradient of its logarithm. The scores' sum may be as small as a normal number
// can be: dividing a gradient by it would overflow where score / sum is harmless.
template <class A>
void weights_backward(const GatingProblem& g, const int32_t* experts, const A* grad_weights, const A* grad_weight_sum,
                      Row<A>& row) {
  for (int64_t s = 0; s < g.k; ++s) {
    A grad = grad_weights ? grad_weights[s] : A(0);
    if (grad_weight_sum) grad += grad_weight_sum[experts[s]];
    row.gc[s] = grad * A(g.scale);
  }
  if (!g.renormalize || g.score == Score::softmax_topk) return;
  const A sum = row_sum<A>(g.k, [&](int64_t s) { return row.c[s]; });
  const A dot = row_sum<A>(g.k, [&](int64_t s) { return sum > A(0) ? row.gc[s] * (row.c[s] / sum) : A(0); });
  for (int64_t s = 0; s < g.k; ++s) row.gc[s] = sum > A(0) ? (row.gc[s] - dot) * (row.c[s] / sum) : A(0);
}

// d log c / dx of a chosen score c > 0. For the softmax it leaves out -p, the same for all slots of a row: their
// gradients, as weights_backward renormalizes them, sum to 0.
template <class A>
A log_slope(Score kind, A x, A c) {
  if (kind == Score::softmax) return A(1);
  return kind == Score::sigmoid ? score_math::sigmoid(-x) : elementwise_slope(kind, x) / c;
}

// Adds to row.gs (scores as they are) or directly to row.gx (renormalized ones).
template <class A, class At>
void chosen_backward(const GatingProblem& g, At&& at, const int32_t* experts, const A* grad_weights,
                     const A* grad_weight_sum, Row<A>& row) {
  if (!grad_weights && !grad_weight_sum) return;
  if (g.score == Score::softmax_topk) {
    const RowSoftmax<A> chosen = row_softmax<A>(g.k, [&](int64_t s) { return at(experts[s]); }, row.c);
    for (int64_t s = 0; s < g.k; ++s) row.c[s] /= chosen.sum;
  } else {
    for (int64_t s = 0; s < g.k; ++s) {
      const A x = at(experts[s]);
      row.c[s] = x != x ? A(0) : is_elementwise(g.score) ? elementwise_score(g.score, x) : row.p[experts[s]];
    }
  }
  weights_backward(g, experts, grad_weights, grad_weight_sum, row);
  if (g.score == Score::softmax_topk)
    softmax_backward(g.k, row.c, row.gc, [&](int64_t s, A v) { row.gx[experts[s]] += v; });
  else if (g.renormalize)
    for (int64_t s = 0; s < g.k; ++s) {
      if (row.c[s] > A(0)) row.gx[experts[s]] += row.gc[s] * log_slope(g.score, at(experts[s]), row.c[s]);
    }
  else
    for (int64_t s = 0; s < g.k; ++s) row.gs[experts[s]] += row.gc[s];
}

template <class A, class At>
void scores_backward(const GatingProblem& g, At&& at, Row<A>& row) {
  if (is_elementwise(g.score)) {
    for (int64_t i = 0; i < g.experts; ++i)
      if (row.gs[i] != A(0)) row.gx[i] += row.gs[i] * elementwise_slope(g.score, at(i));
  } else {
    softmax_backward(g.experts, row.p, row.gs, [&](int64_t i, A v) { row.gx[i] += v; });
  }
}

// d lse^2 / dx = 2 lse p; d H / dx = -p (log p + H).
template <class A, class At>
void statistics_backward(const GatingProblem& g, At&& at, const RowSoftmax<A>& stats, const Gradients<A>& grads,
                         Row<A>& row) {
  // Not 0 times a logsumexp that may overflow when doubled.
  const A lse_grad = grads.logsumexp_sq == A(0) ? A(0) : A(2) * stats.log_sum_exp() * grads.logsumexp_sq;
  for (int64_t i = 0; i < g.experts; ++i) {
    if (!(row.p[i] > A(0))) continue;
    const A log_p = (score_math::capped(at(i)) - stats.max) - stats.log_sum;
    row.gx[i] += row.p[i] * lse_grad - row.p[i] * (log_p + stats.entropy) * grads.entropy_sum;
  }
}

template <class A, class At>
bool none_vanishes(const GatingProblem& g, At&& at, const int32_t* experts) {
  A max = -std::numeric_limits<A>::infinity();
  for (int64_t i = 0; i < g.experts; ++i) max = at(i) > max ? at(i) : max;
  for (int64_t s = 0; s < g.k; ++s)
    if (vanishes<A>(at(experts[s]), max)) return false;
  return true;
}

template <class A, class T>
void backward_row(const GatingProblem& g, const T* logits, const int32_t* experts, const A* grad_weights,
                  const Gradients<A>& grads, Row<A>& row, T* out) {
  const auto at = [&](int64_t i) { return A(to_float(logits[i])); };
  for (int64_t s = 0; s < g.k; ++s)
    if (experts[s] < 0 || experts[s] >= g.experts)
      fail_value("experts: expected ids in [0, ", g.experts, ") in rows that are not masked, got ", experts[s]);
  if (may_skip_others(g, grads) && none_vanishes<A>(g, at, experts)) {
    GatingProblem chosen = g;
    chosen.score = Score::softmax_topk;
    return backward_row<A, T>(chosen, logits, experts, grad_weights, grads, row, out);
  }
  RowSoftmax<A> stats;
  if (!is_elementwise(g.score) || grads.of_softmax()) {
    stats = row_softmax<A>(g.experts, at, row.p);
    const A factor = A(1) / stats.sum;
    for (int64_t i = 0; i < g.experts; ++i) row.p[i] *= factor;
  }
  std::fill(row.gx, row.gx + g.experts, A(0));
  if (grads.score_sum)
    std::copy(grads.score_sum, grads.score_sum + g.experts, row.gs);
  else
    std::fill(row.gs, row.gs + g.experts, A(0));
  chosen_backward(g, at, experts, grad_weights, grads.weight_sum, row);
  scores_backward(g, at, row);
  if (grads.of_softmax()) statistics_backward(g, at, stats, grads, row);
  for (int64_t i = 0; i < g.experts; ++i) {
    const A x = at(i);
    // -inf is a mask: gradient 0. NaN stays visible.
    const A grad = x != x ? x : x > -std::numeric_limits<A>::infinity() ? row.gx[i] : A(0);
    out[i] = from_float<T>(grad);
  }
}

}  // namespace
}  // namespace moeyard::cpu
