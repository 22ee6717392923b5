// Launch parameters of topk_gating, in one place.
#pragma once

namespace moeyard::cuda {
namespace {

// A team of lanes per row. So many blocks per multiprocessor leave a thread 128 registers, or 168 where a lane holds 32
// experts.
constexpr int kGateThreads = 128;
constexpr int gate_blocks_per_sm(int experts_per_lane) { return experts_per_lane < 32 ? 4 : 3; }
constexpr int kTeamExperts = 1024;  // with more a row takes a block
constexpr int kFewRows = 1024;      // of 65 to 256 experts: about two warps per scheduler if each has a row

// A block per row.
constexpr int kBlockRowThreads = 256, kSmallBlockRowThreads = 64;
constexpr int kSmallRow = 256;  // up to so many experts the small block does

// Blocks of a launch, functions of the sizes alone: sums over rows are the same on every device. At most as many as an
// H100 or H200 holds at once, for a second wave would run nearly alone. Below kSpread blocks of full size rows are
// spread over blocks of fewer warps.
constexpr int kMultiprocessors = 132, kSpread = 128, kMaxBlockRows = 2 * kMultiprocessors;

}  // namespace
}  // namespace moeyard::cuda
