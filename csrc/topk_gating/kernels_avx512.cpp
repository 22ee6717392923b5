// topk_gating for AVX-512.
#include "topk_gating/level_prelude.hpp"

#ifdef MOEYARD_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,bmi,bmi2,lzcnt,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,bmi,bmi2,lzcnt,popcnt")
#endif
#include "topk_gating/level_kernels.hpp"

const moeyard::cpu::GatingKernels moeyard::cpu::kGatingAvx512 = moeyard::cpu::level_kernels<moeyard::Simd::avx512>();

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
