// MOEYARD_HD: a small function that both devices run.
#pragma once

#ifdef __CUDACC__
#define MOEYARD_HD __host__ __device__ __forceinline__
#else
#include "common/simd.hpp"
#define MOEYARD_HD MOEYARD_INLINE
#endif
