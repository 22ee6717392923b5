// Memory of the kernels.
#pragma once
#include <cstdint>
#include <new>

namespace moeyard::cpu {

/// Memory for one chunk at a time, aligned for vectors. Not zeroed.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(::operator new(size_t(bytes), kAlign)) {}
  ~Scratch() { ::operator delete(data_, kAlign); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  void* data_;
};

/// Hands out consecutive arrays of a workspace. Ask for A before int32_t, so that all stay aligned.
class Carver {
 public:
  explicit Carver(void* base) : at_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(at_);
    at_ += count * int64_t(sizeof(T));
    return array;
  }

 private:
  char* at_;
};

}  // namespace moeyard::cpu
