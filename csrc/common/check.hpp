// Errors that a kernel can find only by reading values. Everything about shapes, dtypes and devices is checked in
// Python before a pointer is taken; pybind11 turns std::invalid_argument into ValueError.
#pragma once
#include <charconv>
#include <concepts>
#include <iterator>
#include <stdexcept>
#include <string>
#include <string_view>

namespace moeyard {

inline void append(std::string& message, std::string_view text) { message += text; }

// Not a stream: in a module that carries its own libstdc++ (-static-libstdc++), a stream's locale facets are looked up
// by ids that the dynamic linker shares with torch's libstdc++, and the wrong facet is called.
void append(std::string& message, std::integral auto number) {
  char digits[24];
  message.append(digits, std::to_chars(digits, std::end(digits), number).ptr);
}
void append(std::string& message, std::floating_point auto number) {
  char digits[24];
  message.append(digits, std::to_chars(digits, std::end(digits), number, std::chars_format::general, 6).ptr);
}

/// Throws std::invalid_argument with all arguments joined into one message: name the argument, what was expected and
/// what came. Floating point is printed with six significant digits.
template <class... Parts>
[[noreturn]] void fail_value(const Parts&... parts) {
  std::string message;
  (append(message, parts), ...);
  throw std::invalid_argument(message);
}

}  // namespace moeyard
