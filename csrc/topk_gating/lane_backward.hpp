// The backward pass over a block of W rows, one per lane; what it does is explained where single rows do it.
#pragma once
#include "topk_gating/lane_rows.hpp"
#include "topk_gating/row_backward.hpp"

namespace moeyard::cpu {
namespace {

template <class A, class T, int W>
class LaneBackward {
  using V = Lanes<A, W>;
  using M = mask_t<V>;

 public:
  LaneBackward(const GatingProblem& g, const BackwardCall& call, const Gradients<A>& grads, Carver& carve)
      : g_(g),
        call_(call),
        grads_(grads),
        to_scores_(g.score != Score::softmax_topk && !g.renormalize),
        chosen_only_(may_skip_others(g, grads) || (g.score == Score::softmax_topk && grads.of_weights_only())) {
    for (A** block : {&x_, &p_, &chosen_grad_}) *block = carve.take<A>(g.experts * W);
    for (A** block : {&c_, &gc_, &cx_}) *block = carve.take<A>(g.k * W);
    id_ = carve.take<int32_t>(g.k * W);
  }
  static int64_t bytes(const GatingProblem& g) {
    return ((3 * g.experts + 3 * g.k) * int64_t(sizeof(A)) + g.k * int64_t(sizeof(int32_t))) * W;
  }

  /// Rows [t, t + rows), rows <= W. False, with nothing written, where a row has a NaN or an id that does not exist:
  /// such blocks are left to the path of single rows.
  bool run(int64_t t, int64_t rows) {
    const M live = live_lanes<V>(call_.mask, t, rows);
    if (!load_ids(t, rows, live)) return false;
    BlockMax<V> top;
    load_block<V>(static_cast<const T*>(call_.logits) + t * g_.experts, g_.experts, rows, x_,
                  [&](V v) MOEYARD_INLINE_LAMBDA { top.see(v); });
    if (any_lane(top.has_nan & live)) return false;
    if (chosen_only_) return run_chosen(t, rows, top.max, live);
    BlockSoftmax<V> softmax{};
    if (!is_elementwise(g_.score) || grads_.of_softmax()) {
      softmax = block_softmax<V>(x_, g_.experts, top.max, p_);
      const V factor = score_math::constant<V>(1) / softmax.sum;
      for (int64_t i = 0; i < g_.experts; ++i) store_lanes<V>(p_ + i * W, load_lanes<V>(p_ + i * W) * factor);
    }
    std::fill(chosen_grad_, chosen_grad_ + g_.experts * W, A(0));
    if (grads_.weights || grads_.weight_sum) chosen_backward(t, rows);
    scores_backward(softmax, live);
    store_block<V>(x_, g_.experts, rows, static_cast<T*>(call_.grad_logits) + t * g_.experts);
    return true;
  }

 private:
  // Where nothing but the chosen logits has a gradient, no softmax over all experts is needed and most of it is zeros.
  bool run_chosen(int64_t t, int64_t rows, V max, M live) {
    gather_block<V>(x_, g_.experts, id_, g_.k, cx_);
    if (g_.score == Score::softmax) {
      M gone{};
      for (int64_t s = 0; s < g_.k; ++s) gone |= vanishes<V>(load_lanes<V>(cx_ + s * W), max);
      if (any_lane(gone & live)) return false;
    }
    softmax_over_chosen();
    weights_backward(t, rows);
    softmax_backward();
    T* out = static_cast<T*>(call_.grad_logits) + t * g_.experts;
    std::memset(static_cast<void*>(out), 0, size_t(rows * g_.experts) * sizeof(T));
    for (int64_t l = 0; l < rows; ++l) {
      if (call_.mask && !call_.mask[t + l]) continue;
      // Adding 0 makes -0 what it is where it is added to a sum.
      for (int64_t s = 0; s < g_.k; ++s) out[l * g_.experts + id_[s * W + l]] = from_float<T>(A(0) + gc_[s * W + l]);
    }
    return true;
  }

  // Rows that are not looked at get id 0.
  bool load_ids(int64_t t, int64_t rows, M live) {
    using Ids = Lanes<int32_t, W>;
    load_block<Ids>(call_.experts + t * g_.k, g_.k, rows, id_, [](Ids) {});
    const Ids looked_at = __builtin_convertvector(live, Ids);
    Ids bad{};
    for (int64_t s = 0; s < g_.k; ++s) {
      const Ids id = load_lanes<Ids>(id_ + s * W) & looked_at;
      store_lanes<Ids>(id_ + s * W, id);
      bad |= (id < 0) | (id >= int32_t(g_.experts));
    }
    return !any_lane(bad);
  }

  void softmax_over_chosen() {
    const BlockSoftmax<V> softmax = block_softmax<V>(cx_, g_.k, block_max<V>(cx_, g_.k).max, c_);
    for (int64_t s = 0; s < g_.k; ++s) store_lanes<V>(c_ + s * W, load_lanes<V>(c_ + s * W) / softmax.sum);
  }

  // Of the logits in cx, to c.
  void chosen_scores() {
    if (g_.score == Score::softmax) return gather_block<V>(p_, g_.experts, id_, g_.k, c_);
    if (g_.score == Score::softmax_topk) return softmax_over_chosen();
    for (int64_t s = 0; s < g_.k; ++s)
      store_lanes<V>(c_ + s * W, elementwise_score(g_.score, load_lanes<V>(cx_ + s * W)));
  }

  void weights_backward(int64_t t, int64_t rows) {
    if (grads_.weights)
      load_block<V>(grads_.weights + t * g_.k, g_.k, rows, gc_, [](V) {});
    else
      std::fill(gc_, gc_ + g_.k * W, A(0));
    if (grads_.weight_sum)
      for (int64_t s = 0; s < g_.k * W; ++s) gc_[s] += grads_.weight_sum[id_[s]];
    const A scale = A(g_.scale);
    for (int64_t s = 0; s < g_.k * W; ++s) gc_[s] *= scale;
    if (!g_.renormalize || g_.score == Score::softmax_topk || chosen_only_) return;
    const auto c = [&](int64_t s) { return load_lanes<V>(c_ + s * W); };
    const auto gc = [&](int64_t s) { return load_lanes<V>(gc_ + s * W); };
    const V sum = lane_sum<V>(g_.k, c);
    const V dot = lane_sum<V>(g_.k, [&](int64_t s) { return sum > V{} ? gc(s) * (c(s) / sum) : V{}; });
    for (int64_t s = 0; s < g_.k; ++s) store_lanes<V>(gc_ + s * W, sum > V{} ? (gc(s) - dot) * (c(s) / sum) : V{});
  }

  MOEYARD_INLINE V log_slope(V x, V c) {
    if (g_.score == Score::softmax) return score_math::constant<V>(1);
    return g_.score == Score::sigmoid ? score_math::sigmoid(-x) : elementwise_slope(g_.score, x) / c;
  }

  // From the gradient of the softmax over the chosen to that of their logits.
  void softmax_backward() {
    const auto c = [&](int64_t s) { return load_lanes<V>(c_ + s * W); };
    const auto gc = [&](int64_t s) { return load_lanes<V>(gc_ + s * W); };
    const V dot = lane_sum<V>(g_.k, [&](int64_t s) { return c(s) > V{} ? c(s) * gc(s) : V{}; });
    for (int64_t s = 0; s < g_.k; ++s) store_lanes<V>(gc_ + s * W, c(s) > V{} ? c(s) * (gc(s) - dot) : V{});
  }

  // Leaves in chosen_grad the part of the scores' gradient (to_scores) or of the logits' that comes by the weights.
  void chosen_backward(int64_t t, int64_t rows) {
    gather_block<V>(x_, g_.experts, id_, g_.k, cx_);
    chosen_scores();
    weights_backward(t, rows);
    const auto c = [&](int64_t s) { return load_lanes<V>(c_ + s * W); };
    const auto gc = [&](int64_t s) { return load_lanes<V>(gc_ + s * W); };
    if (g_.score == Score::softmax_topk) {
      softmax_backward();
    } else if (g_.renormalize) {
      for (int64_t s = 0; s < g_.k; ++s) {
        const V slope = log_slope(load_lanes<V>(cx_ + s * W), c(s));
        store_lanes<V>(gc_ + s * W, c(s) > V{} ? gc(s) * slope : V{});
      }
    }
    for (int64_t s = 0; s < g_.k * W; ++s) chosen_grad_[int64_t(id_[s]) * W + s % W] += gc_[s];
  }

  MOEYARD_INLINE V score_grad(int64_t i) {
    const V grad = grads_.score_sum ? broadcast<V>(grads_.score_sum[i]) : V{};
    return to_scores_ ? grad + load_lanes<V>(chosen_grad_ + i * W) : grad;
  }

  // Writes the gradient over the logits.
  void scores_backward(const BlockSoftmax<V>& softmax, M live) {
    const bool elementwise = is_elementwise(g_.score);
    const auto p = [&](int64_t i) { return load_lanes<V>(p_ + i * W); };
    V dot{};
    if (!elementwise) dot = lane_sum<V>(g_.experts, [&](int64_t i) { return p(i) > V{} ? p(i) * score_grad(i) : V{}; });
    const V lse_grad = grads_.logsumexp_sq == A(0) ? V{} : A(2) * softmax.log_sum_exp() * grads_.logsumexp_sq;
    for (int64_t i = 0; i < g_.experts; ++i) {
      const V x = load_lanes<V>(x_ + i * W), grad = score_grad(i);
      V gx = to_scores_ ? V{} : load_lanes<V>(chosen_grad_ + i * W);
      if (elementwise)
        gx = grad != V{} ? gx + grad * elementwise_slope(g_.score, x) : gx;
      else
        gx = p(i) > V{} ? gx + p(i) * (grad - dot) : gx;
      if (grads_.of_softmax()) {
        const V log_p = (score_math::capped(x) - softmax.max) - softmax.log_sum;
        const V part = p(i) * lse_grad - p(i) * (log_p + softmax.entropy) * grads_.entropy_sum;
        gx = p(i) > V{} ? gx + part : gx;
      }
      gx = x > -std::numeric_limits<A>::infinity() ? gx : V{};
      store_lanes<V>(x_ + i * W, keep_lanes(live, gx));
    }
  }

  const GatingProblem& g_;
  const BackwardCall& call_;
  const Gradients<A>& grads_;
  const bool to_scores_, chosen_only_;
  A *x_, *p_, *chosen_grad_, *c_, *gc_, *cx_;
  int32_t* id_;
};

}  // namespace
}  // namespace moeyard::cpu
