#include <atomic>

#include "common/device_errors.hpp"
#include "common/launch.cuh"

namespace moeyard::cuda {
namespace {

constexpr int kMaxDevices = 64;
__device__ unsigned error_word;  // every device has its own
std::atomic<unsigned*> addresses[kMaxDevices];

std::atomic<unsigned*>& address_of(int device) {
  if (device < 0 || device >= kMaxDevices)
    throw std::runtime_error("device_errors: no CUDA device " + std::to_string(device));
  return addresses[device];
}

}  // namespace

unsigned* device_errors(int device) {
  std::atomic<unsigned*>& known = address_of(device);
  if (unsigned* const word = known.load()) return word;
  const DeviceGuard guard(device);
  void* word = nullptr;
  check(cudaGetSymbolAddress(&word, error_word), "cudaGetSymbolAddress");
  known.store(static_cast<unsigned*>(word));
  return known.load();
}

unsigned take_device_errors(int device) {
  unsigned* const word = address_of(device).load();
  if (!word) return 0;
  const DeviceGuard guard(device);
  unsigned kinds = 0;
  // The streams of torch do not wait for the default stream, on which the copy runs.
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  check(cudaMemcpy(&kinds, word, sizeof kinds, cudaMemcpyDeviceToHost), "cudaMemcpy");
  if (kinds != 0) check(cudaMemset(word, 0, sizeof kinds), "cudaMemset");
  return kinds;
}

}  // namespace moeyard::cuda
