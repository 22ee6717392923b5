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
/// The same, or zeros without a look at the address. No branch, so that several such loads are on their way together.
__device__ __forceinline__ uint4 load_streaming_if(bool wanted, const uint4* p) {
  uint4 v;
  asm volatile(
      "{\n"
      "  .reg .pred wanted;\n"
      "  setp.ne.u32 wanted, %5, 0;\n"
      "  mov.u32 %0, 0;\n"
      "  mov.u32 %1, 0;\n"
      "  mov.u32 %2, 0;\n"
      "  mov.u32 %3, 0;\n"
      "  @wanted ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(p), "r"(uint32_t(wanted)));
  return v;
}
/// 16 bytes that nobody reads soon.
__device__ __forceinline__ void store_streaming(uint4* p, uint4 v) { __stcs(p, v); }
/// max(a + b, c), the sum modulo 2^32: one instruction from sm_90 on.
__device__ __forceinline__ unsigned add_max(unsigned a, unsigned b, unsigned c) { return __viaddmax_u32(a, b, c); }

#else

inline float widen(bf16 v) { return to_float(v); }
inline float widen(f16 v) { return to_float(v); }
inline bf16 rounded(float v, bf16) { return from_float<bf16>(v); }
inline f16 rounded(float v, f16) { return from_float<f16>(v); }

inline uint4 load_streaming(const uint4* p, emulation::Location where = std::source_location::current()) {
  emulation::check_aligned(p, sizeof *p, where);
  return *p;
}
inline uint4 load_streaming_if(bool wanted, const uint4* p,
                               emulation::Location where = std::source_location::current()) {
  return wanted ? load_streaming(p, where) : uint4{};
}
inline void store_streaming(uint4* p, uint4 v, emulation::Location where = std::source_location::current()) {
  emulation::check_aligned(p, sizeof *p, where);
  *p = v;
}
inline unsigned add_max(unsigned a, unsigned b, unsigned c) { return max(a + b, c); }

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
