#include <algorithm>
#include <vector>

#include "common/huge_pages.hpp"
#include "common/parallel.hpp"
#include "topk_gating/chunk_sums.hpp"
#include "topk_gating/kernels.hpp"
#include "topk_gating/topk_gating.hpp"

namespace moeyard::cpu {
namespace {

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

const GatingKernels& kernels() {
#ifdef MOEYARD_X86
  if (simd_level() == Simd::avx512) return kGatingAvx512;
  if (simd_level() == Simd::avx2) return kGatingAvx2;
#endif
  return kGatingBaseline;
}

template <class A>
void launch(const GatingProblem& g, const GatingInputs& in, const GatingOutputs& out, int threads) {
  if (in.bias) check_bias(g, static_cast<const A*>(in.bias));
  if (in.forced) check_forced(g, in);
  const int64_t rows = gating_chunk_rows(g.rows), chunks = (g.rows + rows - 1) / rows;
  const Scratch sums(chunks * ChunkSums<A>::bytes(g.experts));
  parallel_for(g.rows, rows, threads, [&](int64_t begin, int64_t end) {
    kernels().forward(g, in, out, sums.data(), begin / rows, begin, end);
  });
  add_chunks<A>(g, out, sums.data(), chunks);
}

}  // namespace

void topk_gating(const GatingProblem& g, const GatingInputs& in, const GatingOutputs& out, int threads) {
  if (g.dtype == DType::f64)
    launch<double>(g, in, out, threads);
  else
    launch<float>(g, in, out, threads);
}

void topk_gating_backward(const GatingProblem& g, const void* logits, const int32_t* experts, const uint8_t* mask,
                          const GatingGradients& grads, void* grad_logits, int threads) {
  const BackwardCall call{logits, experts, mask, grads, grad_logits};
  advise_huge_pages(grad_logits, g.rows * g.experts * element_bytes(g.dtype));
  parallel_for(g.rows, gating_chunk_rows(g.rows), threads,
               [&](int64_t begin, int64_t end) { kernels().backward(g, call, begin, end); });
}

}  // namespace moeyard::cpu
