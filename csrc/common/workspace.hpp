// Cuts the workspace that a caller has allocated into arrays.
#pragma once
#include <cstdint>

namespace moeyard {

class Workspace {
 public:
  /// Aligned to 16 bytes. Null: nothing is there yet, and only bytes() is asked for.
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t items) {
    const int64_t at = bytes_;
    bytes_ += (items * int64_t(sizeof(T)) + 15) / 16 * 16;
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  /// Of all that was taken.
  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

}  // namespace moeyard
