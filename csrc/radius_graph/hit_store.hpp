// Where a search keeps what it found until the outputs exist: per centre a pointer into an arena of records. A record
// is the neighbour, and in periodic calls the three shifts after it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <mutex>
#include <vector>

#include "common/buffer.hpp"

namespace moeyard::cpu {

class HitStore {
 public:
  /// What lies this many ints past the last record may be read, and written until the next one is added.
  static constexpr int64_t kMargin = 32;

  HitStore(int64_t centres, int stride) : stride_(stride), rows_(centres) {}

  /// Centres without any hits from now on; needed where not every centre will be added.
  void clear() { std::fill_n(rows_.data(), rows_.size(), Row{nullptr, 0}); }

  int stride() const { return stride_; }
  int64_t centres() const { return rows_.size(); }
  const int32_t* hits(int64_t i) const { return rows_[i].hits; }

  /// Sums the counts up and returns the number of edges.
  int64_t finish() {
    int64_t sum = 0;
    for (int64_t i = 0; i < centres(); ++i) rows_[i].end = sum += rows_[i].end;
    return sum;
  }
  /// The first edge of centre i, and one for i = centres(). Valid after finish(), as is count().
  int64_t offset(int64_t i) const { return i ? rows_[i - 1].end : 0; }
  int64_t count(int64_t i) const { return offset(i + 1) - offset(i); }

 private:
  friend class HitWriter;

  struct Row {
    const int32_t* hits;
    int64_t end;  // the count until finish()
  };
  struct Room {
    int32_t* at = nullptr;
    int64_t left = 0;
  };

  // Every room reaches to the end of its block, so that its margin is nobody else's. Blocks grow with what was asked
  // for, so that small searches stay small (from 1 kB on malloc first tidies up, which a tiny call would feel); large
  // ones come in huge pages.
  Room room(int64_t ints) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (size_t k = spare_.size(); k-- > 0;) {
      if (spare_[k].left < ints) continue;
      const Room found = spare_[k];
      spare_.erase(spare_.begin() + int64_t(k));
      return found;
    }
    const int64_t least = std::clamp<int64_t>(16 * centres(), 1 << 6, 1 << 12);
    const int64_t size = std::max(ints, std::clamp<int64_t>(reserved_ / 2, least, 1 << 20));
    reserved_ += size;
    blocks_.emplace_back(size + kMargin);
    return {blocks_.back().data(), size};
  }
  void give_back(const Room& room) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (room.left > 0) spare_.push_back(room);
  }

  int stride_;
  Buffer<Row> rows_;
  std::mutex mutex_;
  std::vector<Buffer<int32_t>> blocks_;
  std::vector<Room> spare_;
  int64_t reserved_ = 0;
};

/// One thread's access to a store. What it leaves of a block goes to the next writer.
class HitWriter {
 public:
  explicit HitWriter(HitStore& store) : store_(store) {}
  HitWriter(const HitWriter&) = delete;
  ~HitWriter() { store_.give_back(room_); }

  /// Room for so many records, and kMargin ints past them. Asking again before keep() gives the same room.
  int32_t* room(int64_t records) {
    const int64_t ints = records * store_.stride_;
    if (ints > room_.left || !room_.at) {
      store_.give_back(room_);
      room_ = store_.room(ints);
    }
    return room_.at;
  }
  /// Makes the first records there those of centre i. Every centre belongs to one writer.
  void keep(int64_t i, int64_t records) {
    store_.rows_[i] = {room_.at, records};
    room_.at += records * store_.stride_, room_.left -= records * store_.stride_;
  }

 private:
  HitStore& store_;
  HitStore::Room room_;
};

}  // namespace moeyard::cpu
