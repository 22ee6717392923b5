#include <algorithm>
#include <set>
#include <unordered_map>

#include "common/check.hpp"
#include "pack_batches/pack_batches.hpp"

namespace moeyard::cpu {
namespace {

// ---- kernel -----------------------------------------------------------------------------------------------------

struct Sample {
  int64_t size, size2, rank;
};

struct Batch {
  int64_t room, number;  // number: in the order of opening
  int64_t room2, count, rank;

  bool takes(const Sample& s, int64_t max_samples) const {
    return s.size <= room && s.size2 <= room2 && count < max_samples && (s.rank == rank || s.rank == rank + 1);
  }
  void put(const Sample& s) { room -= s.size, room2 -= s.size2, ++count; }
};

Batch open_batch(const PackRequest& q, int64_t number, const Sample& s) {
  return {q.budget, number, q.sizes2 ? q.budget2 : 0, 0, s.rank};
}

// One open batch, closed by the first sample that does not fit.
class NextFit {
 public:
  explicit NextFit(const PackRequest& q) : q_(q) {}

  int64_t place(const Sample& s) {
    if (!is_open_ || !open_.takes(s, q_.max_samples)) open_ = open_batch(q_, batches_++, s), is_open_ = true;
    open_.put(s);
    return open_.number;
  }
  int64_t place_alone() {
    is_open_ = false;
    return batches_++;
  }
  int64_t batches() const { return batches_; }

 private:
  const PackRequest& q_;
  Batch open_{};
  bool is_open_ = false;
  int64_t batches_ = 0;
};

// Bounded-space best fit (Csirik & Johnson, "Bounded space on-line bin packing: best is better than first",
// Algorithmica 31, 2001): at most `lookahead` open batches, ordered by (room, number). The first one with enough room
// is the best fit, the very first is the fullest; both with ties to the earliest opened.
class BestFit {
 public:
  explicit BestFit(const PackRequest& q) : q_(q) {}

  int64_t place(const Sample& s) {
    auto best = open_.lower_bound(Batch{s.size, -1, 0, 0, 0});
    while (best != open_.end() && !best->takes(s, q_.max_samples)) ++best;
    Open::node_type node;
    if (best != open_.end()) {
      node = open_.extract(best);
    } else {
      // Nodes are reused: the set allocates no more often than a batch is opened below the limit.
      if (int64_t(open_.size()) == q_.lookahead) node = open_.extract(open_.begin());
      const Batch fresh = open_batch(q_, batches_++, s);
      if (node.empty()) node = open_.extract(open_.insert(fresh).first);
      node.value() = fresh;
    }
    Batch& batch = node.value();
    batch.put(s);
    const int64_t number = batch.number;
    if (batch.room > 0 && batch.count < q_.max_samples) open_.insert(std::move(node));
    return number;
  }
  int64_t place_alone() { return batches_++; }
  int64_t batches() const { return batches_; }

 private:
  struct Before {
    bool operator()(const Batch& a, const Batch& b) const {
      return a.room != b.room ? a.room < b.room : a.number < b.number;
    }
  };
  using Open = std::set<Batch, Before>;

  const PackRequest& q_;
  Open open_;
  int64_t batches_ = 0;
};

// Segments are ranked by their first appearance in the order. Neighbours mostly share theirs.
class Ranks {
 public:
  explicit Ranks(IntView segments) : segments_(segments) {}

  int64_t of(int64_t id) {
    if (!segments_) return 0;
    const int64_t segment = segments_[id];
    if (rank_.empty() || segment != last_) {
      last_ = segment;
      last_rank_ = rank_.try_emplace(segment, int64_t(rank_.size())).first->second;
    }
    return last_rank_;
  }

 private:
  IntView segments_;
  std::unordered_map<int64_t, int64_t> rank_;
  int64_t last_ = 0, last_rank_ = 0;
};

int64_t id_at(const PackRequest& q, int64_t position) { return q.order ? q.order[position] : position; }

void check_id(const PackRequest& q, int64_t position, int64_t id, uint8_t* seen) {
  if (!q.order) return;
  if (id < 0 || id >= q.samples)
    fail_value("order: expected sample ids in [0, ", q.samples, "), got ", id, " at position ", position);
  const uint8_t bit = uint8_t(1u << (id & 7));
  if (seen[id >> 3] & bit) fail_value("order: expected distinct sample ids, got ", id, " again at position ", position);
  seen[id >> 3] |= bit;
}

bool oversize(const PackRequest& q, int64_t id, const Sample& s) {
  if (s.size <= q.budget && s.size2 <= (q.sizes2 ? q.budget2 : 0)) return false;
  if (q.oversize != Oversize::error) return true;
  const bool first = s.size > q.budget;
  fail_value(first ? "sizes" : "sizes2", ": expected every sample within ", first ? "budget" : "budget2", " = ",
             first ? q.budget : q.budget2, ", got sample ", id, " of size ", first ? s.size : s.size2,
             " (oversize=\"own_batch\" and \"skip\" accept it)");
}

template <class Packer>
PackCounts pack(const PackRequest& q, Packer packer, uint8_t* seen, uint32_t* batch_of_position) {
  Ranks ranks(q.segments);
  int64_t skipped = 0;
  for (int64_t p = 0; p < q.length; ++p) {
    const int64_t id = id_at(q, p);
    check_id(q, p, id, seen);
    const Sample s{q.sizes[id], q.sizes2 ? q.sizes2[id] : 0, ranks.of(id)};
    uint32_t& batch = batch_of_position[p];
    if (!oversize(q, id, s)) {
      batch = uint32_t(packer.place(s));
    } else if (q.oversize == Oversize::own_batch) {
      batch = uint32_t(packer.place_alone());
    } else {
      batch = kSkipped;
      ++skipped;
    }
  }
  return {packer.batches(), q.length - skipped, skipped};
}

void check_sizes(const char* name, IntView sizes, int64_t samples) {
  for (int64_t i = 0; i < samples; ++i)
    if (sizes[i] < 0) fail_value(name, ": expected sizes of at least 0, got ", sizes[i], " for sample ", i);
}

}  // namespace

// ---- launcher ---------------------------------------------------------------------------------------------------

PackCounts pack_batches(const PackRequest& q, uint8_t* seen, uint32_t* batch_of_position) {
  check_sizes("sizes", q.sizes, q.samples);
  if (q.sizes2) check_sizes("sizes2", q.sizes2, q.samples);
  if (q.lookahead == 0) return pack(q, NextFit(q), seen, batch_of_position);
  return pack(q, BestFit(q), seen, batch_of_position);
}

void pack_batches_fill(const PackRequest& q, const uint32_t* batch_of_position, int64_t batches, int64_t* index,
                       int64_t* ptr, int64_t* fill, int64_t* skipped) {
  std::fill(ptr, ptr + batches + 1, 0);
  std::fill(fill, fill + batches, 0);
  for (int64_t p = 0; p < q.length; ++p) {
    const uint32_t batch = batch_of_position[p];
    const int64_t id = id_at(q, p);
    if (batch == kSkipped) {
      *skipped++ = id;
      continue;
    }
    ++ptr[batch + 1];
    fill[batch] += q.sizes[id];
  }
  for (int64_t b = 0; b < batches; ++b) ptr[b + 1] += ptr[b];
  // ptr[b] serves as batch b's cursor; afterwards it is where b + 1 starts, and everything moves up by one.
  for (int64_t p = 0; p < q.length; ++p)
    if (const uint32_t batch = batch_of_position[p]; batch != kSkipped) index[ptr[batch]++] = id_at(q, p);
  for (int64_t b = batches; b > 0; --b) ptr[b] = ptr[b - 1];
  ptr[0] = 0;
}

}  // namespace moeyard::cpu
