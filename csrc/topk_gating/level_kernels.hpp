// The kernels of one level. Everything below stands in an anonymous namespace or is always inlined: each level has its
// own.
#pragma once
#include "topk_gating/backward.hpp"
#include "topk_gating/forward.hpp"

namespace moeyard::cpu {
namespace {

template <Simd level>
constexpr GatingKernels level_kernels() {
  return {
      [](const GatingProblem& g, const GatingInputs& in, const GatingOutputs& out, void* workspace, int64_t chunk,
         int64_t begin, int64_t end) {
        with_float_type(g.dtype, [&](auto element) {
          forward_chunk<level, decltype(element)>(g, in, out, workspace, chunk, begin, end);
        });
      },
      [](const GatingProblem& g, const BackwardCall& call, int64_t begin, int64_t end) {
        with_float_type(g.dtype, [&](auto element) { backward_chunk<level, decltype(element)>(g, call, begin, end); });
      },
  };
}

}  // namespace
}  // namespace moeyard::cpu
