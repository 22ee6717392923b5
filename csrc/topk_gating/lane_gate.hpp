// The forward pass over a block of W rows, one per lane.
#pragma once
#include <algorithm>
#include <limits>

#include "topk_gating/lane_rows.hpp"
#include "topk_gating/lane_select.hpp"
#include "topk_gating/row_sums.hpp"
#include "topk_gating/topk_gating.hpp"

namespace moeyard::cpu {
namespace {

/// Whether blocks can take this call: no forced slots, and lists that fit the insertion networks.
inline bool fits_lanes(const GatingProblem& g) {
  return g.experts <= kLaneExperts && g.k <= kNetworkSlots && g.forced_slots == 0 && !g.unit_weights &&
         (g.num_groups == 0 || (g.topk_groups <= kNetworkSlots && g.group_score_experts <= kNetworkSlots));
}

template <class A, class T, int W>
class LaneGate {
  using V = Lanes<A, W>;
  using M = mask_t<V>;
  using I = int_lanes<V>;
  using Word = typename score_math::Format<A>::Word;
  static constexpr A lowest = -std::numeric_limits<A>::infinity();

 public:
  LaneGate(const GatingProblem& g, const GatingInputs& in, const GatingOutputs& out, Carver& carve)
      : g_(g), in_(in), out_(out), raw_(selects_raw(g, in.bias)) {
    x_ = carve.take<A>(g.experts * W), e_ = carve.take<A>(g.experts * W), group_key_ = carve.take<A>(g.num_groups * W);
    chosen_ = carve.take<A>(kNetworkSlots * W), weight_ = carve.take<A>(kNetworkSlots * W);
    id_ = carve.take<Word>(kNetworkSlots * W);
  }
  static int64_t count(const GatingProblem& g) { return (2 * g.experts + g.num_groups + 3 * kNetworkSlots) * W; }

  /// Rows [t, t + rows) of all, rows <= W, the first of which adds to lane `lane` of the sums. False, with nothing
  /// written, where a row has a NaN or fewer candidates than slots: such blocks are left to the path of single rows.
  MOEYARD_INLINE bool run(int64_t t, int64_t rows, int64_t lane, LaneSums<A, W>& sums, int32_t* counts) {
    const T* logits = static_cast<const T*>(in_.logits) + t * g_.experts;
    V max = broadcast<V>(lowest);
    load_block<V>(logits, g_.experts, rows, x_, [&](V v) MOEYARD_INLINE_LAMBDA { max = higher(v, max); });
    const BlockSoftmax<V> softmax = block_softmax<V>(x_, g_.experts, max, e_);
    scores_and_keys(softmax);
    M filled = ~M{};
    if (g_.num_groups > 0) filled = limit_to_groups();
    filled &= select_in_lanes<V>(x_, g_.experts, g_.k, id_);
    const M live = live_lanes<V>(in_.mask, t, rows);
    if (any_lane(((softmax.sum != softmax.sum) | ~filled) & live)) return false;
    chosen_weights(logits, softmax, live, rows);
    add_sums(softmax, live, lane, sums);
    if (sums.few)
      add_few_choices(lane, sums);
    else
      add_choices(rows, lane, sums, counts);
    store_rows(weight_, rows, static_cast<A*>(out_.weights) + t * g_.k);
    store_rows(id_, rows, out_.experts + t * g_.k);
    return true;
  }

 private:
  // Leaves the elementwise scores in e (softmax: the exponentials as they are) and the selection keys in x.
  MOEYARD_INLINE void scores_and_keys(const BlockSoftmax<V>& softmax) {
    const A* bias = static_cast<const A*>(in_.bias);
    const bool elementwise = is_elementwise(g_.score);
    if (elementwise)
      for (int64_t i = 0; i < g_.experts; ++i)
        store_lanes<V>(e_ + i * W, elementwise_score(g_.score, load_lanes<V>(x_ + i * W)));
    if (raw_ && !bias) return;
    const V low = broadcast<V>(lowest);
    for (int64_t i = 0; i < g_.experts; ++i) {
      const V x = load_lanes<V>(x_ + i * W), e = load_lanes<V>(e_ + i * W);
      const V value = (raw_ ? x : elementwise ? e : e / softmax.sum) + (bias ? bias[i] : A(0));
      store_lanes<V>(x_ + i * W, x > low && value > low ? value : low);
    }
  }

  // As select.hpp's; keys outside the groups that stay become -inf: the groups that stay have to fill all slots.
  MOEYARD_INLINE M limit_to_groups() {
    const int64_t size = g_.experts / g_.num_groups;
    const V low = broadcast<V>(lowest), least = broadcast<V>(std::numeric_limits<A>::lowest());
    with_slots(g_.group_score_experts, [&](auto slots) MOEYARD_INLINE_LAMBDA {
      for (int64_t n = 0; n < g_.num_groups; ++n) {
        const auto best = best_keys<decltype(slots)::value, V>(x_ + n * size * W, size);
        V sum{};
        for (int64_t s = 0; s < g_.group_score_experts; ++s) sum = best.slot[s] > low ? sum + best.slot[s] : sum;
        store_lanes<V>(group_key_ + n * W, best.slot[0] > low ? higher(sum, least) : low);
      }
    });
    const M filled = select_in_lanes<V>(group_key_, g_.num_groups, g_.topk_groups, id_);
    for (int64_t n = 0; n < g_.num_groups; ++n) {
      M kept{};
      for (int64_t s = 0; s < g_.topk_groups; ++s) kept |= load_lanes<I>(id_ + s * W) == Word(n);
      for (int64_t i = n * size; i < (n + 1) * size; ++i)
        store_lanes<V>(x_ + i * W, kept ? load_lanes<V>(x_ + i * W) : low);
    }
    return filled;
  }

  MOEYARD_INLINE void chosen_softmax(const T* logits, int64_t rows) {
    if (in_.bias)
      for (int64_t s = 0; s < g_.k * W; ++s)
        chosen_[s] = to_float(logits[std::min(s % W, rows - 1) * g_.experts + int64_t(id_[s])]);
    else
      gather_block<V>(x_, g_.experts, id_, g_.k, chosen_);
    const BlockSoftmax<V> softmax = block_softmax<V>(chosen_, g_.k, block_max<V>(chosen_, g_.k).max, weight_);
    for (int64_t s = 0; s < g_.k; ++s) store_lanes<V>(weight_ + s * W, load_lanes<V>(weight_ + s * W) / softmax.sum);
  }

  // Also takes masked rows out: weight 0, id -1.
  MOEYARD_INLINE void chosen_weights(const T* logits, const BlockSoftmax<V>& softmax, M live, int64_t rows) {
    if (g_.score == Score::softmax_topk) {
      chosen_softmax(logits, rows);
    } else {
      gather_block<V>(e_, g_.experts, id_, g_.k, weight_);
      if (g_.score == Score::softmax)
        for (int64_t s = 0; s < g_.k; ++s)
          store_lanes<V>(weight_ + s * W, load_lanes<V>(weight_ + s * W) / softmax.sum);
      if (g_.renormalize) {
        const V sum =
            lane_sum<V>(g_.k, [&](int64_t s) MOEYARD_INLINE_LAMBDA { return load_lanes<V>(weight_ + s * W); });
        for (int64_t s = 0; s < g_.k; ++s) {
          const V v = load_lanes<V>(weight_ + s * W);
          store_lanes<V>(weight_ + s * W, sum > V{} ? v / sum : V{});
        }
      }
    }
    for (int64_t s = 0; s < g_.k; ++s) {
      store_lanes<V>(weight_ + s * W, keep_lanes(live, load_lanes<V>(weight_ + s * W) * A(g_.scale)));
      store_lanes<I>(id_ + s * W, load_lanes<I>(id_ + s * W) | ~live);
    }
  }

  // Masked rows add 0.
  MOEYARD_INLINE void add_sums(const BlockSoftmax<V>& softmax, M live, int64_t lane, LaneSums<A, W>& sums) {
    const int64_t n = g_.experts;
    const auto add = [&](A* to, V v)
                         MOEYARD_INLINE_LAMBDA { store_lanes<V>(to, load_lanes<V>(to) + keep_lanes(live, v)); };
    const V one = score_math::constant<V>(1), factor = is_elementwise(g_.score) ? one : one / softmax.sum;
    A* const score = sums.score + lane;
    for (int64_t i = 0; i < n; ++i) add(score + i * kSumLanes, load_lanes<V>(e_ + i * W) * factor);
    const V lse = softmax.log_sum_exp();
    add(sums.scalar + lane, lse * lse);
    add(sums.scalar + kSumLanes + lane, softmax.entropy);
  }

  MOEYARD_INLINE void add_choices(int64_t rows, int64_t lane, LaneSums<A, W>& sums, int32_t* counts) {
    for (int64_t l = 0; l < rows; ++l) {
      if (id_[l] < 0) continue;  // a masked row
      A* const sum = sums.weight + lane + l;
      for (int64_t s = l; s < g_.k * W; s += W) {
        const auto id = uint32_t(id_[s]);
        sum[id * uint32_t(kSumLanes)] += weight_[s];
        ++counts[id];
      }
    }
  }

  // The same by comparing every slot with every expert, which beats single steps for a few of both.
  MOEYARD_INLINE void add_few_choices(int64_t lane, LaneSums<A, W>& sums) {
    for (int64_t i = 0; i < g_.experts; ++i) {
      V weight{};
      I count = load_lanes<I>(sums.few_counts + i * kSumLanes + lane);
      for (int64_t s = 0; s < g_.k; ++s) {
        const I id = load_lanes<I>(id_ + s * W);
        weight = id == Word(i) ? load_lanes<V>(weight_ + s * W) : weight;
        count = id == Word(i) ? count + 1 : count;
      }
      A* to = sums.weight + i * kSumLanes + lane;
      store_lanes<V>(to, load_lanes<V>(to) + weight);
      store_lanes<I>(sums.few_counts + i * kSumLanes + lane, count);
    }
  }

  // Writes the first `rows` lanes of [k][W] as [rows][k].
  template <class From, class To>
  MOEYARD_INLINE void store_rows(const From* from, int64_t rows, To* to) {
    if (rows == W && g_.k == 8) return store_whole<8>(from, to);
    if (rows == W && g_.k == 2) return store_whole<2>(from, to);
    for (int64_t l = 0; l < rows; ++l)
      for (int64_t s = 0; s < g_.k; ++s) to[l * g_.k + s] = To(from[s * W + l]);
  }
  template <int K, class From, class To>
  MOEYARD_INLINE void store_whole(const From* from, To* to) {
    using R = Lanes<From, W>;
    R v[K];
    for (int s = 0; s < K; ++s) v[s] = load_lanes<R>(from + s * W);
    columns_to_rows(v);
    for (int s = 0; s < K; ++s) store_lanes(to + s * W, __builtin_convertvector(v[s], Lanes<To, W>));
  }

  const GatingProblem& g_;
  const GatingInputs& in_;
  const GatingOutputs& out_;
  const bool raw_;  // selection values are the logits
  A *x_, *e_, *group_key_, *chosen_, *weight_;
  Word* id_;
};

}  // namespace
}  // namespace moeyard::cpu
