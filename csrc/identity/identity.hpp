// identity: the living template of an op. It copies its input; every part that a new op needs is here and nothing
// else. A header like this one is the op's contract: what the pointers mean, who owns them, what may be empty.
#pragma once
#include <cstdint>

namespace moeyard {

namespace cpu {
/// out[i] = in[i] for `bytes` bytes. Both are contiguous and do not overlap; bytes may be 0.
void identity(const void* in, void* out, int64_t bytes, int threads);
}  // namespace cpu

namespace cuda {
/// The same on `device`, enqueued on `stream` (a cudaStream_t). Returns without waiting.
void identity(const void* in, void* out, int64_t bytes, int device, void* stream);
}  // namespace cuda

}  // namespace moeyard
