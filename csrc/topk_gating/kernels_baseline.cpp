// topk_gating for the baseline.
#include "topk_gating/level_prelude.hpp"

#include "topk_gating/level_kernels.hpp"

const moeyard::cpu::GatingKernels moeyard::cpu::kGatingBaseline =
    moeyard::cpu::level_kernels<moeyard::Simd::baseline>();
