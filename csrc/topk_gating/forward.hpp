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
  A *e, *score, *key, *group_key, *chosen;
  int32_t *ids, *order;

  RowScratch(Carver& carve, int64_t experts) {
    for (A** row : {&e, &score, &key, &group_key, &chosen}) *row = carve.take<A>(experts);
    for (int32_t** row : {&ids, &order}) *row = carve.take<int32_t>(experts);
  }
  static int64_t bytes(int64_t experts) { return experts * int64_t(5 * sizeof(A) + 2 * sizeof(int32_t)); }
};

// Selection values: the raw logit where the score is monotone in it and nothing is added (no rounding can make a tie
// that is none), else the score; for softmax_topk always the logit. What is no candidate becomes -inf.
template <class A, class At>
void selection_keys(const GatingProblem& g, const A* bias, At&& at, const A* score, A* key) {
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  const bool raw = g.score == Score::softmax_topk || (!bias && g.num_groups == 0);
  for (int64_t i = 0; i < g.experts; ++i) {
    const A x = at(i), value = (raw ? x : score[i]) + (bias ? bias[i] : A(0));
    key[i] = x > lowest && value > lowest ? value : lowest;
  }
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

template <class A, class At>
void chosen_weights(const GatingProblem& g, At&& at, const int32_t* experts, RowScratch<A>& c, A* weights) {
  if (g.unit_weights) {
    std::fill(weights, weights + g.k, A(g.scale / double(g.k)));
    return;
  }
  A* chosen = c.chosen;
  if (g.score == Score::softmax_topk) {
    const RowSoftmax<A> row = row_softmax<A>(g.k, [&](int64_t s) { return at(experts[s]); }, chosen);
    for (int64_t s = 0; s < g.k; ++s) chosen[s] /= row.sum;
  } else {
    for (int64_t s = 0; s < g.k; ++s) {
      const A v = c.score[experts[s]];
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
  const auto at = [&](int64_t i) { return A(to_float(logits[i])); };
  const RowSoftmax<A> row = row_softmax<A>(g.experts, at, c.e);
  const bool elementwise = is_elementwise(g.score);
  const A factor = elementwise ? A(1) : A(1) / row.sum;
  for (int64_t i = 0; i < g.experts; ++i) {
    const A x = at(i);
    c.score[i] = x != x ? x : elementwise ? elementwise_score(g.score, x) : c.e[i] / row.sum;
    sums.score[i * sums.lanes + lane] += x != x ? x : (elementwise ? c.score[i] : c.e[i]) * factor;
  }
  selection_keys(g, bias, at, c.score, c.key);
  choose(g, forced, c, experts);
  chosen_weights(g, at, experts, c, weights);
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
    const int64_t rows = std::min<int64_t>(W, end - t), lane = (t - begin) % sums.lanes;
    if (!block || !block->run(t, rows, lane, sums, chunk.counts))
      for (int64_t l = 0; l < rows; ++l)
        gate_row_at<A, T, W>(g, in, out, t + l, (lane + l) % sums.lanes, row, sums, chunk.counts);
    if ((t + rows - begin) % (kRowsPerFold * sums.lanes) == 0) sums.fold_into(chunk);
  }
  sums.fold_into(chunk);
}

}  // namespace
}  // namespace moeyard::cpu
