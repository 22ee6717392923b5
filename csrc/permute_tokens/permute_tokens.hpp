// permute_tokens: moves the rows of tokens to the experts that they are routed to, and back.
//
// A slot is one (token, choice) pair, numbered token * k + choice. A plan gives every kept slot one row: rows of one
// expert lie together in slot order, each expert's block is padded to a multiple of `align`, and rows past the last
// block are the tail. Padding and tail rows belong to no slot.
//
// Permute and unpermute are dual: with P the 0/1 (or weighted) matrix from tokens to rows, one is P x, the other P^T y.
// So each is the other's gradient, and two kernels, each with an optional dot product per slot, do all four passes.
#pragma once
#include <cstdint>

#include "common/dtype.hpp"
#include "common/int_view.hpp"

namespace moeyard {

/// What to plan. All sizes are static, and rows is an upper bound of what the plan fills (see plan_rows in Python).
struct PlanRequest {
  IntView experts;                ///< [tokens, k], ids in [-1, num_experts)
  int64_t tokens, k;              ///< tokens * k <= 2^31 - 1
  int64_t num_experts;            ///< at least 1
  int64_t capacity;               ///< rows per expert; tokens * k or more: no limit
  int64_t align;                  ///< at least 1
  int64_t rows;                   ///< length of slot_of_row, at most 2^31 - 1
  const void* weights = nullptr;  ///< [tokens, k] to drop the lightest, null to drop the latest
  bool wide_weights = false;      ///< weights are float64, else float32
};

/// Where the plan goes: [tokens, k], [rows], [num_experts], [num_experts] (END offsets, padding included), [1].
struct PlanArrays {
  int32_t *row_of_slot, *slot_of_row, *counts, *offsets, *dropped;
};

/// A finished plan as the data kernels read it.
struct Plan {
  const int32_t* row_of_slot;  ///< [tokens, k], -1: no row
  const int32_t* slot_of_row;  ///< [rows], -1: padding or tail
  int64_t tokens, k, rows;
};

namespace cpu {

/// Throws for an id outside [-1, num_experts).
void plan_permutation(const PlanRequest& request, const PlanArrays& out, int threads);

/// Throws unless both maps stay in range and are each other's inverse: then no kernel can read or write out of bounds,
/// write a row twice or leave one unwritten. The kernels below begin with it.
void check_plan(const Plan& plan, int threads);

/// out[row] = x[token], zeros for padding and tail rows; rows of `row_bytes` bytes of any type.
void permute_rows(const void* x, const Plan& plan, int64_t row_bytes, void* out, int threads);

/// out[row] = weights[slot] * x[token], zeros for padding and tail rows; dots[slot] = <x[token], y[row]>, 0 for a slot
/// without a row. weights, y and dots are null where not asked for, and so is out. dtype is a float type; weights and
/// dots have its accumulation type.
void permute_weighted(const void* x, const void* weights, const void* y, const Plan& plan, int64_t features,
                      DType dtype, void* out, void* dots, int threads);

/// out[token] = sum over its slots, in slot order, of weights[slot] * y[row]; dots as above. Without weights dtype may
/// also be i32 or i64 (sums wrap around).
void unpermute_rows(const void* y, const void* weights, const void* x, const Plan& plan, int64_t features, DType dtype,
                    void* out, void* dots, int threads);

}  // namespace cpu

// The same on `device`, enqueued on `stream`; they return without waiting. What the CPU throws for, a kernel can only
// report: it sets a bit of `errors` (common/device_errors.hpp), treats the bad entry as -1 and goes on.
namespace cuda {

/// Bytes that plan_permutation wants as `workspace`, aligned to 16. They depend on sizes alone.
int64_t plan_permutation_workspace(const PlanRequest& request);

/// An id outside [-1, num_experts) is not routed (kBadExpertId).
void plan_permutation(const PlanRequest& request, const PlanArrays& out, void* workspace, unsigned* errors, int device,
                      void* stream);

// An entry of either map that is out of range counts as -1 (kBadPlan), so that nothing is read or written out of
// bounds. That the maps are each other's inverse is not checked: it would cost a dependent look-up at random per slot,
// and where they are not, rows hold stale or mixed values but stay rows.

void permute_rows(const void* x, const Plan& plan, int64_t row_bytes, void* out, unsigned* errors, int device,
                  void* stream);

void permute_weighted(const void* x, const void* weights, const void* y, const Plan& plan, int64_t features,
                      DType dtype, void* out, void* dots, unsigned* errors, int device, void* stream);

void unpermute_rows(const void* y, const void* weights, const void* x, const Plan& plan, int64_t features, DType dtype,
                    void* out, void* dots, unsigned* errors, int device, void* stream);

}  // namespace cuda
}  // namespace moeyard
