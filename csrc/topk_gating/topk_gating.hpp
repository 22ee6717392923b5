// topk_gating: scores of a router, the k chosen experts per row, their weights and the sums over rows that the
// auxiliary losses need, in one pass. This header is the op's contract; python/moeyard/ops/topk_gating.py states the
// maths. T rows, E experts, k slots per row; A is float, or double for f64 logits.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/dtype.hpp"

namespace moeyard {

enum class Score : int { softmax = 0, softmax_topk = 1, sigmoid = 2, sqrtsoftplus = 3 };

/// Sizes and options, checked by the caller: 1 <= k <= E <= 8192, num_groups divides E,
/// 1 <= topk_groups <= num_groups, k <= topk_groups * E / num_groups, 1 <= group_score_experts <= E / num_groups.
struct GatingProblem {
  DType dtype;  ///< of the logits and their gradient
  int64_t rows, experts, k;
  Score score;
  bool renormalize;
  double scale;
  int64_t num_groups = 0, topk_groups = 0, group_score_experts = 0;  ///< num_groups 0: no groups
  int64_t forced_slots = 0;   ///< columns of `forced`: 0 (nothing forced), 1 or k
  bool unit_weights = false;  ///< every slot of a live row weighs scale / k, whatever the scores
};

/// All contiguous; a null pointer stands for an argument that was not given.
struct GatingInputs {
  const void* logits;     ///< [T,E] of dtype
  const void* bias;       ///< [E] A or null, added to the selection value only
  const uint8_t* mask;    ///< [T] or null; 0 = padding row
  const int64_t* forced;  ///< [T,forced_slots] or null; -1 = free
};

/// All contiguous, written in full whatever T is. The sums are over rows with mask true.
struct GatingOutputs {
  void* weights;     ///< [T,k] A
  int32_t* experts;  ///< [T,k]; -1 in padding rows
  int32_t* counts;   ///< [E]
  void* score_sum;   ///< [E] A
  void* weight_sum;  ///< [E] A
  void* logsumexp_sq;
  void* entropy_sum;
};

/// Gradients of GatingOutputs' floats, each A or null for zero.
struct GatingGradients {
  const void* weights;
  const void* score_sum;
  const void* weight_sum;
  const void* logsumexp_sq;
  const void* entropy_sum;
};

/// Rows per partial sum: a function of T alone, so that no sum depends on the number of threads. At most 64 chunks.
inline int64_t gating_chunk_rows(int64_t rows) { return std::max<int64_t>(256, (rows + 63) / 64); }

namespace cpu {
/// Throws std::invalid_argument, before anything is written, for a NaN in `bias`, a forced id outside [-1, E) or one
/// that stands twice in a live row.
void topk_gating(const GatingProblem& problem, const GatingInputs& in, const GatingOutputs& out, int threads);

/// grad_logits [T,E] of dtype, from the logits and mask of the forward call and the experts that it returned. Options
/// that only concern the choice (groups, forced ids) and unit_weights are not looked at: where weights are constants,
/// their gradient and that of weight_sum are null. Throws for an id outside [0, E) in a live row.
void topk_gating_backward(const GatingProblem& problem, const void* logits, const int32_t* experts, const uint8_t* mask,
                          const GatingGradients& grads, void* grad_logits, int threads);
}  // namespace cpu

namespace cuda {
/// Bytes of workspace that topk_gating needs on the device.
int64_t topk_gating_workspace(const GatingProblem& problem);

/// The same on `device`, enqueued on `stream`. Bad values raise a flag in `errors` (common/device_errors.hpp): a NaN in
/// `bias` counts as -inf; a forced id outside [-1, E), and the second of two equal ones in a live row, as -1.
void topk_gating(const GatingProblem& problem, const GatingInputs& in, const GatingOutputs& out, void* workspace,
                 unsigned* errors, int device, void* stream);

/// An id outside [0, E) in a live row raises a flag, and its slot is passed over.
void topk_gating_backward(const GatingProblem& problem, const void* logits, const int32_t* experts, const uint8_t* mask,
                          const GatingGradients& grads, void* grad_logits, unsigned* errors, int device, void* stream);
}  // namespace cuda

}  // namespace moeyard
