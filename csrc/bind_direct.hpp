// What decides whether a call may skip torch's dispatcher (moeyard/ops/_direct.py), in C because it runs on every call.
#pragma once
#include <pybind11/pybind11.h>

namespace moeyard {

void bind_direct(pybind11::module_& m);

}  // namespace moeyard
