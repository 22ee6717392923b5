// Reads an int32 or int64 array as int64. The branch is the same for a whole array, so it predicts; converting a
// memory-mapped array up front would cost a pass over all of it.
#pragma once
#include <cstdint>

#include "common/host_device.hpp"

namespace moeyard {

struct IntView {
  const void* data = nullptr;
  bool wide = true;  ///< int64 elements; false: int32

  MOEYARD_HD int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : int64_t(static_cast<const int32_t*>(data)[i]);
  }
  MOEYARD_HD explicit operator bool() const { return data != nullptr; }
};

}  // namespace moeyard
