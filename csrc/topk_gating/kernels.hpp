// The kernels of topk_gating, one set per SIMD level. Each set has a file of its own, kernels_<level>.cpp, because the
// compiler must know the level when it first sees a comparison of vectors: inlining into a function of another level
// comes too late.
#pragma once
#include <cstdint>

#include "common/simd.hpp"
#include "topk_gating/topk_gating.hpp"

namespace moeyard::cpu {

struct BackwardCall {
  const void* logits;
  const int32_t* experts;
  const uint8_t* mask;
  GatingGradients grads;
  void* grad_logits;
};

/// Work on rows [begin, end).
struct GatingKernels {
  void (*forward)(const GatingProblem& g, const GatingInputs& in, const GatingOutputs& out, void* workspace,
                  int64_t chunk, int64_t begin, int64_t end);
  void (*backward)(const GatingProblem& g, const BackwardCall& call, int64_t begin, int64_t end);
};

extern const GatingKernels kGatingBaseline;
#ifdef MOEYARD_X86
extern const GatingKernels kGatingAvx2, kGatingAvx512;
#endif

}  // namespace moeyard::cpu
