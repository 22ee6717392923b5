// Where a search keeps what it found until the outputs exist: per centre a pointer into blocks of records. A record is
// the neighbour, and in periodic calls the three shifts after it.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace moeyard::cpu {

class HitStore {
 public:
  HitStore(int64_t centres, int stride) : stride_(stride), where_(size_t(centres)), count_(size_t(centres)) {}

  int stride() const { return stride_; }
  int64_t centres() const { return int64_t(count_.size()); }
  int32_t count(int64_t i) const { return count_[size_t(i)]; }
  const int32_t* hits(int64_t i) const { return where_[size_t(i)]; }
  /// The first edge of centre i; one entry more than centres. Valid after finish().
  int64_t offset(int64_t i) const { return offset_[size_t(i)]; }

  /// Sums the counts up and returns the number of edges.
  int64_t finish() {
    offset_.assign(count_.size() + 1, 0);
    for (size_t i = 0; i < count_.size(); ++i) offset_[i + 1] = offset_[i] + count_[i];
    return offset_.back();
  }

 private:
  friend class HitWriter;

  int32_t* new_block(int64_t ints) {
    std::unique_ptr<int32_t[]> block(new int32_t[size_t(ints)]);
    std::lock_guard<std::mutex> lock(mutex_);
    return blocks_.emplace_back(std::move(block)).get();
  }

  int stride_;
  std::vector<const int32_t*> where_;
  std::vector<int32_t> count_;
  std::vector<int64_t> offset_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<int32_t[]>> blocks_;
};

/// One thread's access to a store. Blocks grow with what was written, so that small searches stay small.
class HitWriter {
 public:
  explicit HitWriter(HitStore& store) : store_(store) {}

  /// Room for the records of centre i, to be filled by the caller. Every centre belongs to one writer.
  int32_t* add(int64_t i, int64_t records) {
    const int64_t ints = records * store_.stride_;
    if (ints > left_) {
      left_ = std::max(ints, std::clamp<int64_t>(written_ / 4, 1 << 10, 1 << 18));
      at_ = store_.new_block(left_);
    }
    int32_t* begin = at_;
    at_ += ints, left_ -= ints, written_ += ints;
    store_.where_[size_t(i)] = begin;
    store_.count_[size_t(i)] = int32_t(records);
    return begin;
  }

 private:
  HitStore& store_;
  int32_t* at_ = nullptr;
  int64_t left_ = 0, written_ = 0;
};

}  // namespace moeyard::cpu
