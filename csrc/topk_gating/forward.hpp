// The forward pass over one chunk of rows: in blocks of one row per lane where that fits, else row by row.
#pragma once
#include "topk_gating/lane_gate.hpp"
#include "topk_gating/row.hpp"
#include "topk_gating/row_sums.hpp"
#include "topk_gating/select.hpp"

namespace moeyard::cpu {
namespace {

// Scratch of the row by row path.
template <class A>
struct RowScratch {
  A *x, *e, *score, *key, *group_key, *chosen;
  uint64_t* order;
  int32_t* ids;

  RowScratch(Carver& carve, int64_t experts) {
    order = carve.take<uint64_t>(experts);
    for (A** row : {&x, &e, &score, &key, &group_key, &chosen}) *row = carve.take<A>(experts);
    ids = carve.take<int32_t>(experts);
  }
  static int64_t bytes(int64_t experts) {
    return experts * int64_t(sizeof(uint64_t) + 6 * sizeof(A) + sizeof(int32_t));
  }
};

// Selection values: the raw logit where the score is monotone in it and nothing is added (no rounding can make a tie
// that is none), else the score; for softmax_topk always the logit. What is no candidate becomes -inf.
template <class A>
void selection_keys(const GatingProblem& g, const A* bias, const RowScratch<A>& c) {
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  const A* from = selects_raw(g, bias) ? c.x : c.score;
  for (int64_t i = 0; i < g.experts; ++i) {
    const A value = from[i] + (bias ? bias[i] : A(0));
    c.key[i] = c.x[i] > lowest && value > lowest ? value : lowest;
  }
}

// The scores that are looked at: all of them, or of the softmax only where they decide; and their statistics.
template <class A, int W>
void row_scores(const GatingProblem& g, const A* bias, int64_t lane, const RowSoftmax<A>& row, const RowScratch<A>& c,
                LaneSums<A, W>& sums) {
  const int64_t n = g.experts;
  if (g.score == Score::sigmoid)
    for (int64_t i = 0; i < n; ++i) c.score[i] = elementwise_score(Score::sigmoid, c.x[i]);
  else if (g.score == Score::sqrtsoftplus)
    for (int64_t i = 0; i < n; ++i) c.score[i] = elementwise_score(Score::sqrtsoftplus, c.x[i]);
  else if (!selects_raw(g, bias))
    for (int64_t i = 0; i < n; ++i) c.score[i] = c.e[i] / row.sum;
  const A* seen = is_elementwise(g.score) ? c.score : c.e;
  const A factor = is_elementwise(g.score) ? A(1) : A(1) / row.sum;
  const auto add = [&](A* to, int64_t i) { *to += c.x[i] != c.x[i] ? c.x[i] : seen[i] * factor; };
  if (sums.lanes == 1)
    for (int64_t i = 0; i < n; ++i) add(sums.score + i, i);
  else
    for (int64_t i = 0; i < n; ++i) add(sums.score + i * sums.lanes + lane, i);
}

template <class A>
void choose(const GatingProblem& g, const int64_t* forced, RowScratch<A>& c, int32_t* experts) {
  if (g.num_groups > 0)
    limit_to_groups(c.key, g.experts, g.num_groups, g.topk_groups, g.group_score_experts, c.group_key, c.ids, c.order);
  int64_t open = g.k;
  for (int64_t s = 0; s < g.k; ++s) experts[s] = s < g.forced_slots ? int32_t(forced[s]) : -1;
  for (int64_t s = 0; s < g.forced_slots; ++s) {
    if (experts[s] < 0) continue;
    c.key[experts[s]] = std::numeric_limits<A>::quiet_NaN();
    --open;
  }
  // The groups that are left hold at least k experts, so there is one for every open slot.
  select_top(c.key, g.experts, open, c.ids, c.order);
  const int32_t* next = c.ids;
  for (int64_t s = 0; s < g.k; ++s)
    if (experts[s] < 0) experts[s] = *next++;
}

template <class A>
void chosen_weights(const GatingProblem& g, const int32_t* experts, A softmax_sum, RowScratch<A>& c, A* weights) {
  if (g.unit_weights) {
    std::fill(weights, weights + g.k, A(g.scale / double(g.k)));
    return;
  }
  A* chosen = c.chosen;
  if (g.score == Score::softmax_topk) {
    const RowSoftmax<A> row = row_softmax<A>(g.k, [&](int64_t s) { return c.x[experts[s]]; }, chosen);
    for (int64_t s = 0; s < g.k; ++s) chosen[s] /= row.sum;
  } else {
    for (int64_t s = 0; s < g.k; ++s) {
      const A v = g.score == Score::softmax ? c.e[experts[s]] / softmax_sum : c.score[experts[s]];
      chosen[s] = v == v ? v : A(0);
    }
  }
  if (g.renormalize && g.score != Score::softmax_topk) {
    const A sum = row_sum<A>(g.k, [&](int64_t s) { return chosen[s]; });
    for (int64_t s = 0; s < g.k; ++s) chosen[s] = sum > A(0) ? chosen[s] / sum : A(0);
  }
  for (int64_t s = 0; s < g.k; ++s) weights[s] = chosen[s] * A(g.scale);
}

template <class A, class T, int W>
void gate_row(const GatingProblem& g, const T* logits, const A* bias, const int64_t* forced, int64_t lane,
              RowScratch<A>& c, LaneSums<A, W>& sums, int32_t* counts, A* weights, int32_t* experts) {
  for (int64_t i = 0; i < g.experts; ++i) c.x[i] = to_float(logits[i]);
  const RowSoftmax<A> row = row_softmax<A>(g.experts, [&](int64_t i) { return c.x[i]; }, c.e);
  row_scores(g, bias, lane, row, c, sums);
  selection_keys(g, bias, c);
  choose(g, forced, c, experts);
  chosen_weights(g, experts, row.sum, c, weights);
  for (int64_t s = 0; s < g.k; ++s) sums.weight[experts[s] * sums.lanes + lane] += weights[s], ++counts[experts[s]];
  sums.add_row_scalars(lane, row);
}

template <class A, class T, int W>
void gate_row_at(const GatingProblem& g, const GatingInputs& in, const GatingOutputs& out, int64_t t, int64_t lane,
                 RowScratch<A>& c, LaneSums<A, W>& sums, int32_t* counts) {
  A* weights = static_cast<A*>(out.weights) + t * g.k;
  int32_t* experts = out.experts + t * g.k;
  if (in.mask && !in.mask[t]) {
    std::fill(weights, weights + g.k, A(0));
    std::fill(experts, experts + g.k, -1);
    return;
  }
  const int64_t* forced = in.forced ? in.forced + t * g.forced_slots : nullptr;
  gate_row<A, T, W>(g, static_cast<const T*>(in.logits) + t * g.experts, static_cast<const A*>(in.bias), forced, lane,
                    c, sums, counts, weights, experts);
}

template <Simd level, class T>
void forward_chunk(const GatingProblem& g, const GatingInputs& in, const GatingOutputs& out, void* workspace,
                   int64_t index, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int W = kLanesOf<level, A>;
  const bool fits = fits_lanes(g);
  const int64_t lane_numbers = LaneSums<A, W>::count(g) + (fits ? LaneGate<A, T, W>::count(g) : 0);
  const Scratch scratch(lane_numbers * int64_t(sizeof(A)) + RowScratch<A>::bytes(g.experts));
  Carver carve(scratch.data());
  LaneSums<A, W> sums(carve, g);
  std::optional<LaneGate<A, T, W>> block;
  if (fits) block.emplace(g, in, out, carve);
  RowScratch<A> row(carve, g.experts);
  ChunkSums<A> chunk(workspace, index, g.experts);
  chunk.clear(g.experts);
  for (int64_t t = begin; t < end; t += W) {
    static_assert(std::has_single_bit(uint64_t(kSumLanes)) && std::has_single_bit(uint64_t(kRowsPerFold)));
    const int64_t rows = std::min<int64_t>(W, end - t), lane = (t - begin) & (sums.lanes - 1);
    if (!block || !block->run(t, rows, lane, sums, chunk.counts))
      for (int64_t l = 0; l < rows; ++l)
        gate_row_at<A, T, W>(g, in, out, t + l, (lane + l) % sums.lanes, row, sums, chunk.counts);
    if (((t + rows - begin) & (kRowsPerFold * sums.lanes - 1)) == 0) sums.fold_into(chunk);
  }
  sums.fold_into(chunk);
}

}  // namespace
}  // namespace moeyard::cpu
