#include <algorithm>

#include "common/device.cuh"
#include "identity/identity.hpp"

// ---- kernel -----------------------------------------------------------------------------------------------------

namespace {

// A grid-stride copy of Words: 16 bytes per access where both pointers allow it, single bytes for the rest.
template <class Word>
__global__ void copy_kernel(const Word* __restrict__ in, Word* __restrict__ out, int64_t words) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < words; i += stride) out[i] = in[i];
}

}  // namespace

// ---- launcher ---------------------------------------------------------------------------------------------------

namespace moeyard::cuda {
namespace {

constexpr int kBlock = 256;
constexpr int64_t kMaxBlocks = 4096;

template <class Word>
void copy(const void* in, void* out, int64_t words, Stream stream) {
  if (words == 0) return;
  const int64_t blocks = std::min<int64_t>((words + kBlock - 1) / kBlock, kMaxBlocks);
  cu_launch(copy_kernel<Word>, dim3(unsigned(blocks)), dim3(kBlock), 0, stream, static_cast<const Word*>(in),
            static_cast<Word*>(out), words);
}

}  // namespace

void identity(const void* in, void* out, int64_t bytes, int device, void* stream) {
  if (bytes == 0) return;
  const LaunchScope scope("moeyard::identity", device);
  const auto s = static_cast<Stream>(stream);
  const bool aligned = ((reinterpret_cast<uintptr_t>(in) | reinterpret_cast<uintptr_t>(out)) & 15u) == 0;
  const int64_t words = aligned ? bytes / 16 : 0, done = words * 16;
  copy<uint4>(in, out, words, s);
  copy<unsigned char>(static_cast<const char*>(in) + done, static_cast<char*>(out) + done, bytes - done, s);
}

}  // namespace moeyard::cuda
