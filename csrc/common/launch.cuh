// CUDA's side of device.cuh. Every kernel is launched through cu_launch, never with <<<>>>, so that there is one place
// for launch attributes and error checks; emulation/cuda_on_cpu.hpp has the same names with the same meaning.
#pragma once
#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

/// A shared array: CU_SHARED(float4, tile, [64]); a shared variable: CU_SHARED(int, total).
#define CU_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
/// The launch's dynamic shared memory as a T*, aligned to 16 bytes.
#define CU_DYN_SHARED(T, name)                                      \
  extern __shared__ __align__(16) unsigned char moeyard_dynamic_[]; \
  T* const name = reinterpret_cast<T*>(moeyard_dynamic_)

namespace moeyard::cuda {

using Stream = cudaStream_t;

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

/// Makes `device` current for a scope: the caller's current device is put back afterwards.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

/// The first line of every launcher: profilers show its launches as a range (NVTX) of this name, and `device` is
/// current.
class LaunchScope {
 public:
  LaunchScope(const char* name, int device) : range_(name), guard_(device) {}

 private:
  struct Range {
    explicit Range(const char* name) { nvtxRangePushA(name); }
    ~Range() { nvtxRangePop(); }
    Range(const Range&) = delete;
    Range& operator=(const Range&) = delete;
  };
  Range range_;
  DeviceGuard guard_;
};

template <class... Params, class... Args>
void cu_launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream, Args&&... args) {
  // Of the 48 KiB that need no asking for, static arrays take their part: no kernel with dynamic memory has 16 KiB.
  if (shared_bytes > 32 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
          "cudaFuncSetAttribute");
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Params>(std::forward<Args>(args))...);
  check(cudaGetLastError(), "kernel launch");
}

}  // namespace moeyard::cuda
