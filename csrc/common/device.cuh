// The one header that a kernel file includes beside its op's own, and the one place that knows two worlds: CUDA under
// nvcc, the emulation of CUDA under any other compiler. Every piece of PTX is a function here, with its twin.
#pragma once
#include <cstdint>

#include "common/dtype.hpp"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/launch.cuh"
#else
#include "emulation/cuda_on_cpu.hpp"
#endif

namespace moeyard::cuda {

#ifdef __CUDACC__

__device__ __forceinline__ float widen(bf16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
__device__ __forceinline__ float widen(f16 v) { return __half2float(__ushort_as_half(v.bits)); }
__device__ __forceinline__ bf16 rounded(float v, bf16) { return {__bfloat16_as_ushort(__float2bfloat16_rn(v))}; }
__device__ __forceinline__ f16 rounded(float v, f16) { return {__half_as_ushort(__float2half_rn(v))}; }

/// 16 bytes that are read once and written by nobody meanwhile: past the L1 cache.
__device__ __forceinline__ uint4 load_streaming(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
/// 16 bytes that nobody reads soon.
__device__ __forceinline__ void store_streaming(uint4* p, uint4 v) { __stcs(p, v); }

#else

inline float widen(bf16 v) { return to_float(v); }
inline float widen(f16 v) { return to_float(v); }
inline bf16 rounded(float v, bf16) { return from_float<bf16>(v); }
inline f16 rounded(float v, f16) { return from_float<f16>(v); }

inline uint4 load_streaming(const uint4* p, emulation::Location where = std::source_location::current()) {
  emulation::check_aligned(p, sizeof *p, where);
  return *p;
}
inline void store_streaming(uint4* p, uint4 v, emulation::Location where = std::source_location::current()) {
  emulation::check_aligned(p, sizeof *p, where);
  *p = v;
}

#endif

/// To the type in which kernels compute, exact.
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }

/// And back: to nearest, ties to even.
template <class T>
__device__ __forceinline__ T narrow(acc_t<T> v) {
  if constexpr (sizeof(T) == 2)
    return rounded(v, T{});
  else
    return v;
}

}  // namespace moeyard::cuda
