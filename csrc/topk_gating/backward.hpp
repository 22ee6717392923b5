// The backward pass over one chunk of rows: in blocks of one row per lane where that fits, else row by row.
#pragma once
#include "topk_gating/lane_backward.hpp"
#include "topk_gating/row_backward.hpp"
#include "topk_gating/row_sums.hpp"

namespace moeyard::cpu {
namespace {

template <class A, class T>
void backward_row_at(const GatingProblem& g, const BackwardCall& call, const Gradients<A>& grads, int64_t t,
                     Row<A>& row) {
  T* out = static_cast<T*>(call.grad_logits) + t * g.experts;
  if (call.mask && !call.mask[t])
    std::fill(out, out + g.experts, from_float<T>(A(0)));
  else
    backward_row<A, T>(g, static_cast<const T*>(call.logits) + t * g.experts, call.experts + t * g.k,
                       grads.weights ? grads.weights + t * g.k : nullptr, grads, row, out);
}

template <Simd level, class T>
void backward_chunk(const GatingProblem& g, const BackwardCall& call, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int W = kLanesOf<level, A>;
  const bool fits = g.experts <= kLaneExperts;
  const Gradients<A> grads(call.grads);
  const Scratch scratch((fits ? LaneBackward<A, T, W>::bytes(g) : 0) + Row<A>::count(g.experts) * int64_t(sizeof(A)));
  Carver carve(scratch.data());
  std::optional<LaneBackward<A, T, W>> block;
  if (fits) block.emplace(g, call, grads, carve);
  Row<A> row(carve, g.experts);
  for (int64_t t = begin; t < end; t += W) {
    const int64_t rows = std::min<int64_t>(W, end - t);
    if (block && block->run(t, rows)) continue;
    for (int64_t l = 0; l < rows; ++l) backward_row_at<A, T>(g, call, grads, t + l, row);
  }
}

}  // namespace
}  // namespace moeyard::cpu
