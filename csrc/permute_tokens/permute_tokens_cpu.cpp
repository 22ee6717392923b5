#include <algorithm>
#include <cstring>

#include "common/huge_pages.hpp"
#include "common/parallel.hpp"
#include "common/simd.hpp"
#include "permute_tokens/permute_tokens.hpp"
#include "permute_tokens/rows.hpp"

namespace moeyard::cpu {
namespace {

// ---- kernel -----------------------------------------------------------------------------------------------------

// Columns that are worked on together: a token's sums stay in the first-level cache while its k rows stream by.
constexpr int64_t kColumns = 1024;
constexpr int64_t kPieceBytes = 1 << 18;

template <class T>
struct Arrays {
  const T* tokens;          // [tokens, features] what is permuted, or what the dots are taken with
  const T* rows;            // [rows, features] likewise for unpermute
  const sum_t<T>* weights;  // [slots] or null
  T* out;
  sum_t<T>* dots;  // [slots] or null
  int64_t features;
};

// A token's rows lie anywhere, so the processor does not see them coming: asks for those that are due in kAhead slots.
template <class T>
MOEYARD_INLINE void fetch_ahead(const Arrays<T>& a, const Plan& plan, int64_t slot, int64_t c, int64_t n) {
  constexpr int64_t kAhead = 4;
  if (slot + kAhead >= plan.tokens * plan.k) return;
  const int64_t row = plan.row_of_slot[slot + kAhead];
  if (row >= 0) prefetch_row(a.rows + row * a.features + c, n);
}

constexpr int kTerms = 4;  // of a sum that are added in one pass

template <bool kWeighted, bool kFirst, class T>
MOEYARD_INLINE void add_last(const Term<T>* terms, int count, const sum_t<T>* sum, int64_t n, T* out) {
  switch (count) {
    case 4: return add_terms<4, kWeighted, kFirst>(terms, sum, n, out);
    case 3: return add_terms<3, kWeighted, kFirst>(terms, sum, n, out);
    case 2: return add_terms<2, kWeighted, kFirst>(terms, sum, n, out);
    case 1: return add_terms<1, kWeighted, kFirst>(terms, sum, n, out);
    default: std::fill(out, out + n, T{});
  }
}

// The sums of one token over `n` columns from column c. Only those of many terms pass through `sum`.
template <bool kWeighted, class T>
MOEYARD_INLINE void sum_token(const Arrays<T>& a, const Plan& plan, int64_t token, int64_t c, int64_t n,
                              sum_t<T>* sum) {
  Term<T> terms[kTerms];
  int count = 0;
  bool first = true;
  for (int64_t slot = token * plan.k; slot < (token + 1) * plan.k; ++slot) {
    const int64_t row = plan.row_of_slot[slot];
    if (!a.dots) fetch_ahead(a, plan, slot, c, n);
    if (row < 0) continue;
    if (count == kTerms) {
      first ? add_terms<kTerms, kWeighted, true>(terms, sum, n, sum)
            : add_terms<kTerms, kWeighted, false>(terms, sum, n, sum);
      count = 0, first = false;
    }
    terms[count++] = {a.rows + row * a.features + c, kWeighted ? a.weights[slot] : sum_t<T>{}};
  }
  T* const out = a.out + token * a.features + c;
  first ? add_last<kWeighted, true>(terms, count, sum, n, out) : add_last<kWeighted, false>(terms, count, sum, n, out);
}

template <class T>
MOEYARD_INLINE void dot_token(const Arrays<T>& a, const Plan& plan, int64_t token, int64_t c, int64_t n) {
  const T* x = a.tokens + token * a.features + c;
  for (int64_t slot = token * plan.k; slot < (token + 1) * plan.k; ++slot) {
    const int64_t row = plan.row_of_slot[slot];
    fetch_ahead(a, plan, slot, c, n);
    if (row >= 0) a.dots[slot] += dot(x, a.rows + row * a.features + c, n);
  }
}

// Unpermutes tokens [begin, end). Columns are the outer loop, so that every element of a row is fetched once for the
// sum and the dot.
struct CombineTokens {
  template <Simd, class T>
  static MOEYARD_INLINE void run(const Arrays<T>& a, const Plan& plan, int64_t begin, int64_t end) {
    if (a.dots) std::fill(a.dots + begin * plan.k, a.dots + end * plan.k, sum_t<T>{});
    alignas(64) sum_t<T> sum[kColumns];
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t c = 0; c < a.features; c += kColumns) {
        const int64_t n = std::min(kColumns, a.features - c);
        if (a.dots) dot_token(a, plan, t, c, n);
        if (!a.out) continue;
        if (a.weights)
          sum_token<true>(a, plan, t, c, n, sum);
        else
          sum_token<false>(a, plan, t, c, n, sum);
      }
    }
  }
};

// Permutes tokens [begin, end): the k rows of each, and the dots of the token with the rows of the other array.
struct SpreadTokens {
  template <Simd, class T>
  static MOEYARD_INLINE void run(const Arrays<T>& a, const Plan& plan, int64_t begin, int64_t end, bool stream) {
    if (a.dots) std::fill(a.dots + begin * plan.k, a.dots + end * plan.k, sum_t<T>{});
    alignas(64) T scaled[kColumns];
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t c = 0; c < a.features; c += kColumns) {
        const int64_t n = std::min(kColumns, a.features - c);
        const T* x = a.tokens + t * a.features + c;
        for (int64_t slot = t * plan.k; slot < (t + 1) * plan.k; ++slot) {
          if (a.dots) fetch_ahead(a, plan, slot, c, n);
          if (plan.row_of_slot[slot] < 0) continue;
          const int64_t at = plan.row_of_slot[slot] * a.features + c;
          if (a.dots) a.dots[slot] += dot(x, a.rows + at, n);
          if (!a.out) continue;
          scale_row(x, a.weights ? a.weights[slot] : sum_t<T>(1), n, stream ? scaled : a.out + at);
          if (stream) stream_bytes(scaled, n * int64_t(sizeof(T)), a.out + at);
        }
      }
    }
    if (stream) end_stream();
  }
};

// ---- launcher ---------------------------------------------------------------------------------------------------

// Tokens (each k + 1 rows of traffic) or rows per piece of about kPieceBytes.
int64_t grain(int64_t row_bytes, int64_t rows_per_item) {
  return std::max<int64_t>(1, kPieceBytes / std::max<int64_t>(1, row_bytes * rows_per_item + 16));
}

// Rows of an output larger than any last-level cache are in memory again before anybody reads them. Rows of a few
// lines are left to the caches, for what lies between whole lines.
bool streams(int64_t row_bytes, int64_t rows) {
  constexpr int64_t kCache = int64_t(32) << 20, kLeastRow = 512;
  return row_bytes >= kLeastRow && row_bytes * rows > kCache;
}

void zero_free_rows(const Plan& plan, int64_t row_bytes, void* out, int threads) {
  if (row_bytes == 0) return;
  parallel_for(plan.rows, grain(row_bytes, 1), threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      if (plan.slot_of_row[r] < 0) std::memset(static_cast<char*>(out) + r * row_bytes, 0, size_t(row_bytes));
  });
}

void copy_in_row_order(const char* x, const Plan& plan, int64_t row_bytes, char* out, int threads) {
  parallel_for(plan.rows, grain(row_bytes, 2), threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int32_t slot = plan.slot_of_row[r];
      if (slot >= 0)  // 32-bit division is several times as fast as 64-bit, and k fits wherever there is a slot
        std::memcpy(out + r * row_bytes, x + uint32_t(slot) / uint32_t(plan.k) * row_bytes, size_t(row_bytes));
      else
        std::memset(out + r * row_bytes, 0, size_t(row_bytes));
    }
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

void permute_rows(const void* x, const Plan& plan, int64_t row_bytes, void* out, int threads) {
  check_plan(plan, threads);
  if (row_bytes == 0) return;
  advise_huge_pages(out, plan.rows * row_bytes);
  const auto* const from = static_cast<const char*>(x);
  auto* const to = static_cast<char*>(out);
  const bool stream = streams(row_bytes, plan.rows);
  // A token of many rows stays in the caches until the last, and rows are written fastest in a row.
  if (!stream && plan.k >= 4) return copy_in_row_order(from, plan, row_bytes, to, threads);
  parallel_for(plan.tokens, grain(row_bytes, plan.k + 1), threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t slot = t * plan.k; slot < (t + 1) * plan.k; ++slot) {
        const int64_t row = plan.row_of_slot[slot];
        if (row < 0) continue;
        if (stream)
          stream_bytes(from + t * row_bytes, row_bytes, to + row * row_bytes);
        else
          std::memcpy(to + row * row_bytes, from + t * row_bytes, size_t(row_bytes));
      }
    }
    if (stream) end_stream();
  });
  zero_free_rows(plan, row_bytes, to, threads);
}

void permute_weighted(const void* x, const void* weights, const void* y, const Plan& plan, int64_t features,
                      DType dtype, void* out, void* dots, int threads) {
  check_plan(plan, threads);
  with_float_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto a = arrays<T>(x, y, weights, out, dots, features);
    const int64_t row_bytes = features * int64_t(sizeof(T));
    const bool stream = out && streams(row_bytes, plan.rows);
    if (out) advise_huge_pages(out, plan.rows * row_bytes);
    parallel_for(plan.tokens, grain(row_bytes, plan.k + 1), threads,
                 [&](int64_t begin, int64_t end) { run_on_level<SpreadTokens>(a, plan, begin, end, stream); });
    if (out) zero_free_rows(plan, row_bytes, out, threads);
  });
}

void unpermute_rows(const void* y, const void* weights, const void* x, const Plan& plan, int64_t features, DType dtype,
                    void* out, void* dots, int threads) {
  check_plan(plan, threads);
  with_sum_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto a = arrays<T>(x, y, weights, out, dots, features);
    const int64_t row_bytes = features * int64_t(sizeof(T));
    if (out) advise_huge_pages(out, plan.tokens * row_bytes);
    parallel_for(plan.tokens, grain(row_bytes, plan.k + 1), threads,
                 [&](int64_t begin, int64_t end) { run_on_level<CombineTokens>(a, plan, begin, end); });
  });
}

}  // namespace moeyard::cpu
