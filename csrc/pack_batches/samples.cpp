#include "pack_batches/samples.hpp"

#include <algorithm>

#include "common/check.hpp"

namespace moeyard::cpu {
namespace {

constexpr uint32_t kNone = 0xffffffffu;
// 12 MB of tables.
constexpr uint64_t kDenseRange = 1 << 20;

// Calls body with the elements' typed address: one loop for each type.
template <class Body>
auto with_ints(IntView view, Body&& body) {
  return view.wide ? body(static_cast<const int64_t*>(view.data)) : body(static_cast<const int32_t*>(view.data));
}

void gather(IntView view, const int64_t* id, int64_t n, int64_t* out) {
  with_ints(view, [&](auto* values) {
    for (int64_t i = 0; i < n; ++i) out[i] = values[id[i]];
  });
}

void check_not_negative(const char* name, IntView sizes, int64_t samples) {
  with_ints(sizes, [&](auto* size) {
    int64_t signs = 0;
    for (int64_t i = 0; i < samples; ++i) signs |= size[i];
    if (signs >= 0) return;
    const auto* bad = std::find_if(size, size + samples, [](auto s) { return s < 0; });
    fail_value(name, ": expected sizes of at least 0, got ", *bad, " for sample ", bad - size);
  });
}

bool any_above(IntView sizes, int64_t samples, int64_t limit) {
  return with_ints(sizes,
                   [&](auto* size) { return std::any_of(size, size + samples, [&](auto s) { return s > limit; }); });
}

// Calls body with the id at every position, in any order; bad ids, which are an error at their positions, are left out.
template <class Body>
void for_each_id(const PackRequest& q, Body&& body) {
  if (q.length ==
      q.samples) {  // all of them, or else there is an error: no need for the order, which costs cache misses
    for (int64_t id = 0; id < q.samples; ++id) body(id);
    return;
  }
  for (int64_t p = 0; p < q.length; ++p)
    if (const int64_t id = id_at(q, p); uint64_t(id) < uint64_t(q.samples)) body(id);
}

}  // namespace

int64_t check_sizes(const PackRequest& q) {
  check_not_negative("sizes", q.sizes, q.samples);
  if (q.sizes2) check_not_negative("sizes2", q.sizes2, q.samples);
  if (q.oversize != Oversize::skip) return 0;
  if (!any_above(q.sizes, q.samples, q.budget) && !(q.sizes2 && any_above(q.sizes2, q.samples, q.budget2))) return 0;
  int64_t n = 0;
  for_each_id(q, [&](int64_t id) { n += oversize(q, q.sizes[id], q.sizes2 ? q.sizes2[id] : 0); });
  return n;
}

uint32_t place_oversize(const PackRequest& q, const Block& block, int64_t i, PackPlan& plan) {
  const int64_t size = block.size[i], size2 = block.size2[i];
  if (q.oversize == Oversize::skip) return kSkipped;
  if (q.oversize == Oversize::own_batch) {
    plan.fill.push_back(size);
    return uint32_t(plan.fill.size() - 1);
  }
  const bool first = size > q.budget;
  fail_value(first ? "sizes" : "sizes2", ": expected every sample within ", first ? "budget" : "budget2", " = ",
             first ? q.budget : q.budget2, ", got sample ", block.id[i], " of size ", first ? size : size2,
             " (oversize=\"own_batch\" and \"skip\" accept it)");
}

// ---- segments ---------------------------------------------------------------------------------------------------

Ranks::Ranks(const PackRequest& q, bool counting) : q_(q), counting_(counting && q.segments) {
  if (!q.segments || q.samples == 0) return;
  with_ints(q.segments, [&](auto* segment) {
    const auto [least, most] = std::minmax_element(segment, segment + q.samples);
    least_ = *least;
    const uint64_t range = uint64_t(int64_t(*most)) - uint64_t(least_);
    dense_ = range < kDenseRange;
    if (dense_) rank_.assign(range + 1, kNone), left_.assign(range + 1, 0);
  });
  if (counting_) count();
}

uint32_t Ranks::place_of(int64_t segment) {
  if (dense_) return uint32_t(segment - least_);
  const auto [entry, is_new] = place_.try_emplace(segment, uint32_t(place_.size()));
  if (is_new) rank_.push_back(kNone), left_.push_back(0);
  return entry->second;
}

void Ranks::count() {
  for_each_id(q_, [&](int64_t id) { segments_ += left_[place_of(q_.segments[id])]++ == 0; });
}

uint8_t Ranks::finished_with(uint32_t rank) const {
  const auto done = [&](size_t r) {
    return r < place_of_rank_.size() ? left_[place_of_rank_[r]] == 0 : r == segments_;  // there is no rank after all
  };
  return uint8_t((done(rank + size_t(1)) ? kThis : 0) | (rank > 0 && done(rank - 1) ? kPrevious : 0));
}

void Ranks::load(Block& block) {
  std::fill_n(block.finished, block.n, uint8_t(0));
  if (!q_.segments) return void(std::fill_n(block.rank, block.n, 0u));
  int64_t last = 0;
  uint32_t place = kNone;
  for (int64_t i = 0; i < block.n; ++i) {
    // Neighbours mostly share a segment, and a hash costs more than this question.
    const int64_t segment = q_.segments[block.id[i]];
    if (place == kNone || segment != last) place = place_of(segment), last = segment;
    if (rank_[place] == kNone) rank_[place] = uint32_t(place_of_rank_.size()), place_of_rank_.push_back(place);
    block.rank[i] = rank_[place];
    if (counting_ && --left_[place] == 0) block.finished[i] = finished_with(block.rank[i]);
  }
}

// ---- samples ----------------------------------------------------------------------------------------------------

// Up to n ids from position_ on, as many as are in range and not repeated.
int64_t Samples::read_ids(int64_t n, int64_t* id) {
  return with_ints(q_.order, [&](auto* order) {
    for (int64_t i = 0; i < n; ++i) {
      id[i] = order[position_ + i];
      if (uint64_t(id[i]) >= uint64_t(q_.samples)) return i;
      uint8_t& bits = seen_[id[i] >> 3];
      const uint8_t bit = uint8_t(1u << (id[i] & 7));
      if (bits & bit) return i;
      bits |= bit;
    }
    return n;
  });
}

void Samples::next(Block& block) {
  block.first = position_;
  block.n = std::min<int64_t>(kBlock, q_.length - position_);
  if (block.n == 0) return;
  if (q_.order) {
    block.n = read_ids(block.n, block.id);
    const int64_t id = block.id[0];
    if (block.n == 0 && uint64_t(id) >= uint64_t(q_.samples))
      fail_value("order: expected sample ids in [0, ", q_.samples, "), got ", id, " at position ", position_);
    if (block.n == 0) fail_value("order: expected distinct sample ids, got ", id, " again at position ", position_);
  } else {
    for (int64_t i = 0; i < block.n; ++i) block.id[i] = position_ + i;
  }
  gather(q_.sizes, block.id, block.n, block.size);
  if (q_.sizes2)
    gather(q_.sizes2, block.id, block.n, block.size2);
  else
    std::fill_n(block.size2, block.n, 0);
  ranks_.load(block);
  position_ += block.n;
}

}  // namespace moeyard::cpu
