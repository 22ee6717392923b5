// CUDA's language for a host compiler: what a kernel file sees instead of CUDA's headers. common/device.cuh chooses.
// __shared__ is left out on purpose: CU_SHARED gives arrays that are poisoned and whose bounds are checked.
#pragma once
#ifdef __CUDACC__
#error "emulation/cuda_on_cpu.hpp is for host compilers"
#endif
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulation/atomics.hpp"
#include "emulation/engine.hpp"
#include "emulation/intrinsics.hpp"
#include "emulation/vector_types.hpp"
#include "emulation/warp.hpp"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

#define threadIdx (::moeyard::emulation::current->index)
#define blockIdx (::moeyard::emulation::current->block_index)
#define blockDim (::moeyard::emulation::block_dim)
#define gridDim (::moeyard::emulation::grid_dim)

/// A shared array: CU_SHARED(float4, tile, [64]); a shared variable: CU_SHARED(int, total).
#define CU_SHARED(T, name, ...)                                                                   \
  static char moeyard_key_of_##name;                                                              \
  std::type_identity_t<T __VA_ARGS__>& name = *static_cast<std::type_identity_t<T __VA_ARGS__>*>( \
      ::moeyard::emulation::shared_array(&moeyard_key_of_##name, sizeof(std::type_identity_t<T __VA_ARGS__>)))
/// The launch's dynamic shared memory as a T*, aligned to 16 bytes.
#define CU_DYN_SHARED(T, name) T* const name = static_cast<T*>(::moeyard::emulation::dynamic_shared())

namespace moeyard::cuda {

using Stream = void*;

class LaunchScope {
 public:
  LaunchScope(const char*, int) {}
};

/// The arguments are copied once per launch, as on the device.
template <class... Params, class... Args>
void cu_launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Stream, Args&&... args) {
  struct Call {
    void (*kernel)(Params...);
    std::tuple<std::remove_cv_t<Params>...> arguments;
    static void run(void* call) {
      const auto& self = *static_cast<const Call*>(call);
      std::apply(self.kernel, self.arguments);
    }
  };
  Call call{kernel, {static_cast<Params>(std::forward<Args>(args))...}};
  emulation::run_grid(grid, block, shared_bytes, &Call::run, &call);
}

}  // namespace moeyard::cuda
