#include <algorithm>
#include <bit>
#include <type_traits>

#include "common/device.cuh"
#include "topk_gating/gate_backward.cuh"
#include "topk_gating/gate_block_backward.cuh"
#include "topk_gating/gate_block_forward.cuh"
#include "topk_gating/gate_forward.cuh"

// ---- launcher ---------------------------------------------------------------------------------------------------

namespace moeyard::cuda {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Whether a team of lanes can take a row: what is asked for has to fit its registers and slots.
bool fits_team(const GatingProblem& g) {
  const int64_t group = g.num_groups > 0 ? g.experts / g.num_groups : kLanes;
  return g.dtype != DType::f64 && g.experts <= kTeamExperts && g.k <= kTeamSlots && group % kLanes == 0 &&
         (g.num_groups == 0 || g.group_score_experts <= 2);
}

/// Calls f with the Team type for so many experts: few lanes per row, as long as their registers hold it.
template <class F>
void with_team(int64_t experts, F f) {
  if (experts <= 32) return f(std::type_identity<Team<8, 1>>());
  if (experts <= 64) return f(std::type_identity<Team<8, 2>>());
  if (experts <= 128) return f(std::type_identity<Team<8, 4>>());
  if (experts <= 256) return f(std::type_identity<Team<8, 8>>());
  if (experts <= 512) return f(std::type_identity<Team<16, 16>>());
  f(std::type_identity<Team<32, 32>>());
}
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

struct Shape {
  int64_t blocks;
  int threads;
};

/// At least one block, so that sums over no rows are written too.
Shape team_shape(int64_t rows, int64_t rows_per_warp) {
  const int64_t warps = std::clamp<int64_t>(divide_up(rows, rows_per_warp * kSpread), 1, kGateThreads / kLanes);
  const int64_t blocks = divide_up(rows, rows_per_warp * warps);
  return {std::clamp<int64_t>(blocks, 1, kMaxBlocks), int(warps) * kLanes};
}
Shape block_shape(const GatingProblem& g) {
  return {std::clamp<int64_t>(g.rows, 1, kMaxBlockRows),
          g.experts <= kSmallRow ? kSmallBlockRowThreads : kBlockRowThreads};
}
Shape forward_shape(const GatingProblem& g) {
  if (!fits_team(g)) return block_shape(g);
  Shape shape;
  with_team(g.experts, [&](auto team) { shape = team_shape(g.rows, decltype(team)::type::per_warp); });
  return shape;
}

template <class A>
void add_blocks(const GatingProblem& g, const GatingOutputs& out, void* workspace, int64_t blocks, Stream stream) {
  const BlockSums<A> sums(workspace, int(blocks), g.experts);
  cu_launch(sums_kernel<A>, dim3(unsigned(divide_up(g.experts, kLanes))), dim3(1024), 0, stream, sums, int(blocks),
            out);
}

void team_forward(GateCall call, Shape shape, Stream stream) {
  const GatingProblem& g = call.problem;
  with_team(g.experts, [&](auto team) {
    using T = typename decltype(team)::type;
    call.packed = packed_rows<T>(g, call.in.logits, nullptr);
    const auto kernel = is_elementwise(g.score) ? gate_kernel<T, true> : gate_kernel<T, false>;
    cu_launch(kernel, dim3(unsigned(shape.blocks)), dim3(unsigned(shape.threads)),
              size_t(GateShared<T>::bytes(shape.threads / kLanes)), stream, call);
  });
  add_blocks<float>(g, call.out, call.workspace, shape.blocks, stream);
}

template <class A>
void block_forward(const GateCall& call, Shape shape, Stream stream) {
  const GatingProblem& g = call.problem;
  const int64_t padded = int64_t(std::bit_ceil(uint64_t(g.experts)));
  cu_launch(gate_block_kernel<A>, dim3(unsigned(shape.blocks)), dim3(unsigned(shape.threads)),
            size_t(BlockGate<A>::bytes(g.experts, padded)), stream, call, int(padded));
  add_blocks<A>(g, call.out, call.workspace, shape.blocks, stream);
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
    const Shape shape = team_shape(g.rows, T::per_warp);
    const auto kernel = is_elementwise(g.score) ? gate_backward_kernel<T, true> : gate_backward_kernel<T, false>;
    const size_t shared = size_t(T::span + shape.threads * T::count) * sizeof(float);
    cu_launch(kernel, dim3(unsigned(shape.blocks)), dim3(unsigned(shape.threads)), shared, stream, call);
  });
}

}  // namespace

int64_t topk_gating_workspace(const GatingProblem& g) {
  const int64_t blocks = forward_shape(g).blocks;
  return g.dtype == DType::f64 ? BlockSums<double>::bytes(blocks, g.experts)
                               : BlockSums<float>::bytes(blocks, g.experts);
}

void topk_gating(const GatingProblem& g, const GatingInputs& in, const GatingOutputs& out, void* workspace,
                 unsigned* errors, int device, void* stream) {
  const LaunchScope scope("moeyard::topk_gating", device);
  const auto s = static_cast<Stream>(stream);
  const GateCall call{g, in, out, workspace, errors, g.scale / double(g.k), false};
  const Shape shape = forward_shape(g);
  if (fits_team(g))
    team_forward(call, shape, s);
  else if (g.dtype == DType::f64)
    block_forward<double>(call, shape, s);
  else
    block_forward<float>(call, shape, s);
}

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
