// Choosing the best of a row. A key is NaN for an index that must not be chosen, -inf for one that may only fill up
// when nothing better is left, and any other number for a candidate. Order: key descending, then index ascending;
// so fill-ups come last, lowest index first. -0 and +0 are equal.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <limits>

namespace moeyard::cpu {
namespace {

// Up to here a sorted list kept by insertion beats sorting.
constexpr int64_t kInsertionLimit = 32;

template <class A>
void select_by_insertion(const A* key, int64_t n, int64_t m, int32_t* ids) {
  A best[kInsertionLimit];
  int64_t have = 0;
  for (int64_t i = 0; i < n; ++i) {
    // Once the list is full most keys are too low: these are passed over as vectors.
    if (constexpr int64_t step = 32; have == m && i % step == 0 && i + step <= n) {
      int any = 0;
      for (int64_t j = i; j < i + step; ++j) any |= key[j] > best[m - 1];
      if (!any) {
        i += step - 1;
        continue;
      }
    }
    const A v = key[i];
    // A later index loses a tie, hence >; NaN fails both comparisons.
    if (!(have < m ? v == v : v > best[m - 1])) continue;
    int64_t place = have < m ? have++ : m - 1;
    for (; place > 0 && v > best[place - 1]; --place) best[place] = best[place - 1], ids[place] = ids[place - 1];
    best[place] = v, ids[place] = int32_t(i);
  }
}

// Keys with their ids in one number, in ascending order from the best.
inline uint64_t packed(float key, int64_t id) {
  const uint32_t bits = std::bit_cast<uint32_t>(key + 0.0f);  // -0 becomes +0
  const uint32_t descending = bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
  return uint64_t(descending) << 32 | uint64_t(id);
}

/// Writes the ids of the best m of n keys in order; at least m keys must not be NaN. `order` is scratch for n numbers.
template <class A>
void select_top(const A* key, int64_t n, int64_t m, int32_t* ids, uint64_t* order) {
  if (m <= 0) return;
  if (m <= kInsertionLimit) return select_by_insertion(key, n, m, ids);
  const auto sort = [&](auto better, auto entry) {
    uint64_t* end = order;
    for (int64_t i = 0; i < n; ++i)
      if (key[i] == key[i]) *end++ = entry(i);
    if (order + m < end) std::nth_element(order, order + m, end, better);
    std::sort(order, order + m, better);
    for (int64_t i = 0; i < m; ++i) ids[i] = int32_t(order[i]);
  };
  if constexpr (sizeof(A) == 4)
    sort(std::less<>(), [key](int64_t i) { return packed(key[i], i); });
  else
    sort([key](uint64_t a, uint64_t b) { return key[a] > key[b] || (key[a] == key[b] && a < b); },
         [](int64_t i) { return uint64_t(i); });
}

/// Group-limited selection (DeepSeek-V3, arXiv:2412.19437, section 2.1.2): a group's value is the sum of its best
/// `best_of` candidates, added in descending order; keys outside the best `topk_groups` groups become NaN.
/// Scratch: group_key[num_groups], ids[n], order[n].
template <class A>
void limit_to_groups(A* key, int64_t n, int64_t num_groups, int64_t topk_groups, int64_t best_of, A* group_key,
                     int32_t* ids, uint64_t* order) {
  using Limits = std::numeric_limits<A>;
  const int64_t size = n / num_groups;
  for (int64_t g = 0; g < num_groups; ++g) {
    const A* member = key + g * size;
    select_top(member, size, best_of, ids, order);
    A sum = 0;
    for (int64_t i = 0; i < best_of && member[ids[i]] > -Limits::infinity(); ++i) sum += member[ids[i]];
    // A group without a candidate ranks below every other, even below one whose sum overflows.
    const bool empty = !(member[ids[0]] > -Limits::infinity());
    group_key[g] = empty ? -Limits::infinity() : std::max(sum, Limits::lowest());
  }
  select_top(group_key, num_groups, topk_groups, ids, order);
  for (int64_t i = 0; i < topk_groups; ++i) group_key[ids[i]] = Limits::quiet_NaN();
  for (int64_t g = 0; g < num_groups; ++g)
    if (group_key[g] == group_key[g]) std::fill(key + g * size, key + (g + 1) * size, Limits::quiet_NaN());
}

}  // namespace
}  // namespace moeyard::cpu
