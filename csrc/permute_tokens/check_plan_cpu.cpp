#include <algorithm>
#include <atomic>

#include "common/check.hpp"
#include "common/find_first.hpp"
#include "common/parallel.hpp"
#include "permute_tokens/permute_tokens.hpp"

namespace moeyard::cpu {
namespace {

// If every row of a slot names that slot, no two slots share a row; and if there are as many rows with a slot as slots
// with a row, no other row has one. So one pass of look-ups and one of counting are enough.
bool consistent(const Plan& plan, int threads) {
  constexpr int64_t kGrain = 1 << 15;
  std::atomic<int64_t> surplus{0};
  std::atomic<bool> inverse{true};
  parallel_for(plan.tokens * plan.k, kGrain, threads, [&](int64_t begin, int64_t end) {
    int64_t kept = 0;
    bool good = true;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t r = plan.row_of_slot[s];
      if (r == -1) continue;
      ++kept;
      good &= r >= 0 && r < plan.rows && plan.slot_of_row[r] == s;
    }
    surplus += kept;
    if (!good) inverse = false;
  });
  parallel_for(plan.rows, kGrain, threads, [&](int64_t begin, int64_t end) {
    surplus -= end - begin - std::count(plan.slot_of_row + begin, plan.slot_of_row + end, -1);
  });
  return inverse && surplus == 0;
}

}  // namespace

void check_plan(const Plan& plan, int threads) {
  if (consistent(plan, threads)) return;
  const int64_t slots = plan.tokens * plan.k;
  const int64_t bad_slot = find_first(slots, threads, [&](int64_t s) {
    const int32_t r = plan.row_of_slot[s];
    return r != -1 && (r < 0 || r >= plan.rows || plan.slot_of_row[r] != s);
  });
  if (bad_slot < slots) {
    const int32_t r = plan.row_of_slot[bad_slot];
    if (r < -1 || r >= plan.rows)
      fail_value("plan.row_of_slot: expected rows in [-1, ", plan.rows, "), got ", r, " at token ", bad_slot / plan.k,
                 ", slot ", bad_slot % plan.k);
    fail_value("plan: expected slot_of_row to be the inverse of row_of_slot, got row_of_slot[", bad_slot / plan.k, ", ",
               bad_slot % plan.k, "] = ", r, ", but slot_of_row[", r, "] = ", plan.slot_of_row[r]);
  }
  const int64_t bad_row = find_first(plan.rows, threads, [&](int64_t r) {
    const int32_t s = plan.slot_of_row[r];
    return s != -1 && (s < 0 || s >= slots || plan.row_of_slot[s] != r);
  });
  const int32_t s = plan.slot_of_row[bad_row];
  if (s < -1 || s >= slots)
    fail_value("plan.slot_of_row: expected slots in [-1, ", slots, "), got ", s, " at row ", bad_row);
  fail_value("plan: expected row_of_slot to be the inverse of slot_of_row, got slot_of_row[", bad_row, "] = ", s,
             ", but row_of_slot has ", plan.row_of_slot[s], " there");
}

}  // namespace moeyard::cpu
