// Element types as numbers that cross the binding (python/moeyard/ops/_register.py holds the same table), and the
// two 16-bit float types as plain structs, so that no kernel needs a CUDA or compiler extension header.
#pragma once
#include <bit>
#include <cstdint>
#include <type_traits>

#include "common/check.hpp"

namespace moeyard {

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3, i32 = 4, i64 = 5 };

inline int64_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::f16:
    case DType::bf16: return 2;
    case DType::f32:
    case DType::i32: return 4;
    default: return 8;
  }
}

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// By masks, because the compiler makes branches of `condition ? a : b` where it hopes to save work, and no vector code
// of branches. Conditions are best signed comparisons, which every instruction set has.
inline uint32_t select(bool condition, uint32_t a, uint32_t b) {
  const uint32_t mask = 0u - uint32_t(condition);
  return (a & mask) | (b & ~mask);
}

inline float to_float(bf16 v) { return std::bit_cast<float>(uint32_t(v.bits) << 16); }

inline float to_float(f16 v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16, rest = v.bits & 0x7fffu;
  // Shift into place, then rescale the exponent by multiplying: exact, and right for subnormals too.
  const float magnitude = std::bit_cast<float>(rest << 13) * std::bit_cast<float>(uint32_t(254 - 15) << 23);
  const uint32_t special = 0x7f800000u | ((rest & 0x3ffu) << 13);
  return std::bit_cast<float>(sign | select(int32_t(rest) >= 0x7c00, special, std::bit_cast<uint32_t>(magnitude)));
}

inline float to_float(float v) { return v; }
inline double to_float(double v) { return v; }

/// The type in which a kernel computes and accumulates: float32, and float64 for float64.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulator<T>::type;

/// The type of a sum of elements: acc_t, and for integers the unsigned one, which wraps instead of being undefined.
template <class T>
using sum_t = typename std::conditional_t<std::is_integral_v<T>, std::make_unsigned<T>, Accumulator<T>>::type;

/// Rounds to nearest, ties to even, as torch does.
template <class T>
T from_float(acc_t<T> v);
template <>
inline float from_float<float>(float v) {
  return v;
}
template <>
inline double from_float<double>(double v) {
  return v;
}
template <>
inline bf16 from_float<bf16>(float v) {
  const uint32_t u = std::bit_cast<uint32_t>(v), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return {uint16_t(select(int32_t(u & 0x7fffffffu) > 0x7f800000, 0x7fc0u, rounded))};
}
template <>
inline f16 from_float<f16>(float v) {
  const uint32_t u = std::bit_cast<uint32_t>(v), sign = (u >> 16) & 0x8000u;
  const int32_t rest = int32_t(u & 0x7fffffffu);
  const uint32_t normal = (uint32_t(rest) - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13;
  const float shifted = std::bit_cast<float>(rest) + 0.5f;  // subnormal half: let the float adder round
  uint32_t half = select(rest < 0x38800000, std::bit_cast<uint32_t>(shifted) - 0x3f000000u, normal);
  half = select(rest >= 0x477ff000, 0x7c00u, half);  // rounds to more than 65504
  return {uint16_t(sign | select(rest > 0x7f800000, 0x7e00u, half))};
}

/// Calls f with a value of the C++ type that `dtype` names; f is a generic lambda.
template <class F>
auto with_float_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::f16: return f(f16{});
    case DType::bf16: return f(bf16{});
    default: fail_value("no kernel for dtype code ", int(dtype));
  }
}

}  // namespace moeyard
