// The backward pass with a block per row.
#pragma once
#include "topk_gating/gate_backward.cuh"
#include "topk_gating/gate_block.cuh"

namespace moeyard::cuda {
namespace {

template <class A>
struct BlockBackward {
  const GateBackwardCall& call;
  const GatingProblem& g;
  const Gradients<A> grads;
  const int experts, k;
  const bool elementwise, to_scores;
  A *p, *given;    ///< [E] probabilities; the gradient of the scores, or what the slots give to the logits
  int32_t* first;  ///< [E] the first slot with this expert
  RowSoftmax<A> row;

  static int64_t bytes(int64_t experts) { return experts * int64_t(2 * sizeof(A) + sizeof(int32_t)); }
  __device__ BlockBackward(const GateBackwardCall& call_, void* shared)
      : call(call_),
        g(call_.problem),
        grads(call_.grads),
        experts(int(call_.problem.experts)),
        k(int(call_.problem.k)),
        elementwise(is_elementwise(call_.problem.score)),
        to_scores(call_.problem.score != Score::softmax_topk && !call_.problem.renormalize),
        p(static_cast<A*>(shared)),
        given(p + experts),
        first(reinterpret_cast<int32_t*>(given + experts)) {}

  template <class F>
  __device__ static void each(int n, F f) {
    for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) f(i);
  }

  // The gradient that reaches slot s's weight, times scale.
  __device__ A weight_grad(int64_t t, const int32_t* ids, int s) const {
    A grad = grads.weights ? grads.weights[t * k + s] : A(0);
    if (grads.weight_sum) grad += grads.weight_sum[ids[s]];
    return grad * A(g.scale);
  }

  /// given[ids[s]] += value(s) in the order of the slots. Distinct ids, as the forward pass returns them, go at once.
  template <class Value>
  __device__ void give(const int32_t* ids, Value value) {
    bool repeated = false;
    each(k, [&](int s) {
      if (!exists(ids[s])) return;
      if (first[ids[s]] == s)
        given[ids[s]] += value(s);
      else
        repeated = true;
    });
    if (!__syncthreads_or(repeated)) return;
    if (threadIdx.x == 0)
      for (int s = 0; s < k; ++s)
        if (exists(ids[s]) && first[ids[s]] != s) given[ids[s]] += value(s);
    __syncthreads();
  }
  __device__ bool exists(int id) const { return id >= 0 && id < experts; }

  // As backward.cuh's, but nothing per slot is kept: with up to E slots there is no room for it.
  template <class At>
  __device__ void chosen_backward(int64_t t, const int32_t* ids, At at, bool over_chosen) {
    A max = 0, over_sum = 1;
    if (over_chosen) {
      bool nan;
      const auto chosen = [&](int s) { return exists(ids[s]) ? at(ids[s]) : kLowest<A>; };
      max = block_max<A>(k, chosen, nan);
      const bool none = !(max > kLowest<A>);
      max = none ? A(0) : score_math::capped(max);
      over_sum = block_sum<A>(k, [&](int s) { return exp_below(chosen(s), max); });
      if (none) over_sum = 1;
    }
    const auto c = [&](int s) {
      if (!exists(ids[s])) return A(0);
      const A x = at(ids[s]);
      if (over_chosen) return exp_below(x, max) / over_sum;
      return x != x ? A(0) : elementwise ? elementwise_score(g.score, x) : p[ids[s]];
    };
    const auto grad = [&](int s) { return exists(ids[s]) ? weight_grad(t, ids, s) : A(0); };
    if (over_chosen) {
      const A dot = block_sum<A>(k, [&](int s) { return c(s) > A(0) ? c(s) * grad(s) : A(0); });
      give(ids, [&](int s) { return c(s) > A(0) ? c(s) * (grad(s) - dot) : A(0); });
    } else if (g.renormalize) {
      const A sum = block_sum<A>(k, c);
      const A dot = block_sum<A>(k, [&](int s) { return sum > A(0) ? grad(s) * (c(s) / sum) : A(0); });
      give(ids, [&](int s) {
        if (!(sum > A(0)) || !(c(s) > A(0))) return A(0);
        return (grad(s) - dot) * (c(s) / sum) * log_slope(g.score, at(ids[s]), c(s));
      });
    } else {
      give(ids, grad);
    }
  }
  __device__ static A exp_below(A x, A max) {
    return x != x ? A(0) : score_math::exp_nonpositive(score_math::capped(x) - max);
  }

  __device__ A score_sum_grad(int i) const { return grads.score_sum ? grads.score_sum[i] : A(0); }
  __device__ A score_grad(int i) const { return to_scores ? given[i] : score_sum_grad(i); }

  // The gradient of logit i, whose value is x.
  __device__ A logit_grad(int i, A x, A dot) const {
    if (x != x) return x;
    if (!(x > kLowest<A>)) return 0;
    const A grad = score_grad(i);
    A gx = to_scores ? A(0) : given[i];
    if (elementwise && grad != A(0)) gx += grad * elementwise_slope(g.score, x);
    if (!elementwise && p[i] > A(0)) gx += p[i] * (grad - dot);
    if (grads.of_softmax() && p[i] > A(0)) gx += grads.through_softmax(row, x, p[i]);
    return gx;
  }

  template <class At>
  __device__ bool none_vanishes(const int32_t* ids, At at) {
    bool nan, gone = false;
    const A max = block_max<A>(experts, at, nan);
    each(k, [&](int s) { gone |= exists(ids[s]) && vanishes(at(ids[s]), max); });
    return !__syncthreads_or(gone);
  }

  // Marks the first slot of every expert.
  __device__ void claim(const int32_t* ids) {
    __syncthreads();
    // As on the CPU the slots are added to what comes by score_sum.
    each(experts, [&](int i) { given[i] = to_scores ? score_sum_grad(i) : A(0), first[i] = INT_MAX; });
    __syncthreads();
    each(k, [&](int s) {
      if (exists(ids[s]))
        atomicMin(first + ids[s], s);
      else
        atomicOr(call.errors, unsigned(kBadGatingId));
    });
    __syncthreads();
  }

  __device__ void run(int64_t t) {
    const auto write = [&](int i, A v) {
      const int64_t at = t * experts + i;
      if constexpr (sizeof(A) == 8)
        static_cast<double*>(call.grad_logits)[at] = v;
      else
        with_element(g.dtype, [&](auto* type) {
          using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
          static_cast<T*>(call.grad_logits)[at] = narrow<T>(v);
        });
    };
    if (call.mask && !call.mask[t]) return each(experts, [&](int i) { write(i, A(0)); });
    const RowReader<A> at(g, call.logits, t);
    const int32_t* ids = call.experts + t * k;
    claim(ids);
    bool nan;
    row = block_softmax<A>(experts, at, p, nan);
    const A factor = A(1) / row.sum;
    each(experts, [&](int i) { p[i] *= factor; });
    __syncthreads();
    if (grads.of_choice()) {
      bool over_chosen = g.score == Score::softmax_topk;
      if (g.score == Score::softmax && g.renormalize && grads.of_weights_only()) over_chosen = none_vanishes(ids, at);
      chosen_backward(t, ids, at, over_chosen);
    }
    const auto weighted = [&](int i) { return p[i] > A(0) ? p[i] * score_grad(i) : A(0); };
    const A dot = elementwise ? A(0) : block_sum<A>(experts, weighted);
    each(experts, [&](int i) { write(i, logit_grad(i, at(i), dot)); });
  }
};

// ---- kernel -----------------------------------------------------------------------------------------------------

template <class A>
__global__ void __launch_bounds__(kBlockRowThreads)
    gate_block_backward_kernel(const __grid_constant__ GateBackwardCall call) {
  CU_DYN_SHARED(double, shared);
  BlockBackward<A> backward(call, shared);
  for (int64_t t = blockIdx.x; t < call.problem.rows; t += gridDim.x) backward.run(t);
}

}  // namespace
}  // namespace moeyard::cuda
