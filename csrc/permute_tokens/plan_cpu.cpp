// The plan is a stable counting sort of slots by expert. The slots are cut into strips with a table of counters each;
// once a prefix sum over (expert, strip) has turned counts into first rows, every strip knows where its slots go.
// The strips depend on sizes alone.
#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>
#include <type_traits>

#include "common/buffer.hpp"
#include "common/check.hpp"
#include "common/find_first.hpp"
#include "common/parallel.hpp"
#include "common/simd.hpp"
#include "permute_tokens/permute_tokens.hpp"

namespace moeyard::cpu {
namespace {

// ---- kernel -----------------------------------------------------------------------------------------------------

constexpr int64_t kTogether = 4;  // strips per task

// Enough slots per strip that clearing and scanning its counters stays a fraction of the work.
int64_t strip_length(int64_t slots, int64_t num_experts) {
  constexpr int64_t kLeast = 1 << 13, kMostStrips = 256;
  return std::max({kLeast, 4 * num_experts, (slots + kMostStrips - 1) / kMostStrips});
}

int64_t strip_count(int64_t slots, int64_t num_experts) {
  const int64_t length = strip_length(slots, num_experts);
  return std::max<int64_t>(1, (slots + length - 1) / length);
}

// Counters are indexed by id + 1: the unrouted, id -1, have one too, and no loop below needs a branch for them. They
// are unsigned because a place, first row + rank, may pass 2^31 where capacity drops most of an expert's slots.
struct Work {
  int64_t slots, length, strips, width;  // width: num_experts + 1
  uint32_t* next;                        // [strips, width] counts, then where the strip's next slot of an expert goes
  uint32_t* routed;                      // [width] slots that chose the expert
  uint32_t* limit;                       // [width] the end of the expert's kept rows, 0 for the unrouted
  uint32_t* first;                       // [width] the first place of the expert's slots, in rows or in `sorted`
  int32_t* sorted;                       // [slots] slots by expert, the unrouted first; by weight only
};

struct OutsideRange {
  template <Simd, class Id>
  static MOEYARD_INLINE bool run(const Id* ids, int64_t n, int64_t num_experts) {
    using Unsigned = std::make_unsigned_t<Id>;
    Unsigned outside = 0;
    for (int64_t i = 0; i < n; ++i) outside |= Unsigned(Unsigned(ids[i]) + 1) > Unsigned(num_experts);
    return outside != 0;
  }
};

// Calls visit(counters of the strip, slot) for the slots of one task: in slot order within a strip, and the strips one
// after the other or in turn. In turn, the counter of a slot need not wait for that of the slot before; but where
// slots are also placed, four times as many streams of writes cost more than that saves.
template <class Visit>
void walk(const Work& w, int64_t begin, int64_t end, bool in_turn, Visit&& visit) {
  constexpr int64_t kUnrolled = 8;  // by hand: so little is done per slot that the loop itself counts
  uint32_t* next = w.next + begin / w.length * w.width;
  int64_t i = 0;
  if (in_turn && end - begin > (kTogether - 1) * w.length)
    for (const int64_t shortest = end - begin - (kTogether - 1) * w.length; i < shortest; ++i)
      for (int64_t p = 0; p < kTogether; ++p) visit(next + p * w.width, begin + p * w.length + i);
  for (; begin < end; begin += w.length, next += w.width) {
    int64_t s = begin + i;
    const int64_t last = std::min(end, begin + w.length);
    for (; s + kUnrolled <= last; s += kUnrolled)
      for (int64_t j = 0; j < kUnrolled; ++j) visit(next, s + j);
    for (; s < last; ++s) visit(next, s);
  }
}

template <class Body>
void for_tasks(const Work& w, int threads, Body&& body) {
  parallel_for(w.slots, kTogether * w.length, threads, body);
}

// Counts every strip's slots per expert; false if an id is out of range.
template <class Id>
bool count(const PlanRequest& q, const Work& w, const Id* experts, int threads) {
  std::fill(w.next, w.next + w.strips * w.width, 0u);
  std::atomic<bool> valid{true};
  for_tasks(w, threads, [&](int64_t begin, int64_t end) {
    if (run_on_level<OutsideRange>(experts + begin, end - begin, q.num_experts))
      valid = false;
    else
      walk(w, begin, end, true, [&](uint32_t* next, int64_t s) { ++next[experts[s] + 1]; });
  });
  return valid;
}

// Counts become ranks within the expert, and their totals `routed`.
void rank_strips(const Work& w) {
  std::fill(w.routed, w.routed + w.width, 0u);
  for (int64_t p = 0; p < w.strips; ++p) {
    uint32_t* next = w.next + p * w.width;
    for (int64_t e = 0; e < w.width; ++e) {
      const uint32_t here = next[e];
      next[e] = w.routed[e];
      w.routed[e] += here;
    }
  }
}

// Ranks become places.
void start_at_first(const Work& w) {
  for (int64_t p = 0; p < w.strips; ++p)
    for (int64_t e = 0; e < w.width; ++e) w.next[p * w.width + e] += w.first[e];
}

int64_t ceil_align(int64_t n, int64_t align) { return align == 1 ? n : (n + align - 1) / align * align; }

void mark_free(const PlanArrays& out, int64_t begin, int64_t end) {
  if (begin < end) std::fill(out.slot_of_row + begin, out.slot_of_row + end, -1);
}

// Totals become counts, offsets, first rows and limits; marks padding and tail rows.
void lay_out(const PlanRequest& q, const Work& w, const PlanArrays& out) {
  int64_t end = 0, dropped = 0;
  w.first[0] = w.limit[0] = 0;
  for (int64_t e = 0; e < q.num_experts; ++e) {
    const int64_t routed = w.routed[e + 1], kept = std::min(routed, q.capacity), begin = end;
    end += ceil_align(kept, q.align);
    dropped += routed - kept;
    out.counts[e] = int32_t(kept);
    out.offsets[e] = int32_t(end);
    w.first[e + 1] = uint32_t(begin);
    w.limit[e + 1] = uint32_t(begin + kept);
    mark_free(out, begin + kept, end);
  }
  mark_free(out, end, q.rows);
  *out.dropped = int32_t(dropped);
}

template <class Id>
void place_by_position(const Work& w, const PlanArrays& out, const Id* experts, int threads) {
  start_at_first(w);
  const bool all_kept = *out.dropped == 0 && w.routed[0] == 0;
  for_tasks(w, threads, [&](int64_t begin, int64_t end) {
    // Copies that no store can alias, so that they stay in registers.
    int32_t *const row_of_slot = out.row_of_slot, *const slot_of_row = out.slot_of_row;
    const uint32_t* const limit = w.limit;
    const Id* const ids = experts;
    if (all_kept)
      return walk(w, begin, end, false, [=](uint32_t* next, int64_t s) {
        const uint32_t row = next[ids[s] + 1]++;
        row_of_slot[s] = int32_t(row);
        slot_of_row[row] = int32_t(s);
      });
    // Which slots have a row cannot be predicted, so there is no branch: the others write theirs where nobody reads it.
    int32_t nowhere;
    int32_t* const target[] = {&nowhere, slot_of_row};
    walk(w, begin, end, false, [=](uint32_t* next, int64_t s) {
      const int64_t e = ids[s] + 1;
      const uint32_t row = next[e]++, kept = row < limit[e], mask = 0u - kept;
      row_of_slot[s] = int32_t(row | ~mask);
      target[kept][row & mask] = int32_t(s);
    });
  });
}

// Unsigned keys in the order of the weights: NaN is lightest, and the two zeros are equal.
inline uint32_t weight_key(float w) {
  if (w != w) return 0;
  const uint32_t u = std::bit_cast<uint32_t>(w + 0.0f);
  return u ^ (u >> 31 ? ~0u : 1u << 31);
}
inline uint64_t weight_key(double w) {
  if (w != w) return 0;
  const uint64_t u = std::bit_cast<uint64_t>(w + 0.0);
  return u ^ (u >> 63 ? ~uint64_t{} : uint64_t{1} << 63);
}

template <class W>
using Key = decltype(weight_key(W{}));

// The slots to keep: all with a key above `least`, and the first `ties` with that key.
template <class W>
struct Threshold {
  Key<W> least;
  int64_t ties;
};

// Finds the threshold of the `kept` heaviest by their digits, the highest first: one pass over the slots per byte, and
// none that depends on the order of the weights.
template <class W>
Threshold<W> find_threshold(const W* weights, const int32_t* slots, int64_t n, int64_t kept) {
  constexpr int kDigit = 8, kBins = 1 << kDigit;
  Key<W> least = 0, known = 0;
  for (int shift = 8 * sizeof(W) - kDigit; shift >= 0; shift -= kDigit) {
    int64_t bins[kBins + 1] = {};  // one more for the keys that differ in the digits before
    for (int64_t i = 0; i < n; ++i) {
      const Key<W> key = weight_key(weights[slots[i]]);
      ++bins[(key & known) == least ? int(key >> shift & (kBins - 1)) : kBins];
    }
    int digit = kBins - 1;
    for (; kept > bins[digit]; --digit) kept -= bins[digit];
    least |= Key<W>(digit) << shift;
    known |= Key<W>(kBins - 1) << shift;
    if (kept == bins[digit]) return {least, std::numeric_limits<int64_t>::max()};
  }
  return {least, kept};
}

template <class W>
void place_heaviest(const PlanRequest& q, const Work& w, const PlanArrays& out, int64_t e, const int32_t* slots) {
  const W* weights = static_cast<const W*>(q.weights);
  const int64_t n = w.routed[e + 1], kept = out.counts[e];
  int64_t row = w.limit[e + 1] - kept;
  Threshold<W> keep = kept == n ? Threshold<W>{0, n} : find_threshold(weights, slots, n, kept);
  for (int64_t i = 0; i < n; ++i) {
    const Key<W> key = weight_key(weights[slots[i]]);
    if (key > keep.least || (key == keep.least && keep.ties-- > 0)) {
      out.slot_of_row[row] = slots[i];
      out.row_of_slot[slots[i]] = int32_t(row++);
    } else {
      out.row_of_slot[slots[i]] = -1;
    }
  }
}

// Lists every expert's slots in order, then keeps the heaviest of each list.
template <class Id>
void place_by_weight(const PlanRequest& q, const Work& w, const PlanArrays& out, const Id* experts, int threads) {
  for (int64_t e = 0, start = 0; e < w.width; start += w.routed[e++]) w.first[e] = uint32_t(start);
  start_at_first(w);
  for_tasks(w, threads, [&](int64_t begin, int64_t end) {
    int32_t* const sorted = w.sorted;
    const Id* const ids = experts;
    walk(w, begin, end, false, [=](uint32_t* next, int64_t s) { sorted[next[ids[s] + 1]++] = int32_t(s); });
  });
  for (uint32_t i = 0; i < w.routed[0]; ++i) out.row_of_slot[w.sorted[i]] = -1;
  parallel_for(q.num_experts, 1, threads, [&](int64_t e, int64_t) {
    const int32_t* slots = w.sorted + w.first[e + 1];
    q.wide_weights ? place_heaviest<double>(q, w, out, e, slots) : place_heaviest<float>(q, w, out, e, slots);
  });
}

// ---- launcher ---------------------------------------------------------------------------------------------------

template <class Id>
void plan(const PlanRequest& q, const Work& w, const PlanArrays& out, const Id* experts, int threads) {
  if (!count(q, w, experts, threads)) {
    const int64_t bad = find_first(w.slots, threads,
                                   [&](int64_t s) { return experts[s] < -1 || int64_t(experts[s]) >= q.num_experts; });
    fail_value("experts: expected ids in [-1, ", q.num_experts, "), got ", experts[bad], " at row ", bad / q.k,
               ", slot ", bad % q.k);
  }
  rank_strips(w);
  lay_out(q, w, out);
  if (q.weights && *out.dropped > 0)
    place_by_weight(q, w, out, experts, threads);
  else
    place_by_position(w, out, experts, threads);
}

}  // namespace

void plan_permutation(const PlanRequest& q, const PlanArrays& out, int threads) {
  const int64_t slots = q.tokens * q.k, width = q.num_experts + 1;
  const int64_t length = strip_length(slots, q.num_experts), strips = strip_count(slots, q.num_experts);
  Buffer<uint32_t> tables((strips + 3) * width);
  Buffer<int32_t> sorted(q.weights ? slots : 0);
  uint32_t* const routed = tables.data() + strips * width;
  const Work work{slots,        length, strips, width, tables.data(), routed, routed + width, routed + 2 * width,
                  sorted.data()};
  if (q.experts.wide)
    plan(q, work, out, static_cast<const int64_t*>(q.experts.data), threads);
  else
    plan(q, work, out, static_cast<const int32_t*>(q.experts.data), threads);
}

}  // namespace moeyard::cpu
