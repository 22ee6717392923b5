// The backward pass of topk_gating, in a file of its own because its kernels take nvcc as long as the forward pass's.
#include <type_traits>

#include "common/device.cuh"
#include "topk_gating/gate_backward.cuh"
#include "topk_gating/gate_block_backward.cuh"
#include "topk_gating/gate_launch.cuh"

// ---- launcher ---------------------------------------------------------------------------------------------------

namespace moeyard::cuda {
namespace {

/// The backward pass holds two numbers per expert.
template <class F>
void with_backward_team(int64_t experts, F f) {
  if (experts <= 32) return f(std::type_identity<Team<8, 1>>());
  if (experts <= 64) return f(std::type_identity<Team<8, 2>>());
  if (experts <= 128) return f(std::type_identity<Team<8, 4>>());
  if (experts <= 256) return f(std::type_identity<Team<8, 8>>());
  if (experts <= 512) return f(std::type_identity<Team<32, 16>>());
  f(std::type_identity<Team<32, 32>>());
}

template <class A>
void block_backward(const GateBackwardCall& call, Stream stream) {
  const Shape shape = block_shape(call.problem);
  cu_launch(gate_block_backward_kernel<A>, dim3(unsigned(shape.blocks)), dim3(unsigned(shape.threads)),
            size_t(BlockBackward<A>::bytes(call.problem.experts)), stream, call);
}

void team_backward(GateBackwardCall call, Stream stream) {
  const GatingProblem& g = call.problem;
  with_backward_team(g.experts, [&](auto team) {
    using T = typename decltype(team)::type;
    call.packed = packed_rows<T>(g, call.logits, call.grad_logits);
    const Shape shape = team_shape<T>(g.rows);
    const auto kernel = is_elementwise(g.score) ? gate_backward_kernel<T, true> : gate_backward_kernel<T, false>;
    const size_t shared = size_t(T::span + shape.threads * T::count) * sizeof(float);
    cu_launch(kernel, dim3(unsigned(shape.blocks)), dim3(unsigned(shape.threads)), shared, stream, call);
  });
}

}  // namespace

void topk_gating_backward(const GatingProblem& g, const void* logits, const int32_t* experts, const uint8_t* mask,
                          const GatingGradients& grads, void* grad_logits, unsigned* errors, int device, void* stream) {
  if (g.rows == 0) return;
  const LaunchScope scope("moeyard::topk_gating_backward", device);
  const auto s = static_cast<Stream>(stream);
  const GateBackwardCall call{g, logits, experts, mask, grads, grad_logits, errors, false};
  if (fits_team(g))
    team_backward(call, s);
  else if (g.dtype == DType::f64)
    block_backward<double>(call, s);
  else
    block_backward<float>(call, s);
}

}  // namespace moeyard::cuda
