// The forward pass with a block per row.
#pragma once
#include "topk_gating/gate_block.cuh"
#include "topk_gating/gate_forward.cuh"

namespace moeyard::cuda {
namespace {

constexpr int kMaxExperts = 8192;

template <class A>
struct BlockGate {
  using Bits = typename KeyBits<A>::type;
  const GateCall& call;
  const GatingProblem& g;
  const BlockSums<A> sums;
  const int experts, k, padded;  ///< padded: to a power of two
  const bool elementwise, raw;
  A *x, *e;        ///< logits; exponentials, later the chosen scores
  Bits* key;       ///< in e's place
  int32_t* id;     ///< [padded]
  unsigned* kept;  ///< a bit per group
  RowSoftmax<A> row;

  static int64_t bytes(int64_t experts, int64_t padded) {
    return (experts + padded) * int64_t(sizeof(A)) + padded * int64_t(sizeof(int32_t)) + kMaxExperts / 8;
  }
  __device__ BlockGate(const GateCall& call_, int padded_, void* shared)
      : call(call_),
        g(call_.problem),
        sums(call_.workspace, int(gridDim.x), call_.problem.experts),
        experts(int(call_.problem.experts)),
        k(int(call_.problem.k)),
        padded(padded_),
        elementwise(is_elementwise(call_.problem.score)),
        raw(selects_raw(call_.problem, call_.in.bias)),
        x(static_cast<A*>(shared)),
        e(x + experts),
        key(reinterpret_cast<Bits*>(e)),
        id(reinterpret_cast<int32_t*>(e + padded)),
        kept(reinterpret_cast<unsigned*>(id + padded)) {}

  // f(i) for i < n, shared out over the threads.
  template <class F>
  __device__ static void each(int n, F f) {
    for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) f(i);
  }

  __device__ A score(int i) const {
    return elementwise ? elementwise_score(g.score, x[i])
                       : score_math::exp_nonpositive(score_math::capped(x[i]) - row.max) / row.sum;
  }
  __device__ A selection_key(int i) const {
    if (!(x[i] > kLowest<A>)) return kLowest<A>;
    A value = raw ? x[i] : score(i);
    if (call.in.bias) value += static_cast<const A*>(call.in.bias)[i];
    return value > kLowest<A> ? value : kLowest<A>;
  }

  __device__ void see_scores() {
    const A factor = A(1) / row.sum;
    A* to = sums.score(int(blockIdx.x));
    each(experts, [&](int i) { to[i] += x[i] != x[i] ? x[i] : elementwise ? score(i) : e[i] * factor; });
  }

  // Leaves a bit in `kept` for each of the best groups.
  __device__ void limit_to_groups() {
    const int groups = int(g.num_groups), size = experts / groups, best_of = int(g.group_score_experts);
    each(padded, [&](int i) {
      key[i] = i < experts ? ordered(selection_key(i)) : 0;
      id[i] = (i / size) << 13 | i;
    });
    sort_descending(key, id, padded);
    each(groups, [&](int n) {
      A sum = 0;
      for (int j = 0; j < best_of; ++j) {
        const A v = selection_key(id[n * size + j] & (kMaxExperts - 1));
        if (!(v > kLowest<A>)) break;
        sum += v;
      }
      const bool empty = key[n * size] == ordered(kLowest<A>);
      // A group without a candidate ranks below every other, even below one whose sum overflows.
      constexpr A least = -score_math::Format<A>::largest;
      key[n * size] = ordered(empty ? kLowest<A> : sum > least ? sum : least);
    });
    __syncthreads();
    each(padded, [&](int i) {
      if (i % size != 0 || i >= experts) key[i] = 0;
      id[i] = i;
    });
    each(kMaxExperts / 32, [&](int i) { kept[i] = 0; });
    sort_descending(key, id, padded);
    each(int(g.topk_groups), [&](int s) {
      const int n = id[s] / size;
      atomicOr(kept + n / 32, 1u << n % 32);
    });
    __syncthreads();
  }

  // Writes the forced ids, or -1, to `chosen` and leaves the first slot that claims an expert, or INT_MAX, in id.
  __device__ void claim_forced(int64_t t, int32_t* chosen) {
    const int slots = int(g.forced_slots);
    const int64_t* forced = call.in.forced + t * slots;
    __syncthreads();
    each(experts, [&](int i) { id[i] = INT_MAX; });
    __syncthreads();
    each(slots, [&](int s) {
      if (forced[s] >= 0 && forced[s] < g.experts) atomicMin(id + forced[s], s);
    });
    __syncthreads();
    each(k, [&](int s) {
      const int64_t v = s < slots ? forced[s] : -1;
      const bool inside = v >= 0 && v < g.experts, first = inside && id[v] == s;
      if (v != -1 && !inside) atomicOr(call.errors, unsigned(kBadForcedId));
      if (inside && !first) atomicOr(call.errors, unsigned(kRepeatedForcedId));
      chosen[s] = first ? int32_t(v) : -1;
    });
    __syncthreads();
  }

  // The free slots take the sorted experts in order.
  __device__ void fill_free(int32_t* chosen) {
    if (g.forced_slots == 0) {
      each(k, [&](int s) { chosen[s] = id[s]; });
    } else if (threadIdx.x < kLanes) {
      const int lane = int(threadIdx.x);
      int next = 0;
      for (int first = 0; first < k; first += kLanes) {
        const int s = first + lane;
        const bool free = s < k && chosen[s] < 0;
        const unsigned all = __ballot_sync(kAllLanes, free);
        if (free) chosen[s] = id[next + __popc(all & ((1u << lane) - 1))];
        next += __popc(all);
      }
    }
    __syncthreads();
  }

  __device__ void choose(int64_t t, int32_t* chosen) {
    if (g.num_groups > 0) limit_to_groups();
    const bool forced = g.forced_slots > 0;
    if (forced) claim_forced(t, chosen);
    __syncthreads();
    const int size = g.num_groups > 0 ? experts / int(g.num_groups) : experts;
    each(padded, [&](int i) {
      bool out = i >= experts || (forced && id[i] != INT_MAX);
      if (!out && g.num_groups > 0) out = !(kept[i / size / 32] >> i / size % 32 & 1u);
      key[i] = out ? 0 : ordered(selection_key(i));
      id[i] = i;
    });
    sort_descending(key, id, padded);
    fill_free(chosen);
  }

  __device__ void weigh(const int32_t* chosen) {
    if (g.unit_weights) return each(k, [&](int s) { e[s] = A(call.unit_weight); });
    if (g.score == Score::softmax_topk) {
      bool nan;
      const RowSoftmax<A> over = block_softmax<A>(k, [&](int s) { return x[chosen[s]]; }, e, nan);
      each(k, [&](int s) { e[s] = e[s] / over.sum * A(g.scale); });
      return;
    }
    each(k, [&](int s) {
      const A v = score(chosen[s]);
      e[s] = v == v ? v : A(0);
    });
    if (g.renormalize) {
      const A sum = block_sum<A>(k, [&](int s) { return e[s]; });
      each(k, [&](int s) { e[s] = sum > A(0) ? e[s] / sum : A(0); });
    }
    each(k, [&](int s) { e[s] *= A(g.scale); });
  }

  __device__ void run(int64_t t) {
    A* weights = static_cast<A*>(call.out.weights) + t * k;
    int32_t* chosen = call.out.experts + t * k;
    if (call.in.mask && !call.in.mask[t]) return each(k, [&](int s) { weights[s] = 0, chosen[s] = -1; });
    const RowReader<A> logit(g, call.in.logits, t);
    __syncthreads();
    each(experts, [&](int i) { x[i] = logit(i); });
    bool nan;
    row = block_softmax<A>(experts, [&](int i) { return x[i]; }, e, nan);
    see_scores();
    __syncthreads();
    choose(t, chosen);
    weigh(chosen);
    const int block = int(blockIdx.x);
    each(k, [&](int s) {
      weights[s] = e[s];
      sums.weight(block)[chosen[s]] += e[s];
      ++sums.count(block)[chosen[s]];
    });
    if (threadIdx.x == 0) {
      const A lse = row.log_sum_exp();
      sums.scalar(block)[0] += nan ? kNaN<A> : lse * lse;
      sums.scalar(block)[1] += row.entropy;
    }
  }
};

// ---- kernel -----------------------------------------------------------------------------------------------------

/// `bias` may hold NaN, which counts as -inf: it is left out by every comparison.
template <class A>
__global__ void __launch_bounds__(kBlockRowThreads)
    gate_block_kernel(const __grid_constant__ GateCall call, int padded) {
  CU_DYN_SHARED(double, shared);
  BlockGate<A> gate(call, padded, shared);
  const int block = int(blockIdx.x);
  gate.each(gate.experts, [&](int i) {
    gate.sums.score(block)[i] = 0;
    gate.sums.weight(block)[i] = 0;
    gate.sums.count(block)[i] = 0;
    if (!call.in.bias) return;
    const A bias = static_cast<const A*>(call.in.bias)[i];
    if (bias != bias) atomicOr(call.errors, unsigned(kNanBias));
  });
  if (threadIdx.x < 2) gate.sums.scalar(block)[threadIdx.x] = 0;
  for (int64_t t = block; t < call.problem.rows; t += gridDim.x) gate.run(t);
}

}  // namespace
}  // namespace moeyard::cuda
