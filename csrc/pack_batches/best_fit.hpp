// Bounded-space best fit (Csirik & Johnson, "Bounded space on-line bin packing: best is better than first",
// Algorithmica 31, 2001): a sample goes to the open batch that it leaves the least room in; when it fits in none and
// `lookahead` are open, the fullest is closed. Ties go to the earliest opened. For pack_batches only.
#pragma once
#include <cstdint>
#include <set>

#include "common/simd.hpp"
#include "pack_batches/samples.hpp"

namespace moeyard::cpu {

/// Any number of open batches and any budget: a tree.
class TreeBestFit {
 public:
  explicit TreeBestFit(const PackRequest& q) : q_(q) {}

  /// Writes the batch of every sample of the block.
  void pack(const Samples& samples, const Block& block, uint32_t* batch);
  PackPlan finish();

 private:
  struct Open {
    int64_t room, number;  // number: in the order of opening
    int64_t room2, count;
    uint32_t rank;
  };
  struct Before {
    bool operator()(const Open& a, const Open& b) const {
      return a.room != b.room ? a.room < b.room : a.number < b.number;
    }
  };
  using Tree = std::set<Open, Before>;  // the first one with enough room is the best fit, the very first the fullest

  uint32_t place(const Block& block, int64_t i);
  void close(const Open& batch) { plan_.fill[size_t(batch.number)] = q_.budget - batch.room; }
  void close_finished(uint32_t rank, uint8_t finished);

  const PackRequest& q_;
  PackPlan plan_;
  Tree open_;
};

/// At most 64 open batches and a budget below 2^25: all rooms fit in a few vector registers, where comparing each costs
/// less than one step down a tree. The rooms stay in registers for a whole block.
class VectorBestFit {
 public:
  static constexpr int kPlaces = 64;
  static bool takes(const PackRequest& q);

  explicit VectorBestFit(const PackRequest& q);

  void pack(const Samples& samples, const Block& block, uint32_t* batch);
  PackPlan finish();

 private:
  template <int kUsed, bool kRules>
  struct Kernel;

  uint32_t open(uint32_t size, uint32_t size2, uint32_t rank);
  void close(int place);
  void close_finished(uint32_t rank, uint8_t finished);

  // Open batches lie in the order of opening in the first places. key = room * 64 + place: its least is the fullest
  // batch, the earliest opened of equally full ones. A free place has the largest key.
  alignas(64) uint32_t key_[kPlaces];
  alignas(64) uint32_t room2_[kPlaces];
  alignas(64) uint32_t rank_[kPlaces];
  uint32_t number_[kPlaces];
  int64_t count_[kPlaces];
  int open_ = 0;

  const PackRequest& q_;
  PackPlan plan_;
};

}  // namespace moeyard::cpu
