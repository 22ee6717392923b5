#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/check.hpp"
#include "common/find_first.hpp"
#include "common/parallel.hpp"
#include "permute_tokens/permute_tokens.hpp"

namespace moeyard::cpu {
namespace {

// ---- kernel -----------------------------------------------------------------------------------------------------

// Columns that are worked on together: a token's sums stay in the first-level cache while its k rows stream by.
constexpr int64_t kColumns = 1024;
constexpr int kLanes = 16;
constexpr int64_t kPieceBytes = 1 << 18;

// Integers are summed as unsigned, which wraps around instead of being undefined.
template <class T>
struct Sum {
  using type = acc_t<T>;
  static type load(T v) { return to_float(v); }
  static T store(type v) { return from_float<T>(v); }
};
template <>
struct Sum<int32_t> {
  using type = uint32_t;
  static type load(int32_t v) { return uint32_t(v); }
  static int32_t store(type v) { return int32_t(v); }
};
template <>
struct Sum<int64_t> {
  using type = uint64_t;
  static type load(int64_t v) { return uint64_t(v); }
  static int64_t store(type v) { return int64_t(v); }
};
template <class T>
using sum_t = typename Sum<T>::type;

// Sixteen running sums and a fixed tree over them: the order depends on n alone.
template <class T>
sum_t<T> dot(const T* a, const T* b, int64_t n) {
  sum_t<T> lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lane[l] += Sum<T>::load(a[i + l]) * Sum<T>::load(b[i + l]);
  for (int l = 0; i < n; ++i, ++l) lane[l] += Sum<T>::load(a[i]) * Sum<T>::load(b[i]);
  for (int half = kLanes / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

template <class T>
struct Arrays {
  const T* tokens;          // [tokens, features] what is permuted, or what the dots are taken with
  const T* rows;            // [rows, features] likewise for unpermute
  const sum_t<T>* weights;  // [slots] or null
  T* out;
  sum_t<T>* dots;  // [slots] or null
  int64_t features;
};

// One token of unpermute. Columns are the outer loop, so that every element of a row is read once for sum and dot.
template <class T>
void combine_token(const Arrays<T>& a, const Plan& plan, int64_t token) {
  const int32_t* row_of = plan.row_of_slot + token * plan.k;
  if (a.dots) std::fill(a.dots + token * plan.k, a.dots + (token + 1) * plan.k, sum_t<T>{});
  for (int64_t c = 0; c < a.features; c += kColumns) {
    const int64_t n = std::min(kColumns, a.features - c);
    sum_t<T> sum[kColumns];
    std::fill(sum, sum + n, sum_t<T>{});
    for (int64_t j = 0; j < plan.k; ++j) {
      if (row_of[j] < 0) continue;
      const int64_t slot = token * plan.k + j;
      const T* y = a.rows + row_of[j] * a.features + c;
      if (a.dots) a.dots[slot] += dot(a.tokens + token * a.features + c, y, n);
      if (!a.out) continue;
      if (a.weights) {
        const sum_t<T> w = a.weights[slot];
        for (int64_t i = 0; i < n; ++i) sum[i] += w * Sum<T>::load(y[i]);
      } else {
        for (int64_t i = 0; i < n; ++i) sum[i] += Sum<T>::load(y[i]);
      }
    }
    if (!a.out) continue;
    T* out = a.out + token * a.features + c;
    for (int64_t i = 0; i < n; ++i) out[i] = Sum<T>::store(sum[i]);
  }
}

// One token of permute: its k rows, and the dots of the token with the rows of the other array.
template <class T>
void spread_token(const Arrays<T>& a, const Plan& plan, int64_t token) {
  const int32_t* row_of = plan.row_of_slot + token * plan.k;
  if (a.dots) std::fill(a.dots + token * plan.k, a.dots + (token + 1) * plan.k, sum_t<T>{});
  for (int64_t c = 0; c < a.features; c += kColumns) {
    const int64_t n = std::min(kColumns, a.features - c);
    const T* x = a.tokens + token * a.features + c;
    for (int64_t j = 0; j < plan.k; ++j) {
      if (row_of[j] < 0) continue;
      const int64_t slot = token * plan.k + j, at = row_of[j] * a.features + c;
      if (a.dots) a.dots[slot] += dot(x, a.rows + at, n);
      if (!a.out) continue;
      const sum_t<T> w = a.weights ? a.weights[slot] : sum_t<T>(1);
      for (int64_t i = 0; i < n; ++i) a.out[at + i] = Sum<T>::store(w * Sum<T>::load(x[i]));
    }
  }
}

// ---- launcher ---------------------------------------------------------------------------------------------------

// Tokens (each k + 1 rows of traffic) or rows per piece of about kPieceBytes.
int64_t grain(int64_t row_bytes, int64_t rows_per_item) {
  return std::max<int64_t>(1, kPieceBytes / std::max<int64_t>(1, row_bytes * rows_per_item + 16));
}

void zero_free_rows(const Plan& plan, int64_t row_bytes, void* out, int threads) {
  if (row_bytes == 0) return;
  parallel_for(plan.rows, grain(row_bytes, 1), threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      if (plan.slot_of_row[r] < 0) std::memset(static_cast<char*>(out) + r * row_bytes, 0, size_t(row_bytes));
  });
}

template <class T>
Arrays<T> arrays(const void* tokens, const void* rows, const void* weights, void* out, void* dots, int64_t features) {
  return {static_cast<const T*>(tokens), static_cast<const T*>(rows),  static_cast<const sum_t<T>*>(weights),
          static_cast<T*>(out),          static_cast<sum_t<T>*>(dots), features};
}

template <class F>
void with_sum_type(DType dtype, F&& f) {
  if (dtype == DType::i32) return f(int32_t{});
  if (dtype == DType::i64) return f(int64_t{});
  with_float_type(dtype, f);
}

}  // namespace

void check_plan(const Plan& plan, int threads) {
  const int64_t slots = plan.tokens * plan.k;
  const int64_t bad_slot = find_first(slots, threads, [&](int64_t s) {
    const int32_t r = plan.row_of_slot[s];
    return r != -1 && (r < 0 || r >= plan.rows || plan.slot_of_row[r] != s);
  });
  if (bad_slot < slots) {
    const int32_t r = plan.row_of_slot[bad_slot];
    if (r < -1 || r >= plan.rows)
      fail_value("plan.row_of_slot: expected rows in [-1, ", plan.rows, "), got ", r, " at token ", bad_slot / plan.k,
                 ", slot ", bad_slot % plan.k);
    fail_value("plan: expected slot_of_row to be the inverse of row_of_slot, got row_of_slot[", bad_slot / plan.k, ", ",
               bad_slot % plan.k, "] = ", r, ", but slot_of_row[", r, "] = ", plan.slot_of_row[r]);
  }
  const int64_t bad_row = find_first(plan.rows, threads, [&](int64_t r) {
    const int32_t s = plan.slot_of_row[r];
    return s != -1 && (s < 0 || s >= slots || plan.row_of_slot[s] != r);
  });
  if (bad_row == plan.rows) return;
  const int32_t s = plan.slot_of_row[bad_row];
  if (s < -1 || s >= slots)
    fail_value("plan.slot_of_row: expected slots in [-1, ", slots, "), got ", s, " at row ", bad_row);
  fail_value("plan: expected row_of_slot to be the inverse of slot_of_row, got slot_of_row[", bad_row, "] = ", s,
             ", but row_of_slot has ", plan.row_of_slot[s], " there");
}

void permute_rows(const void* x, const Plan& plan, int64_t row_bytes, void* out, int threads) {
  if (row_bytes == 0) return;
  parallel_for(plan.tokens, grain(row_bytes, plan.k + 1), threads, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin * plan.k; s < end * plan.k; ++s)
      if (const int64_t r = plan.row_of_slot[s]; r >= 0)
        std::memcpy(static_cast<char*>(out) + r * row_bytes, static_cast<const char*>(x) + s / plan.k * row_bytes,
                    size_t(row_bytes));
  });
  zero_free_rows(plan, row_bytes, out, threads);
}

void permute_weighted(const void* x, const void* weights, const void* y, const Plan& plan, int64_t features,
                      DType dtype, void* out, void* dots, int threads) {
  with_float_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto a = arrays<T>(x, y, weights, out, dots, features);
    const int64_t row_bytes = features * int64_t(sizeof(T));
    parallel_for(plan.tokens, grain(row_bytes, plan.k + 1), threads, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) spread_token(a, plan, t);
    });
    if (out) zero_free_rows(plan, row_bytes, out, threads);
  });
}

void unpermute_rows(const void* y, const void* weights, const void* x, const Plan& plan, int64_t features, DType dtype,
                    void* out, void* dots, int threads) {
  with_sum_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto a = arrays<T>(x, y, weights, out, dots, features);
    const int64_t row_bytes = features * int64_t(sizeof(T));
    parallel_for(plan.tokens, grain(row_bytes, plan.k + 1), threads, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) combine_token(a, plan, t);
    });
  });
}

}  // namespace moeyard::cpu
