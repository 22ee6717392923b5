#include <algorithm>
#include <limits>
#include <vector>

#include "common/parallel.hpp"
#include "topk_gating/row.hpp"
#include "topk_gating/select.hpp"
#include "topk_gating/topk_gating.hpp"

namespace moeyard::cpu {
namespace {

// ---- kernel -----------------------------------------------------------------------------------------------------

// Rows added up on their own before they join the chunk's sum: keeps float32 sums over many rows accurate.
constexpr int64_t kBlockRows = 64;

// One chunk's share of the workspace: scratch for a row, and what is summed over rows. Scalars: [0] lse^2, [1] entropy.
template <class A>
struct Chunk {
  A *p, *score, *key, *group_key, *chosen;
  A *score_block, *weight_block, *scalar_block, *score_sum, *weight_sum, *scalar_sum;
  int32_t *ids, *order, *counts;

  Chunk(void* workspace, int64_t index, const GatingProblem& g) {
    Carver carve(static_cast<char*>(workspace) + index * bytes(g));
    for (A** row : {&p, &score, &key, &group_key, &chosen}) *row = carve.take<A>(g.experts);
    for (A** row : {&score_block, &weight_block, &score_sum, &weight_sum}) *row = carve.take<A>(g.experts);
    scalar_block = carve.take<A>(2), scalar_sum = carve.take<A>(2);
    for (int32_t** row : {&ids, &order, &counts}) *row = carve.take<int32_t>(g.experts);
  }

  static int64_t bytes(const GatingProblem& g) {
    const int64_t raw = (9 * g.experts + 4) * int64_t(sizeof(A)) + 3 * g.experts * int64_t(sizeof(int32_t));
    return (raw + 7) / 8 * 8;
  }

  // A block's sums join the chunk's; the block starts again at 0.
  void close_block(int64_t experts) {
    const auto join = [](A* block, A* sum, int64_t n) {
      for (int64_t i = 0; i < n; ++i) sum[i] += block[i], block[i] = 0;
    };
    join(score_block, score_sum, experts);
    join(weight_block, weight_sum, experts);
    join(scalar_block, scalar_sum, 2);
  }
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
void choose(const GatingProblem& g, const int64_t* forced, Chunk<A>& c, int32_t* experts) {
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
void chosen_weights(const GatingProblem& g, At&& at, const int32_t* experts, Chunk<A>& c, A* weights) {
  if (g.unit_weights) {
    std::fill(weights, weights + g.k, A(g.scale / double(g.k)));
    return;
  }
  A* chosen = c.chosen;
  if (g.score == Score::softmax_topk) {
    row_softmax<A>(g.k, [&](int64_t s) { return at(experts[s]); }, chosen);
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

template <class A, class T>
void gate_row(const GatingProblem& g, const T* logits, const A* bias, const int64_t* forced, Chunk<A>& c, A* weights,
              int32_t* experts) {
  const auto at = [&](int64_t i) { return A(to_float(logits[i])); };
  const RowSoftmax<A> row = row_softmax<A>(g.experts, at, c.p);
  for (int64_t i = 0; i < g.experts; ++i) {
    const A x = at(i);
    c.score[i] = x != x ? x : is_elementwise(g.score) ? elementwise_score(g.score, x) : c.p[i];
  }
  selection_keys(g, bias, at, c.score, c.key);
  choose(g, forced, c, experts);
  chosen_weights(g, at, experts, c, weights);

  for (int64_t i = 0; i < g.experts; ++i) c.score_block[i] += c.score[i];
  for (int64_t s = 0; s < g.k; ++s) c.weight_block[experts[s]] += weights[s], ++c.counts[experts[s]];
  const A lse = row.log_sum_exp();
  c.scalar_block[0] += row.has_nan ? std::numeric_limits<A>::quiet_NaN() : lse * lse;
  c.scalar_block[1] += row.entropy;
}

template <class A, class T>
void gate_chunk(const GatingProblem& g, const GatingInputs& in, const GatingOutputs& out, Chunk<A>& c, int64_t begin,
                int64_t end) {
  std::fill(c.score_block, c.scalar_sum + 2, A(0));  // all six sums lie together
  std::fill(c.counts, c.counts + g.experts, 0);
  for (int64_t t = begin; t < end; ++t) {
    A* weights = static_cast<A*>(out.weights) + t * g.k;
    int32_t* experts = out.experts + t * g.k;
    if (in.mask && !in.mask[t]) {
      std::fill(weights, weights + g.k, A(0));
      std::fill(experts, experts + g.k, -1);
    } else {
      const int64_t* forced = in.forced ? in.forced + t * g.forced_slots : nullptr;
      gate_row<A, T>(g, static_cast<const T*>(in.logits) + t * g.experts, static_cast<const A*>(in.bias), forced, c,
                     weights, experts);
    }
    if ((t - begin + 1) % kBlockRows == 0) c.close_block(g.experts);
  }
  c.close_block(g.experts);
}

// The second stage: chunks in order.
template <class A>
void add_chunks(const GatingProblem& g, const GatingOutputs& out, void* workspace, int64_t chunks) {
  A *score_sum = static_cast<A*>(out.score_sum), *weight_sum = static_cast<A*>(out.weight_sum);
  A lse_sq = 0, entropy = 0;
  std::fill(score_sum, score_sum + g.experts, A(0));
  std::fill(weight_sum, weight_sum + g.experts, A(0));
  std::fill(out.counts, out.counts + g.experts, 0);
  for (int64_t n = 0; n < chunks; ++n) {
    const Chunk<A> c(workspace, n, g);
    for (int64_t i = 0; i < g.experts; ++i) {
      score_sum[i] += c.score_sum[i];
      weight_sum[i] += c.weight_sum[i];
      out.counts[i] += c.counts[i];
    }
    lse_sq += c.scalar_sum[0], entropy += c.scalar_sum[1];
  }
  *static_cast<A*>(out.logsumexp_sq) = lse_sq;
  *static_cast<A*>(out.entropy_sum) = entropy;
}

// ---- launcher ---------------------------------------------------------------------------------------------------

void check_forced(const GatingProblem& g, const GatingInputs& in) {
  std::vector<int64_t> last_row(size_t(g.experts), -1);
  for (int64_t t = 0; t < g.rows; ++t) {
    if (in.mask && !in.mask[t]) continue;
    for (int64_t s = 0; s < g.forced_slots; ++s) {
      const int64_t id = in.forced[t * g.forced_slots + s];
      if (id < -1 || id >= g.experts)
        fail_value("forced_experts: expected ids in [-1, ", g.experts, "), got ", id, " in row ", t);
      if (id < 0) continue;
      if (last_row[size_t(id)] == t)
        fail_value("forced_experts: expected distinct ids in each row, got ", id, " twice in row ", t);
      last_row[size_t(id)] = t;
    }
  }
}

template <class A>
void check_bias(const GatingProblem& g, const A* bias) {
  for (int64_t i = 0; i < g.experts; ++i)
    if (bias[i] != bias[i]) fail_value("selection_bias: expected no NaN, got NaN for expert ", i);
}

template <class A, class T>
void launch(const GatingProblem& g, const GatingInputs& in, const GatingOutputs& out, void* workspace, int threads) {
  if (in.bias) check_bias(g, static_cast<const A*>(in.bias));
  if (in.forced) check_forced(g, in);
  const int64_t rows = gating_chunk_rows(g.rows);
  parallel_for(g.rows, rows, threads, [&](int64_t begin, int64_t end) {
    Chunk<A> chunk(workspace, begin / rows, g);
    gate_chunk<A, T>(g, in, out, chunk, begin, end);
  });
  add_chunks<A>(g, out, workspace, (g.rows + rows - 1) / rows);
}

}  // namespace

int64_t topk_gating_workspace(const GatingProblem& g) {
  const int64_t rows = gating_chunk_rows(g.rows), chunks = (g.rows + rows - 1) / rows;
  return chunks * (g.dtype == DType::f64 ? Chunk<double>::bytes(g) : Chunk<float>::bytes(g));
}

void topk_gating(const GatingProblem& g, const GatingInputs& in, const GatingOutputs& out, void* workspace,
                 int threads) {
  with_float_type(g.dtype, [&](auto element) {
    using T = decltype(element);
    launch<acc_t<T>, T>(g, in, out, workspace, threads);
  });
}

}  // namespace moeyard::cpu
