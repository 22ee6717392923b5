// Errors that a kernel can find only by reading values. Everything about shapes, dtypes and devices is checked in
// Python before a pointer is taken; pybind11 turns std::invalid_argument into ValueError.
#pragma once
#include <sstream>
#include <stdexcept>

namespace moeyard {

/// Throws std::invalid_argument with all arguments streamed into one message: name the argument, what was expected
/// and what came.
template <class... Parts>
[[noreturn]] void fail_value(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace moeyard
