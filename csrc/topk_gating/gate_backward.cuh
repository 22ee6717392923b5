// The backward pass with a team of lanes per row: scores are recomputed from the logits and the chosen ids.
#pragma once
#include "topk_gating/gate_select.cuh"

namespace moeyard::cuda {
namespace {

struct GateBackwardCall {
  GatingProblem problem;
  const void* logits;
  const int32_t* experts;
  const uint8_t* mask;
  GatingGradients grads;
  void* grad_logits;
  unsigned* errors;
  bool packed;
};

/// The gradients of the outputs, the two scalars read on the device.
template <class A>
struct Gradients {
  const A *weights, *score_sum, *weight_sum;
  A logsumexp_sq, entropy_sum;

  __device__ explicit Gradients(const GatingGradients& g)
      : weights(static_cast<const A*>(g.weights)),
        score_sum(static_cast<const A*>(g.score_sum)),
        weight_sum(static_cast<const A*>(g.weight_sum)),
        logsumexp_sq(g.logsumexp_sq ? *static_cast<const A*>(g.logsumexp_sq) : A(0)),
        entropy_sum(g.entropy_sum ? *static_cast<const A*>(g.entropy_sum) : A(0)) {}
  __device__ bool of_choice() const { return weights || weight_sum; }
  __device__ bool of_softmax() const { return logsumexp_sq != A(0) || entropy_sum != A(0); }
  __device__ bool of_weights_only() const { return !score_sum && !of_softmax(); }
  /// What reaches logit x of probability p through the two sums: d lse^2 / dx = 2 lse p; d H / dx = -p (log p + H).
  __device__ A through_softmax(const RowSoftmax<A>& row, A x, A p) const {
    // Not 0 times a logsumexp that may overflow when doubled.
    const A lse_grad = logsumexp_sq == A(0) ? A(0) : A(2) * row.log_sum_exp() * logsumexp_sq;
    const A log_p = (score_math::capped(x) - row.max) - row.log_sum;
    return p * lse_grad - p * (log_p + row.entropy) * entropy_sum;
  }
};

/// Scores divided by their sum are the softmax over the chosen logits, whose gradient needs no other logit: where it is
/// only the weights that have one, and no chosen score vanishes beside the row's largest.
template <class A>
__device__ bool vanishes(A chosen, A max) {
  constexpr A low = A(0.75) * score_math::Format<A>::exp_cutoff;
  return chosen > kLowest<A> && score_math::capped(chosen) - score_math::capped(max) < low;
}

template <class Team, bool elementwise>
struct TeamBackward {
  const GateBackwardCall& call;
  const GatingProblem& g;
  const Gradients<float> grads;
  const Team team;
  float* given;            ///< of the warp: what the slots give to their experts, [chunk][lane][4]; zeros between rows
  const float* score_sum;  ///< gradient of score_sum, zeros past E
  // Through the weights a gradient reaches the scores, or at once the logits: where scores are divided by their sum, or
  // the chosen elementwise scores are the only ones with a gradient.
  const bool to_scores;
  float x[Team::count], p[Team::count];
  RowSoftmax<float> row;
  int id[Team::run];  ///< of slot lane + L r; -1: none
  float logit[Team::run], c[Team::run], gc[Team::run];

  __device__ TeamBackward(const GateBackwardCall& call_, float* given_, const float* score_sum_)
      : call(call_),
        g(call_.problem),
        grads(call_.grads),
        given(given_),
        score_sum(score_sum_),
        to_scores(g.score != Score::softmax_topk && !g.renormalize && !(elementwise && !grads.score_sum)) {}

  __device__ void load_slots(int64_t t, bool live) {
#pragma unroll
    for (int r = 0; r < Team::run; ++r) {
      const int s = TeamSlots<Team>::slot(team, r);
      const int v = live && s < int(g.k) ? call.experts[t * g.k + s] : -1;
      const bool bad = live && s < int(g.k) && (v < 0 || v >= int(g.experts));
      if (bad) atomicOr(call.errors, unsigned(kBadGatingId));
      id[r] = bad ? -1 : v;
    }
  }
  __device__ void load_chosen(int64_t t) {
#pragma unroll
    for (int r = 0; r < Team::run; ++r) logit[r] = id[r] >= 0 ? load_logit(g, call.logits, t, id[r]) : kLowest<float>;
  }

  __device__ void chosen_scores(bool over_chosen) {
    float softmax[Team::run];
#pragma unroll
    for (int r = 0; r < Team::run; ++r) softmax[r] = logit[r];
    if (__any_sync(kAllLanes, over_chosen))
      slots_softmax<Team::lanes>(int(g.k), [&](int r) { return id[r] >= 0; }, softmax);
#pragma unroll
    for (int r = 0; r < Team::run; ++r) {
      c[r] = 0;
      if (Team::lanes * r >= int(g.k)) continue;
      const float v = score_math::capped(logit[r]);
      const float s =
          elementwise ? elementwise_score(g.score, v) : score_math::exp_nonpositive(v - row.max) * (1.0f / row.sum);
      c[r] = over_chosen ? softmax[r] : id[r] >= 0 && v == v ? s : 0.0f;
    }
  }

  // The gradient that reaches the chosen scores; with `renormalize` times the score, the gradient of its logarithm. The
  // scores' sum may be as small as a normal number can be: dividing a gradient by it would overflow.
  __device__ void weights_backward(int64_t t, bool over_chosen) {
#pragma unroll
    for (int r = 0; r < Team::run; ++r) {
      float grad = 0;
      if (id[r] >= 0 && grads.weights) grad = grads.weights[t * g.k + TeamSlots<Team>::slot(team, r)];
      if (id[r] >= 0 && grads.weight_sum) grad += grads.weight_sum[id[r]];
      gc[r] = grad * float(g.scale);
    }
    if (!g.renormalize && g.score != Score::softmax_topk) return;
    // Both ways in one, because the teams of a warp may differ in `over_chosen` and have to stay together.
    const float sum = sum_slots<Team::lanes>([&](int r) { return c[r]; });
    float share[Team::run] = {};
#pragma unroll
    for (int r = 0; r < Team::run; ++r)
      if (Team::lanes * r < int(g.k)) share[r] = over_chosen ? c[r] : sum > 0.0f ? c[r] / sum : 0.0f;
    const float dot = sum_slots<Team::lanes>([&](int r) { return share[r] > 0.0f ? gc[r] * share[r] : 0.0f; });
#pragma unroll
    for (int r = 0; r < Team::run; ++r) {
      if (Team::lanes * r >= int(g.k)) continue;
      gc[r] = share[r] > 0.0f ? (gc[r] - dot) * share[r] : 0.0f;
      if (!over_chosen && c[r] > 0.0f) gc[r] *= log_slope(g.score, logit[r], c[r]);
    }
  }

  // Leaves in `given` what comes by the weights, to the scores or to the logits.
  __device__ void chosen_backward(int64_t t, bool over_chosen) {
    load_chosen(t);
    chosen_scores(over_chosen);
    weights_backward(t, over_chosen);
#pragma unroll
    for (int r = 0; r < Team::run; ++r) {
      if (Team::lanes * r >= int(g.k)) break;
      float v = gc[r];
      if (elementwise && !to_scores && !g.renormalize) v = v != 0.0f ? v * elementwise_slope(g.score, logit[r]) : 0.0f;
      add_in_order(given, place(r), v, id[r] >= 0);
    }
  }
  __device__ int place(int r) const { return team.place(Team::owner(id[r]), Team::entry(id[r])); }

  /// Calls f(m, the gradient of score m, what the slots give to its logit) for all entries of the lane; four at a time,
  /// for 16 bytes per lane are free of bank conflicts where single floats of the same layout are not.
  template <class F>
  __device__ void each_grad(F f) const {
#pragma unroll
    for (int n = 0; n < Team::chunks; ++n) {
      const auto gave = *reinterpret_cast<const Packet<float, 4>*>(given + team.place(team.lane, 4 * n));
#pragma unroll
      for (int i = 0; i < 4; i += Team::run) {
        const auto sum = *reinterpret_cast<const Packet<float, Team::run>*>(score_sum + team.expert(4 * n + i));
#pragma unroll
        for (int c = 0; c < Team::run; ++c)
          f(4 * n + i + c, to_scores ? sum.v[c] + gave.v[i + c] : sum.v[c], to_scores ? 0.0f : gave.v[i + c]);
      }
    }
  }

  // Writes the gradient over the logits; `softmax`: p holds the probabilities (elementwise scores: row their sums).
  __device__ void scores_backward(bool softmax) {
    float dots[Team::run] = {};
    if (!elementwise && softmax)
      each_grad([&](int m, float grad, float) { dots[m % Team::run] += p[m] > 0.0f ? p[m] * grad : 0.0f; });
    const float dot = !elementwise && softmax ? fold_experts<Team::lanes>(dots) : 0.0f;
    const bool of_softmax = grads.of_softmax();
    each_grad([&](int m, float grad, float gx) {
      if (elementwise && grads.score_sum) gx += grad != 0.0f ? grad * elementwise_slope(g.score, x[m]) : 0.0f;
      if (!elementwise && softmax) gx += p[m] > 0.0f ? p[m] * (grad - dot) : 0.0f;
      if (of_softmax) {
        const float v = elementwise ? score_math::exp_nonpositive(x[m] - row.max) * (1.0f / row.sum) : p[m];
        gx += v > 0.0f ? grads.through_softmax(row, x[m], v) : 0.0f;
      }
      x[m] = gx;
    });
  }

  // Reads the logits into x; `masked` gets the bits of those without a gradient. Where no probability is needed but of
  // the chosen experts, none is computed: returns whether p holds any.
  __device__ bool read(int64_t t, bool live, unsigned& masked, unsigned& nan, bool& over_chosen) {
    const auto see = [&](const float (&logits)[Team::count]) {
      masked = 0;
#pragma unroll
      for (int m = 0; m < Team::count; ++m) masked |= unsigned(!(logits[m] > kLowest<float>)) << m;
    };
    over_chosen = g.score == Score::softmax_topk;
    if (elementwise ? !grads.of_softmax() : grads.of_weights_only() && (over_chosen || g.renormalize)) {
      load_row(g, call.logits, t, live, call.packed, team, x);
      see(x);
      nan = sanitize(x);
      if (elementwise || over_chosen) return false;
      float max = x[0];
#pragma unroll
      for (int m = 1; m < Team::count; ++m) max = fmaxf(max, x[m]);
      max = team_max<Team::lanes>(max);
      load_chosen(t);
      bool gone = false;
#pragma unroll
      for (int r = 0; r < Team::run; ++r) gone |= vanishes(logit[r], max);
      over_chosen = team.mine(__ballot_sync(kAllLanes, gone)) == 0;
      if (__all_sync(kAllLanes, over_chosen)) return false;
    }
    float e[Team::count];
    nan = read_softmax(g, call.logits, t, live, call.packed, team, see, x, e, row);
    // With elementwise scores few calls need any, and registers are short.
    if (elementwise) return true;
    const float factor = 1.0f / row.sum;
#pragma unroll
    for (int m = 0; m < Team::count; ++m) p[m] = e[m] * factor;
    return true;
  }

  __device__ void run(int64_t t) {
    const bool live = t < g.rows && (!call.mask || call.mask[t]);
    unsigned masked = 0, nan = 0;
    bool over_chosen;
    load_slots(t, live);
    const bool softmax = read(t, live, masked, nan, over_chosen);
    if (grads.of_choice()) chosen_backward(t, over_chosen);
    __syncwarp();
    scores_backward(softmax);
#pragma unroll
    for (int m = 0; m < Team::count; ++m) {
      // -inf is a mask: gradient 0. NaN stays visible.
      if (!live || (masked >> m & 1u)) x[m] = 0;
      if (nan >> m & 1u) x[m] = kNaN<float>;
    }
    if (t < g.rows) store_row(g, call.grad_logits, t, call.packed, team, x);
    __syncwarp();
#pragma unroll
    for (int r = 0; r < Team::run; ++r)
      if (id[r] >= 0) given[place(r)] = 0;
    __syncwarp();
  }
};

// ---- kernel -----------------------------------------------------------------------------------------------------

template <class Team, bool elementwise>
__global__ void __launch_bounds__(kGateThreads, gate_blocks_per_sm(Team::count))
    gate_backward_kernel(const __grid_constant__ GateBackwardCall call) {
  CU_DYN_SHARED(float, base);
  const int warps = int(blockDim.x) / kLanes, warp = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
  float *score_sum = base, *given = base + Team::span + warp * Team::count * kLanes;
  const float* from = static_cast<const float*>(call.grads.score_sum);
  for (int i = int(threadIdx.x); i < Team::span; i += int(blockDim.x))
    score_sum[i] = from && i < int(call.problem.experts) ? from[i] : 0.0f;
  for (int i = lane; i < Team::count * kLanes; i += kLanes) given[i] = 0;
  __syncthreads();
  TeamBackward<Team, elementwise> backward(call, given, score_sum);
  const int64_t step = int64_t(gridDim.x) * warps * Team::per_warp;
  for (int64_t t = (int64_t(blockIdx.x) * warps + warp) * Team::per_warp; t < call.problem.rows; t += step)
    backward.run(t + backward.team.index);
}

}  // namespace
}  // namespace moeyard::cuda
