// A grid with a thread per item.
#pragma once
#include <algorithm>

#include "common/device.cuh"

namespace moeyard::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

__device__ inline int64_t thread_number() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

/// Blocks of kThreads, at least one.
inline dim3 grid_of(int64_t threads) {
  return dim3(unsigned(std::max<int64_t>(1, (threads + kThreads - 1) / kThreads)));
}

}  // namespace
}  // namespace moeyard::cuda
