// The forward pass with a team of lanes per row.
#pragma once
#include "topk_gating/gate_select.cuh"
#include "topk_gating/gate_sums.cuh"

namespace moeyard::cuda {
namespace {

struct GateCall {
  GatingProblem problem;
  GatingInputs in;
  GatingOutputs out;
  void* workspace;
  unsigned* errors;
  double unit_weight;  ///< scale / k, for unit_weights
  bool packed;
};

/// Dynamic shared memory of a block: of each warp its keys and its weights per expert, then the bias and the counts.
template <class Team>
struct GateShared {
  float *keys, *weights, *bias;  ///< keys and weights of the calling warp
  int* counts;

  static int64_t bytes(int warps) { return (warps * (Team::count * kLanes + Team::span) + 2 * Team::span) * 4; }
  __device__ explicit GateShared(float* base) {
    const int warps = int(blockDim.x) / kLanes, warp = int(threadIdx.x) / kLanes;
    keys = base + warp * Team::count * kLanes;
    weights = base + warps * Team::count * kLanes + warp * Team::span;
    bias = base + warps * (Team::count * kLanes + Team::span);
    counts = reinterpret_cast<int*>(bias + Team::span);
  }
};

/// One row per team. The scores' sums stay in registers, the weights' in shared memory.
template <class Team, bool elementwise>
struct TeamGate {
  const GateCall& call;
  const GatingProblem& g;
  const Team team;
  const GateShared<Team> shared;
  const bool raw;
  float score_sum[Team::count] = {}, lse_sq = 0, entropy = 0;

  __device__ TeamGate(const GateCall& call_, float* base)
      : call(call_), g(call_.problem), shared(base), raw(selects_raw(call_.problem, call_.in.bias)) {}

  // Selection values from the logits or scores in v; what is no candidate becomes -inf.
  __device__ void find_keys(const float (&v)[Team::count], unsigned candidates, float (&key)[Team::count]) const {
    constexpr unsigned all = kAllLanes >> (32 - Team::count);
#pragma unroll
    for (int m = 0; m < Team::count; ++m) key[m] = v[m];
    if (call.in.bias)
#pragma unroll
      for (int m = 0; m < Team::count; m += Team::run) {
        const auto bias = *reinterpret_cast<const Packet<float, Team::run>*>(shared.bias + team.expert(m));
#pragma unroll
        for (int c = 0; c < Team::run; ++c) key[m + c] += bias.v[c];
      }
#pragma unroll
    for (int m = 0; m < Team::count; ++m) key[m] = fmaxf(key[m], kLowest<float>);
    if (__any_sync(kAllLanes, (candidates & all) != all))
#pragma unroll
      for (int m = 0; m < Team::count; ++m) key[m] = candidates >> m & 1u ? key[m] : kLowest<float>;
  }

  // Fills the slots, by the short keys if they can tell. The keys are found again where not, so that no register has to
  // hold them meanwhile.
  __device__ void choose(TeamSlots<Team>& slots, const float (&v)[Team::count], unsigned candidates, bool live) {
#pragma unroll 1
    for (bool is_short = g.forced_slots == 0;; is_short = false) {
      float key[Team::count];
      find_keys(v, candidates, key);
      const KeptEntries<Team> kept(g, g.num_groups > 0 ? kept_groups(g, team, key) : 0);
      if (is_short) {
        const ShortKeys<Team> keys(team, key, g.num_groups == 0, kept);
        // The lower bits of a 16-bit logit are zero, as long as nothing is added.
        const bool all_tell = raw && !call.in.bias && g.dtype != DType::f32;
        if (keys.choose(int(g.k), all_tell, live, team, reinterpret_cast<int*>(shared.keys), slots.id)) return;
        __syncwarp();
      } else {
        TeamKeys<Team> keys;
        keys.key = shared.keys;
        keys.fill(team, key, kept);
        return slots.choose(g, team, keys);
      }
    }
  }

  // The scores that decide, with their statistics; x holds what read_softmax left: logits or exponentials.
  __device__ void see_scores(TeamSlots<Team>& slots, float (&x)[Team::count], unsigned candidates, unsigned nan,
                             const RowSoftmax<float>& row, bool live) {
    if constexpr (elementwise) {
      if (g.score == Score::sigmoid)
#pragma unroll
        for (int m = 0; m < Team::count; ++m) x[m] = score_math::sigmoid(x[m]);
      else
#pragma unroll
        for (int m = 0; m < Team::count; ++m) x[m] = score_math::sqrtsoftplus(x[m]);
    }
    const float factor = !live ? 0.0f : elementwise ? 1.0f : 1.0f / row.sum;
#pragma unroll
    for (int m = 0; m < Team::count; ++m) score_sum[m] += x[m] * factor;
    if (nan != 0 && live)
#pragma unroll
      for (int m = 0; m < Team::count; ++m)
        if (nan >> m & 1u) score_sum[m] = kNaN<float>;
    if (raw) return;
    if constexpr (!elementwise)
#pragma unroll
      for (int m = 0; m < Team::count; ++m) x[m] = x[m] / row.sum;
    choose(slots, x, candidates, live);
  }

  __device__ void weigh(const TeamSlots<Team>& slots, int64_t t, bool live, const RowSoftmax<float>& row,
                        float (&w)[Team::run]) {
    const auto has = [&](int r) { return live && slots.slot(team, r) < int(g.k); };
    if (g.unit_weights) {
#pragma unroll
      for (int r = 0; r < Team::run; ++r) w[r] = has(r) ? float(call.unit_weight) : 0.0f;
      return;
    }
#pragma unroll
    for (int r = 0; r < Team::run; ++r) w[r] = has(r) ? load_logit(g, call.in.logits, t, slots.id[r]) : kLowest<float>;
    if (g.score == Score::softmax_topk)
      slots_softmax<Team::lanes>(int(g.k), has, w);
    else
#pragma unroll
      for (int r = 0; r < Team::run; ++r) {
        if (Team::lanes * r >= int(g.k)) {
          w[r] = 0;
          continue;
        }
        const float x = score_math::capped(w[r]);
        const float s =
            elementwise ? elementwise_score(g.score, x) : score_math::exp_nonpositive(x - row.max) / row.sum;
        w[r] = has(r) && x == x ? s : 0.0f;
      }
    if (g.renormalize && g.score != Score::softmax_topk) {
      const float sum = sum_slots<Team::lanes>([&](int r) { return w[r]; });
#pragma unroll
      for (int r = 0; r < Team::run; ++r)
        if (Team::lanes * r < int(g.k)) w[r] = sum > 0.0f ? w[r] / sum : 0.0f;
    }
#pragma unroll
    for (int r = 0; r < Team::run; ++r) w[r] *= float(g.scale);
  }

  __device__ void write(const TeamSlots<Team>& slots, const float (&w)[Team::run], int64_t t, bool live) {
#pragma unroll
    for (int r = 0; r < Team::run; ++r) {
      const int s = slots.slot(team, r);
      const bool has = t < g.rows && s < int(g.k);
      if (Team::lanes * r >= int(g.k)) break;
      if (has) {
        static_cast<float*>(call.out.weights)[t * g.k + s] = live ? w[r] : 0.0f;
        call.out.experts[t * g.k + s] = live ? slots.id[r] : -1;
      }
      if (has && live) atomicAdd(shared.counts + slots.id[r], 1);
      add_in_order(shared.weights, slots.id[r], w[r], has && live);
    }
  }

  // Row t, which may be past the end: the lanes of a warp stay together.
  __device__ void run(int64_t t) {
    const bool live = t < g.rows && (!call.in.mask || call.in.mask[t]);
    float x[Team::count];
    TeamSlots<Team> slots;
#pragma unroll
    for (int r = 0; r < Team::run; ++r) slots.id[r] = -1;
    if (g.forced_slots > 0) slots.load_forced(g, call.in.forced, t, live, team, call.errors);
    unsigned candidates = kAllLanes;
    const auto see_raw = [&](const float (&logits)[Team::count]) {
      if (raw) return choose(slots, logits, candidates, live);
      candidates = 0;
#pragma unroll
      for (int m = 0; m < Team::count; ++m) candidates |= unsigned(logits[m] > kLowest<float>) << m;
    };
    RowSoftmax<float> row;
    unsigned nan;
    if constexpr (elementwise) {
      float e[Team::count];
      nan = read_softmax(g, call.in.logits, t, live, call.packed, team, see_raw, x, e, row);
    } else {
      nan = read_softmax(g, call.in.logits, t, live, call.packed, team, see_raw, x, x, row);
    }
    see_scores(slots, x, candidates, nan, row, live);
    float w[Team::run];
    weigh(slots, t, live, row, w);
    write(slots, w, t, live);
    const bool any_nan = team.mine(__ballot_sync(kAllLanes, nan != 0)) != 0;
    const float lse = row.log_sum_exp();
    if (live) lse_sq += any_nan ? kNaN<float> : lse * lse, entropy += row.entropy;
  }

  // Adds up the teams of the warp, then the warps, and writes the block's sums. The keys' memory is free by now.
  __device__ void finish() {
    const int warps = int(blockDim.x) / kLanes, warp = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
    CU_SHARED(float, scalars, [2][kLanes]);
#pragma unroll
    for (int d = Team::lanes; d < kLanes; d *= 2) {
#pragma unroll
      for (int m = 0; m < Team::count; ++m) score_sum[m] += __shfl_xor_sync(kAllLanes, score_sum[m], d);
      lse_sq += __shfl_xor_sync(kAllLanes, lse_sq, d);
      entropy += __shfl_xor_sync(kAllLanes, entropy, d);
    }
    __syncwarp();
    if (team.index == 0)
#pragma unroll
      for (int m = 0; m < Team::count; ++m) shared.keys[team.expert(m)] = score_sum[m];
    if (lane == 0) scalars[0][warp] = lse_sq, scalars[1][warp] = entropy;
    __syncthreads();
    const BlockSums<float> sums(call.workspace, int(gridDim.x), g.experts);
    const int block = int(blockIdx.x), step = Team::count * kLanes;
    const float *first_score = shared.keys - warp * step, *first_weight = shared.weights - warp * Team::span;
    for (int i = int(threadIdx.x); i < int(g.experts); i += int(blockDim.x)) {
      float score = 0, weight = 0;
      for (int w = 0; w < warps; ++w) score += first_score[w * step + i], weight += first_weight[w * Team::span + i];
      sums.score(block)[i] = score;
      sums.weight(block)[i] = weight;
      sums.count(block)[i] = shared.counts[i];
    }
    if (threadIdx.x < 2) {
      float scalar = 0;
      for (int w = 0; w < warps; ++w) scalar += scalars[threadIdx.x][w];
      sums.scalar(block)[threadIdx.x] = scalar;
    }
  }
};

// ---- kernel -----------------------------------------------------------------------------------------------------

template <class Team, bool elementwise>
__global__ void __launch_bounds__(kGateThreads, gate_blocks_per_sm(Team::count))
    gate_kernel(const __grid_constant__ GateCall call) {
  CU_DYN_SHARED(float, base);
  const int warp = int(threadIdx.x) / kLanes, warps = int(blockDim.x) / kLanes;
  TeamGate<Team, elementwise> gate(call, base);
  const int experts = int(call.problem.experts);
  for (int i = int(threadIdx.x) % kLanes; i < Team::span; i += kLanes) gate.shared.weights[i] = 0;
  for (int i = int(threadIdx.x); i < Team::span; i += int(blockDim.x)) {
    gate.shared.counts[i] = 0;
    const float bias = call.in.bias && i < experts ? static_cast<const float*>(call.in.bias)[i] : 0.0f;
    if (bias != bias) atomicOr(call.errors, unsigned(kNanBias));
    gate.shared.bias[i] = bias == bias ? bias : kLowest<float>;
  }
  __syncthreads();
  const int64_t step = int64_t(gridDim.x) * warps * Team::per_warp;
  for (int64_t t = (int64_t(blockIdx.x) * warps + warp) * Team::per_warp; t < call.problem.rows; t += step)
    gate.run(t + gate.team.index);
  gate.finish();
}

}  // namespace
}  // namespace moeyard::cuda
