// What one worker does with some rows of one expert.
#pragma once
#include <cstdint>

#include "expert_ffn/expert_ffn.hpp"

namespace moeyard::cpu {

/// Rows [begin, end) of one expert.
struct Segment {
  int64_t expert, begin, end;
};

/// Numbers of scratch that a worker needs for `rows` rows at once.
int64_t forward_scratch(const ExpertFfn& problem, int64_t rows);
int64_t backward_scratch(const ExpertFfn& problem, int64_t rows);

void forward_segment(const ExpertFfn& problem, const Segment& segment, float* y, float* hidden, float* scratch);

/// `out.up` and `out.down` are those of this expert (or sums of a part of its rows); `add`: added to.
void backward_segment(const ExpertFfn& problem, const Segment& segment, const float* grad, const float* hidden,
                      const ExpertFfnGradients& out, bool add, float* scratch);

}  // namespace moeyard::cpu
