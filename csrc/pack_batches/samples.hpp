// Reads the samples of an epoch in blocks, checked and with their segments ranked. For pack_batches only.
#pragma once
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "common/simd.hpp"
#include "pack_batches/pack_batches.hpp"

namespace moeyard::cpu {

// Also how far ahead is prefetched: so far that a line has arrived when it is read.
constexpr int kBlock = 128;

/// n samples from position `first` of the order on.
struct Block {
  int64_t first, n;
  int64_t id[kBlock], size[kBlock], size2[kBlock];
  uint32_t rank[kBlock];
  uint8_t finished[kBlock];  ///< kThis, kPrevious: no later sample can go to a batch of this rank, of the one before
};
constexpr uint8_t kThis = 1, kPrevious = 2;

inline int64_t id_at(const PackRequest& q, int64_t position) { return q.order ? q.order[position] : position; }

/// Whether a sample does not even fit an empty batch.
MOEYARD_INLINE bool oversize(const PackRequest& q, int64_t size, int64_t size2) {
  return size > q.budget || (q.sizes2 && size2 > q.budget2);
}

/// Ranks segments by their first appearance in the order. `counting` counts their samples beforehand, to tell when a
/// rank is finished.
class Ranks {
 public:
  Ranks(const PackRequest& q, bool counting);

  /// Sets rank and finished of the block.
  void load(Block& block);

 private:
  uint32_t place_of(int64_t segment);
  void count();
  uint8_t finished_with(uint32_t rank) const;

  const PackRequest& q_;
  const bool counting_;
  // Ids of a small range are their own places in the tables; others get places as they come.
  bool dense_ = false;
  int64_t least_ = 0;
  std::unordered_map<int64_t, uint32_t> place_;
  std::vector<uint32_t> rank_, left_;    // by place; left_: samples still to come
  std::vector<uint32_t> place_of_rank_;  // of the ranks given so far
  size_t segments_ = 0;                  // that have samples in the order
};

/// Walks through the samples of a request.
class Samples {
 public:
  Samples(const PackRequest& q, uint8_t* seen, bool counting) : q_(q), seen_(seen), ranks_(q, counting) {}

  /// The next block, empty at the end. A bad id ends a block before it and is an error when the next one is asked for,
  /// so that errors are found in the order of positions.
  void next(Block& block);

  /// Asks for the memory of the sample one block after `position`: in a random order each is a cache miss.
  MOEYARD_INLINE void prefetch(int64_t position) const {
    position += kBlock;
    if (!q_.order || position >= q_.length) return;
    const int64_t id = q_.order[position];  // unchecked: prefetching a wild address does nothing
    prefetch(q_.sizes, id);
    if (q_.sizes2) prefetch(q_.sizes2, id);
    if (q_.segments) prefetch(q_.segments, id);
  }

 private:
  static MOEYARD_INLINE void prefetch(IntView view, int64_t i) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(view.data) + (uintptr_t(i) << (view.wide ? 3 : 2));
    __builtin_prefetch(reinterpret_cast<const void*>(address));
  }
  int64_t read_ids(int64_t n, int64_t* id);

  const PackRequest& q_;
  uint8_t* seen_;
  Ranks ranks_;
  int64_t position_ = 0;
};

/// Where an oversize sample goes: a batch of its own, or kSkipped; throws where it is an error.
uint32_t place_oversize(const PackRequest& q, const Block& block, int64_t i, PackPlan& plan);

/// Throws for a negative size; returns how many samples oversize="skip" leaves out.
int64_t check_sizes(const PackRequest& q);

}  // namespace moeyard::cpu
