// The plan is a stable counting sort of slots by expert: histograms per piece, a prefix sum over (expert, piece), and
// a second pass in which every piece knows where its slots go. The pieces depend on sizes alone.
#include <algorithm>
#include <cmath>

#include "common/check.hpp"
#include "common/find_first.hpp"
#include "common/parallel.hpp"
#include "permute_tokens/permute_tokens.hpp"

namespace moeyard::cpu {
namespace {

// ---- kernel -----------------------------------------------------------------------------------------------------

int64_t ceil_align(int64_t n, int64_t align) { return (n + align - 1) / align * align; }

// Enough slots per piece that clearing and scanning its histogram stays a fraction of the work.
int64_t piece_length(int64_t slots, int64_t num_experts) {
  constexpr int64_t kLeast = 1 << 16, kMostPieces = 64;
  return std::max({kLeast, 4 * num_experts, (slots + kMostPieces - 1) / kMostPieces});
}

int64_t piece_count(int64_t slots, int64_t num_experts) {
  const int64_t length = piece_length(slots, num_experts);
  return std::max<int64_t>(1, (slots + length - 1) / length);
}

struct Work {
  int64_t slots, length, pieces;
  int32_t* rank;    // [pieces, num_experts]: first a histogram, then the next rank within the expert
  int32_t* start;   // [num_experts] first place of an expert in `sorted`; by weight only
  int32_t* sorted;  // [slots] slots by expert, dropped ones included; by weight only
};

void count_pieces(const PlanRequest& q, const Work& w, int threads) {
  std::fill(w.rank, w.rank + w.pieces * q.num_experts, 0);
  parallel_for(w.slots, w.length, threads, [&](int64_t begin, int64_t end) {
    int32_t* rank = w.rank + begin / w.length * q.num_experts;
    for (int64_t s = begin; s < end; ++s)
      if (const int64_t e = q.experts[s]; e >= 0) ++rank[e];
  });
}

// Turns histograms into ranks, and totals into counts and offsets; marks padding and tail rows.
void lay_out(const PlanRequest& q, const Work& w, const PlanArrays& out) {
  int64_t end = 0, first = 0, dropped = 0;
  for (int64_t e = 0; e < q.num_experts; ++e) {
    int64_t routed = 0;
    for (int64_t p = 0; p < w.pieces; ++p) {
      int32_t& rank = w.rank[p * q.num_experts + e];
      const int32_t here = rank;
      rank = int32_t(routed);
      routed += here;
    }
    if (q.weights) w.start[e] = int32_t(first);
    first += routed;
    const int64_t kept = std::min(routed, q.capacity), begin = end;
    end += ceil_align(kept, q.align);
    dropped += routed - kept;
    out.counts[e] = int32_t(kept);
    out.offsets[e] = int32_t(end);
    std::fill(out.slot_of_row + begin + kept, out.slot_of_row + end, -1);
  }
  std::fill(out.slot_of_row + end, out.slot_of_row + q.rows, -1);
  *out.dropped = int32_t(dropped);
}

int64_t first_row(const PlanRequest& q, const PlanArrays& out, int64_t e) {
  return out.offsets[e] - ceil_align(out.counts[e], q.align);
}

void place(const PlanRequest& q, const PlanArrays& out, int64_t slot, int64_t e, int64_t rank) {
  const int64_t row = first_row(q, out, e) + rank;
  out.row_of_slot[slot] = int32_t(row);
  out.slot_of_row[row] = int32_t(slot);
}

// Places by position, or lists every slot of an expert in `sorted` for place_heaviest.
void place_pieces(const PlanRequest& q, const Work& w, const PlanArrays& out, int threads) {
  parallel_for(w.slots, w.length, threads, [&](int64_t begin, int64_t end) {
    int32_t* next = w.rank + begin / w.length * q.num_experts;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t e = q.experts[s];
      out.row_of_slot[s] = -1;
      if (e < 0) continue;
      const int32_t rank = next[e]++;
      if (q.weights)
        w.sorted[w.start[e] + rank] = int32_t(s);
      else if (rank < out.counts[e])
        place(q, out, s, e, rank);
    }
  });
}

// A strict total order, so that the selection is unique: heavier first, NaN last, then by position.
template <class W>
struct Heavier {
  const W* weights;
  bool operator()(int32_t a, int32_t b) const {
    const W wa = weights[a], wb = weights[b];
    const bool nan_a = std::isnan(wa), nan_b = std::isnan(wb);
    if (nan_a != nan_b) return nan_b;
    if (!nan_a && wa != wb) return wa > wb;
    return a < b;
  }
};

template <class W>
void place_heaviest(const PlanRequest& q, const Work& w, const PlanArrays& out, int threads) {
  const Heavier<W> heavier{static_cast<const W*>(q.weights)};
  parallel_for(q.num_experts, 1, threads, [&](int64_t e, int64_t) {
    int32_t* begin = w.sorted + w.start[e];
    // The last piece's next rank is the number of slots that chose e.
    int32_t* end = begin + w.rank[(w.pieces - 1) * q.num_experts + e];
    int32_t* kept = begin + out.counts[e];
    if (kept != end) {
      std::nth_element(begin, kept, end, heavier);
      std::sort(begin, kept);
    }
    for (int32_t* slot = begin; slot != kept; ++slot) place(q, out, *slot, e, slot - begin);
  });
}

}  // namespace

// ---- launcher ---------------------------------------------------------------------------------------------------

int64_t plan_permutation_workspace(int64_t slots, int64_t num_experts, bool by_weight) {
  return piece_count(slots, num_experts) * num_experts + (by_weight ? num_experts + slots : 0);
}

void plan_permutation(const PlanRequest& q, const PlanArrays& out, int32_t* workspace, int threads) {
  const int64_t slots = q.tokens * q.k;
  const int64_t bad = find_first(slots, threads, [&](int64_t s) {
    const int64_t e = q.experts[s];
    return e < -1 || e >= q.num_experts;
  });
  if (bad < slots)
    fail_value("experts: expected ids in [-1, ", q.num_experts, "), got ", q.experts[bad], " at row ", bad / q.k,
               ", slot ", bad % q.k);
  const int64_t length = piece_length(slots, q.num_experts), pieces = piece_count(slots, q.num_experts);
  int32_t* start = workspace + pieces * q.num_experts;
  const Work work{slots, length, pieces, workspace, start, start + q.num_experts};
  count_pieces(q, work, threads);
  lay_out(q, work, out);
  place_pieces(q, work, out, threads);
  if (!q.weights) return;
  if (q.wide_weights)
    place_heaviest<double>(q, work, out, threads);
  else
    place_heaviest<float>(q, work, out, threads);
}

}  // namespace moeyard::cpu
