// How arguments cross the bindings: addresses as integers, views and plans as tuples.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>
#include <utility>

#include "common/int_view.hpp"
#include "permute_tokens/permute_tokens.hpp"

namespace moeyard::binding {

using Address = std::uintptr_t;
using NoGil = pybind11::call_guard<pybind11::gil_scoped_release>;
using Ints = std::pair<Address, bool>;                                     // address, int64 (else int32)
using PlanArgs = std::tuple<Address, Address, int64_t, int64_t, int64_t>;  // the fields of moeyard::Plan

template <class T = void>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

inline IntView view(Ints a) { return {at(a.first), a.second}; }

inline Plan view(const PlanArgs& p) {
  const auto [row_of_slot, slot_of_row, tokens, k, rows] = p;
  return {at<int32_t>(row_of_slot), at<int32_t>(slot_of_row), tokens, k, rows};
}

}  // namespace moeyard::binding
