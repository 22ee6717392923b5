// A row of logits in the registers of a team of lanes: what forward and backward share. Everything is float here; rows
// of float64, or of more than 1024 experts, take a whole block (gate_block.cuh).
#pragma once
#include <climits>
#include <cstdint>
#include <limits>

#include "common/device.cuh"
#include "common/device_errors.hpp"
#include "common/score_math.hpp"
#include "topk_gating/gate_table.cuh"
#include "topk_gating/topk_gating.hpp"

namespace moeyard::cuda {
namespace {

// Variables, because the functions of numeric_limits are the host's.
template <class A>
constexpr A kLowest = -std::numeric_limits<A>::infinity();
template <class A>
constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kLanes = 32;

/// Slots that a team holds, one per partial sum of row_sum.
constexpr int kTeamSlots = 32;

/// L lanes share a row of up to 32 B experts; a warp has 32 / L teams. Lane q holds `run` consecutive experts of every
/// block of 32: all that row_sum adds to its partial sums run q, run q + 1, ..., so a row's sum has the CPU's bits.
template <int L, int B>
struct Team {
  static constexpr int lanes = L, blocks = B, per_warp = kLanes / L, run = kLanes / L, count = run * B;
  static constexpr int chunks = count / 4, span = kLanes * B;
  int lane, index;  ///< of the lane in its team, of the team in its warp

  __device__ Team() : lane(int(threadIdx.x) % L), index(int(threadIdx.x) % kLanes / L) {}
  /// The expert of the lane's entry m; ascending in m.
  __device__ int expert(int m) const { return m / run * kLanes + lane * run + m % run; }
  /// Where entry m of lane `of` lies in an array of 4-entry chunks, [chunk][lane of the warp], of which a warp reads
  /// and writes 16 bytes per lane without bank conflicts.
  __device__ int place(int of, int m) const { return (m / 4 * kLanes + index * L + of) * 4 + m % 4; }
  __device__ static int owner(int expert) { return expert % kLanes / run; }
  __device__ static int entry(int expert) { return expert / kLanes * run + expert % run; }
  /// The team's bits of a ballot.
  __device__ unsigned mine(unsigned ballot) const { return ballot >> index * L & (kAllLanes >> (kLanes - L)); }
};

// ---- sums and maxima over a team --------------------------------------------------------------------------------

template <int L>
__device__ float team_max(float v) {
#pragma unroll
  for (int d = L / 2; d > 0; d /= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, d));
  return v;
}

template <int L>
__device__ unsigned team_max(unsigned v) {
#pragma unroll
  for (int d = L / 2; d > 0; d /= 2) v = max(v, __shfl_xor_sync(kAllLanes, v, d));
  return v;
}

template <int L>
__device__ int team_min(int v) {
#pragma unroll
  for (int d = L / 2; d > 0; d /= 2) v = min(v, __shfl_xor_sync(kAllLanes, v, d));
  return v;
}

/// The end of row_sum over experts: partial sum run q + c is partial[c] of lane q.
template <int L, int run = kLanes / L>
__device__ float fold_experts(float (&partial)[run]) {
#pragma unroll
  for (int d = L / 2; d > 0; d /= 2)
#pragma unroll
    for (int c = 0; c < run; ++c) partial[c] += __shfl_xor_sync(kAllLanes, partial[c], d);
#pragma unroll
  for (int half = run / 2; half > 0; half /= 2)
#pragma unroll
    for (int c = 0; c < half; ++c) partial[c] += partial[c + half];
  return partial[0];
}

/// The end of row_sum over slots: partial sum q + L r is term(r) of lane q.
template <int L, class Term>
__device__ float sum_slots(Term term) {
  constexpr int run = kLanes / L;
  float partial[run];
#pragma unroll
  for (int r = 0; r < run; ++r) partial[r] = 0.0f + term(r);
#pragma unroll
  for (int half = run / 2; half > 0; half /= 2)
#pragma unroll
    for (int r = 0; r < half; ++r) partial[r] += partial[r + half];
  float sum = partial[0];
#pragma unroll
  for (int d = L / 2; d > 0; d /= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
  return sum;
}

/// table[at] += value in the order of the lanes, also where several name one entry. The whole warp calls it.
__device__ void add_in_order(float* table, int at, float value, bool active) {
  const int lane = int(threadIdx.x) % kLanes;
  const unsigned same = __match_any_sync(kAllLanes, active ? at : -1 - lane);
  const int turn = __popc(same & ((1u << lane) - 1));
  for (int now = 0; __any_sync(kAllLanes, active && turn >= now); ++now) {
    if (active && turn == now) table[at] += value;
    __syncwarp();
  }
}

// ---- memory -----------------------------------------------------------------------------------------------------

/// N elements that are moved at once: 16 bytes where they are 4 floats.
template <class T, int N>
struct alignas(sizeof(T) * N) Packet {
  T v[N];
};

/// Calls f with a null pointer of the element type; all threads take the same way.
template <class F>
__device__ void with_element(DType dtype, F f) {
  if (dtype == DType::bf16)
    f(static_cast<const bf16*>(nullptr));
  else if (dtype == DType::f16)
    f(static_cast<const f16*>(nullptr));
  else
    f(static_cast<const float*>(nullptr));
}

/// Whether rows may be moved by packets: then a packet is all inside its row or all outside.
template <class Team>
bool packed_rows(const GatingProblem& g, const void* a, const void* b) {
  const int64_t bytes = Team::run * element_bytes(g.dtype);
  const auto addresses = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b);
  return g.experts % Team::run == 0 && addresses % uintptr_t(bytes) == 0;
}

/// Reads row t; `outside` stands past its end, and everywhere in a row that is not live.
template <class Team>
__device__ void load_row(const GatingProblem& g, const void* logits, int64_t t, bool live, bool packed,
                         const Team& team, float (&x)[Team::count]) {
  const int experts = live ? int(g.experts) : 0;
  const float outside = live ? kLowest<float> : 0.0f;
  with_element(g.dtype, [&](auto* type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    const T* row = static_cast<const T*>(logits) + t * g.experts;
#pragma unroll
    for (int b = 0; b < Team::blocks; ++b) {
      const int first = team.expert(b * Team::run);
      if (packed && first < experts) {
        const auto packet = *reinterpret_cast<const Packet<T, Team::run>*>(row + first);
#pragma unroll
        for (int c = 0; c < Team::run; ++c) x[b * Team::run + c] = widen(packet.v[c]);
      } else {
#pragma unroll
        for (int c = 0; c < Team::run; ++c)
          x[b * Team::run + c] = !packed && first + c < experts ? widen(row[first + c]) : outside;
      }
    }
  });
}

template <class Team>
__device__ void store_row(const GatingProblem& g, void* out, int64_t t, bool packed, const Team& team,
                          const float (&x)[Team::count]) {
  const int experts = int(g.experts);
  with_element(g.dtype, [&](auto* type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    T* row = static_cast<T*>(out) + t * g.experts;
#pragma unroll
    for (int b = 0; b < Team::blocks; ++b) {
      const int first = team.expert(b * Team::run);
      if (packed && first < experts) {
        Packet<T, Team::run> packet;
#pragma unroll
        for (int c = 0; c < Team::run; ++c) packet.v[c] = narrow<T>(x[b * Team::run + c]);
        *reinterpret_cast<Packet<T, Team::run>*>(row + first) = packet;
      } else {
#pragma unroll
        for (int c = 0; c < Team::run; ++c)
          if (!packed && first + c < experts) row[first + c] = narrow<T>(x[b * Team::run + c]);
      }
    }
  });
}

/// Logit `expert` of row t, which a team has read before.
__device__ inline float load_logit(const GatingProblem& g, const void* logits, int64_t t, int expert) {
  float x = 0;
  with_element(g.dtype, [&](auto* type) { x = widen(static_cast<decltype(type)>(logits)[t * g.experts + expert]); });
  return x;
}

// ---- scores -----------------------------------------------------------------------------------------------------

__host__ __device__ inline bool is_elementwise(Score kind) {
  return kind == Score::sigmoid || kind == Score::sqrtsoftplus;
}

/// Whether the choice is made on the logits themselves.
__host__ __device__ inline bool selects_raw(const GatingProblem& g, const void* bias) {
  return g.score == Score::softmax_topk || (!bias && g.num_groups == 0);
}

template <class A>
__device__ A elementwise_score(Score kind, A x) {
  x = score_math::capped(x);
  return kind == Score::sigmoid ? score_math::sigmoid(x) : score_math::sqrtsoftplus(x);
}

template <class A>
__device__ A elementwise_slope(Score kind, A x) {
  x = score_math::capped(x);
  return kind == Score::sigmoid ? score_math::sigmoid_slope(x) : score_math::sqrtsoftplus_slope(x);
}

/// d log c / dx of a chosen score c > 0; for the softmax without -p, whose sum over the slots of a row is 0.
template <class A>
__device__ A log_slope(Score kind, A x, A c) {
  if (kind == Score::softmax) return A(1);
  return kind == Score::sigmoid ? score_math::sigmoid(-x) : elementwise_slope(kind, x) / c;
}

/// The softmax of a row over its logits above -inf, as on the CPU: NaN logits are left out, +inf is capped, and a row
/// with no logit above -inf has the initial values.
template <class A>
struct RowSoftmax {
  A max = 0, sum = 1, log_sum = 0, entropy = 0;

  __device__ A log_sum_exp() const { return max + log_sum; }
  __device__ void finish(A dot) {
    log_sum = score_math::log_positive(sum);
    entropy = log_sum - dot / sum;
  }
};

/// Takes NaN, +inf and a row without candidates out of x, so that no loop over experts has to look for them; returns
/// the bits of the lane's NaN entries.
template <int N>
__device__ unsigned sanitize(float (&x)[N]) {
  unsigned nan = 0;
#pragma unroll
  for (int m = 0; m < N; ++m) {
    if (x[m] != x[m]) nan |= 1u << m, x[m] = kLowest<float>;
    x[m] = score_math::capped(x[m]);
  }
  return nan;
}

/// Reads a row and leaves its exponentials, not yet divided by their sum, in e, which may be x. `raw(x)` sees the
/// logits as they are. Returns the bits of the NaN entries: those are -inf in x, and +inf is capped.
template <class Team, class Raw>
__device__ unsigned read_softmax(const GatingProblem& g, const void* logits, int64_t t, bool live, bool packed,
                                 const Team& team, Raw raw, float (&x)[Team::count], float (&e)[Team::count],
                                 RowSoftmax<float>& row) {
  unsigned nan = 0;
  float dot = 0;
  // NaN, +inf and a row of -inf alone show in the sum: only then all is done again with care.
#pragma unroll 1
  for (bool careful = false;; careful = true) {
    load_row(g, logits, t, live, packed, team, x);
    if (careful)
      nan = sanitize(x);
    else
      raw(x);
    float max = x[0];
#pragma unroll
    for (int m = 1; m < Team::count; ++m) max = fmaxf(max, x[m]);
    row.max = team_max<Team::lanes>(max);
    const bool none = careful && !(row.max > kLowest<float>);
    if (none) row.max = 0;
    float sums[Team::run] = {}, dots[Team::run] = {};
#pragma unroll
    for (int m = 0; m < Team::count; ++m) {
      const float below = x[m] - row.max, exp = score_math::exp_nonpositive(below);
      sums[m % Team::run] += exp;
      // Where exp is 0 this adds -0, which changes no sum that began at +0.
      dots[m % Team::run] += exp * score_math::above_cutoff(below);
      e[m] = exp;
    }
    row.sum = fold_experts<Team::lanes>(sums);
    dot = fold_experts<Team::lanes>(dots);
    if (none) row.sum = 1;
    if (careful || !__any_sync(kAllLanes, row.sum != row.sum)) break;
  }
  row.finish(dot);
  return nan;
}

/// The softmax over a team's k slots, of which the lane has s = lane + L r for r < run where has(r): x to
/// probabilities. With few slots most r are nobody's, and their exponentials are not computed.
template <int L, class Has>
__device__ void slots_softmax(int k, Has has, float (&x)[kLanes / L]) {
  constexpr int run = kLanes / L;
  float max = kLowest<float>;
#pragma unroll
  for (int r = 0; r < run; ++r)
    if (has(r)) max = fmaxf(max, x[r]);
  max = team_max<L>(max);
  const bool none = !(max > kLowest<float>);
  max = none ? 0.0f : score_math::capped(max);
#pragma unroll
  for (int r = 0; r < run; ++r) {
    const float v = has(r) && x[r] == x[r] ? x[r] : kLowest<float>;
    x[r] = L * r < k ? score_math::exp_nonpositive(score_math::capped(v) - max) : 0.0f;
  }
  const float sum = sum_slots<L>([&](int r) { return x[r]; });
#pragma unroll
  for (int r = 0; r < run; ++r)
    if (L * r < k) x[r] = none ? 0.0f : x[r] / sum;
}

}  // namespace
}  // namespace moeyard::cuda
