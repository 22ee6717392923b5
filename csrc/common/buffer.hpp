// Workspace of a kernel: an array without initial values, because writing zeros first can cost as much as the work
// itself. Large ones lie in huge pages.
#pragma once
#include <algorithm>
#include <cstdint>
#include <new>
#include <type_traits>
#include <utility>

#include "common/huge_pages.hpp"

namespace moeyard {

template <class T>
class Buffer {
  static_assert(std::is_trivially_destructible_v<T>);

 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : size_(size) {
    if (!size) return;
    data_ = static_cast<T*>(::operator new(bytes(), alignment()));
    advise_huge_pages(data_, int64_t(bytes()));
  }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() {
    if (data_) ::operator delete(data_, alignment());
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  size_t bytes() const { return size_t(size_) * sizeof(T); }
  std::align_val_t alignment() const { return std::align_val_t(bytes() < (size_t(4) << 20) ? 64 : size_t(2) << 20); }
  void swap(Buffer& other) noexcept { std::swap(data_, other.data_), std::swap(size_, other.size_); }

  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace moeyard
