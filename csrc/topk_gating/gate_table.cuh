// Launch parameters of topk_gating, in one place.
#pragma once

namespace moeyard::cuda {
namespace {

// A team of lanes per row. Two blocks per multiprocessor leave a thread 128 registers, which 32 experts per lane need.
constexpr int kGateThreads = 256, kGateBlocksPerSm = 2;
constexpr int kTeamExperts = 1024;  // with more a row takes a block

// A block per row.
constexpr int kBlockRowThreads = 256, kSmallBlockRowThreads = 64;
constexpr int kSmallRow = 256;  // up to so many experts the small block does

// Blocks of a launch, functions of the sizes alone: sums over rows are the same on every device. Below kSpread blocks
// of full size rows are spread over blocks of fewer warps.
constexpr int kMaxBlocks = 264, kSpread = 128;

}  // namespace
}  // namespace moeyard::cuda
