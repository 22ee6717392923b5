#include <bit>
#include <type_traits>

#include "common/device.cuh"
#include "topk_gating/gate_block_forward.cuh"
#include "topk_gating/gate_forward.cuh"
#include "topk_gating/gate_launch.cuh"

// ---- launcher ---------------------------------------------------------------------------------------------------

namespace moeyard::cuda {
namespace {

/// Calls f with the Team type for so many experts: few lanes per row, as long as their registers hold it. Where rows
/// are too few to keep all schedulers busy, a row takes a warp, which is done sooner.
template <class F>
void with_team(int64_t rows, int64_t experts, F f) {
  if (rows <= kFewRows && experts > 64 && experts <= 128) return f(std::type_identity<Team<32, 4>>());
  if (rows <= kFewRows && experts > 128 && experts <= 256) return f(std::type_identity<Team<32, 8>>());
  if (experts <= 32) return f(std::type_identity<Team<8, 1>>());
  if (experts <= 64) return f(std::type_identity<Team<8, 2>>());
  if (experts <= 128) return f(std::type_identity<Team<8, 4>>());
  if (experts <= 256) return f(std::type_identity<Team<8, 8>>());
  if (experts <= 512) return f(std::type_identity<Team<16, 16>>());
  f(std::type_identity<Team<32, 32>>());
}

Shape forward_shape(const GatingProblem& g) {
  if (!fits_team(g)) return block_shape(g);
  Shape shape;
  with_team(g.rows, g.experts, [&](auto team) { shape = team_shape<typename decltype(team)::type>(g.rows); });
  return shape;
}

template <class A>
void add_blocks(const GatingProblem& g, const GatingOutputs& out, void* workspace, int64_t blocks, Stream stream) {
  const BlockSums<A> sums(workspace, int(blocks), g.experts);
  cu_launch(sums_kernel<A>, dim3(unsigned(divide_up(g.experts, kLanes) + 1)), dim3(1024), 0, stream, sums, int(blocks),
            out);
}

void team_forward(GateCall call, Shape shape, Stream stream) {
  const GatingProblem& g = call.problem;
  with_team(g.rows, g.experts, [&](auto team) {
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

}  // namespace moeyard::cuda
