// All that the kernels need and that must not be compiled for a higher level than the machine may have: functions that
// are not inlined end up once in the library, whichever file they came from.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <optional>
#include <type_traits>
#include <utility>

#include "common/check.hpp"
#include "common/dtype.hpp"
#include "topk_gating/chunk_sums.hpp"
#include "topk_gating/kernels.hpp"
#include "topk_gating/scratch.hpp"
#include "topk_gating/topk_gating.hpp"
