#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "common/check.hpp"
#include "common/huge_pages.hpp"
#include "common/parallel.hpp"
#include "common/simd.hpp"
#include "pack_batches/pack_batches.hpp"

namespace moeyard::cpu {
namespace {

// ---- kernel -----------------------------------------------------------------------------------------------------

constexpr int64_t kPieceBytes = 1 << 18;

int64_t first_value(const SegmentsRequest& q, int64_t m) { return q.ptr[q.index[m]]; }

// Copies and adds in one pass: large segments would leave the cache between two. Addition modulo 2^bits is the same for
// signed and unsigned.
template <class U>
struct AddKernel {
  template <Simd>
  static MOEYARD_INLINE void run(const char* in, char* out, int64_t n, int64_t number) {
    for (int64_t i = 0; i < n; ++i) {
      U item;  // through memcpy, because a mapped file may start anywhere
      std::memcpy(&item, in + i * int64_t(sizeof(U)), sizeof(U));
      item = U(item + U(number));
      std::memcpy(out + i * int64_t(sizeof(U)), &item, sizeof(U));
    }
  }
};

void copy_add(const char* in, char* out, int64_t n, int64_t item_bytes, int64_t number) {
  switch (item_bytes) {
    case 1: return run_on_level<AddKernel<uint8_t>>(in, out, n, number);
    case 2: return run_on_level<AddKernel<uint16_t>>(in, out, n, number);
    case 4: return run_on_level<AddKernel<uint32_t>>(in, out, n, number);
    default: return run_on_level<AddKernel<uint64_t>>(in, out, n, number);
  }
}

// Half of what a batch of atoms writes are its numbers, so they go out in whole vectors too.
struct FillKernel {
  template <Simd>
  static MOEYARD_INLINE void run(int64_t* out, int64_t n, int64_t number) {
    for (int64_t i = 0; i < n; ++i) out[i] = number;
  }
};

// Segments lie anywhere, and the processor's own prefetching starts anew with each of them.
void fetch_ahead(const char* segment, int64_t bytes) {
  constexpr int64_t kAhead = 1 << 12, kLine = 64;
  for (int64_t at = 0; at < std::min(bytes, kAhead); at += kLine) __builtin_prefetch(segment + at, 0, 2);
}

// Output rows [begin, end): parts of the segments that they belong to.
struct Copy {
  const SegmentsRequest& q;
  const int64_t* out_ptr;
  const char* values;
  int64_t row_items, item_bytes;
  IntView add;
  char* out;
  int64_t* batch;

  void rows(int64_t begin, int64_t end) const {
    const int64_t row_bytes = row_items * item_bytes;
    const int64_t stop = std::min(end, out_ptr[q.count]);
    // The last m with out_ptr[m] <= begin: empty segments before it share its start.
    int64_t m = std::upper_bound(out_ptr, out_ptr + q.count + 1, begin) - out_ptr - 1;
    for (int64_t r = begin; r < stop; ++m) {
      const int64_t n = std::min(out_ptr[m + 1], stop) - r;
      if (m + 1 < q.count)
        fetch_ahead(values + first_value(q, m + 1) * row_bytes, (out_ptr[m + 2] - out_ptr[m + 1]) * row_bytes);
      run_on_level<FillKernel>(batch + r, n, m);
      if (row_bytes > 0 && n > 0) {
        const char* source = values + (first_value(q, m) + (r - out_ptr[m])) * row_bytes;
        if (add)
          copy_add(source, out + r * row_bytes, n * row_items, item_bytes, add[m]);
        else
          std::memcpy(out + r * row_bytes, source, size_t(n * row_bytes));
      }
      r += n;
    }
    const int64_t tail = std::max(begin, stop);
    if (tail >= end) return;
    std::fill(batch + tail, batch + end, q.count);
    if (row_bytes > 0) std::memset(out + tail * row_bytes, 0, size_t((end - tail) * row_bytes));
  }
};

// The sum of n <= kStrip items of the output segments m in [from, to), which are copies of one, in order of m.
constexpr int64_t kStrip = 512;
template <class T>
struct SumKernel {
  template <Simd>
  static MOEYARD_INLINE void run(const T* grad, const int64_t* out_ptr, int64_t row_items, const int64_t* from,
                                 const int64_t* to, int64_t n, T* out) {
    const T* g = grad + out_ptr[*from] * row_items;
    if (to - from == 1) {  // mostly; as below, where 0 + -0 is 0, without the detour
      for (int64_t i = 0; i < n; ++i) out[i] = from_float<T>(acc_t<T>(0) + to_float(g[i]));
      return;
    }
    acc_t<T> sum[kStrip] = {};
    for (const int64_t* m = from; m != to; ++m) {
      g = grad + out_ptr[*m] * row_items;
      for (int64_t i = 0; i < n; ++i) sum[i] += to_float(g[i]);
    }
    for (int64_t i = 0; i < n; ++i) out[i] = from_float<T>(sum[i]);
  }
};

template <class T>
struct Scatter {
  const SegmentsRequest& q;
  const int64_t *out_ptr, *order;
  int64_t count;  // of order
  const T* grad;
  int64_t row_items;
  T* grad_values;

  bool starts(int64_t i) const { return i == 0 || q.index[order[i]] != q.index[order[i - 1]]; }

  // Groups of equal segments that start in [begin, end), to their ends, each with the unchosen values before it.
  void groups(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      if (!starts(i)) continue;
      int64_t next = i + 1;
      while (next < count && !starts(next)) ++next;
      const int64_t s = q.index[order[i]], first = q.ptr[s], stop = q.ptr[s + 1];
      zero(i == 0 ? 0 : q.ptr[q.index[order[i - 1]] + 1], first);
      for (int64_t c = 0; c < (stop - first) * row_items; c += kStrip) {
        const int64_t n = std::min(kStrip, (stop - first) * row_items - c);
        run_on_level<SumKernel<T>>(grad + c, out_ptr, row_items, order + i, order + next, n,
                                   grad_values + first * row_items + c);
      }
      if (next == count) zero(stop, q.num_values);
    }
  }

  void zero(int64_t from, int64_t to) const {
    if (to > from && row_items > 0)
      std::memset(grad_values + from * row_items, 0, size_t((to - from) * row_items) * sizeof(T));
  }
};

// Stable, by the digits of first values: linear in n.
void sort_by_first_value(const SegmentsRequest& q, int64_t n, int64_t* order, int64_t* other) {
  constexpr int kDigit = 11;
  int64_t* const result = order;
  for (int shift = 0; shift < 63 && (q.num_values >> shift) > 0; shift += kDigit) {
    const auto digit = [&](int64_t m) { return (first_value(q, m) >> shift) & ((1 << kDigit) - 1); };
    int64_t start[(1 << kDigit) + 1] = {};
    for (int64_t i = 0; i < n; ++i) ++start[digit(order[i]) + 1];
    for (int d = 0; d < 1 << kDigit; ++d) start[d + 1] += start[d];
    for (int64_t i = 0; i < n; ++i) other[start[digit(order[i])]++] = order[i];
    std::swap(order, other);
  }
  if (order != result) std::copy(order, order + n, result);
}

// Chosen segments by first value, then m, so that equal ones are neighbours. Empty ones are left out; returns how many
// are left. Throws when two different segments overlap: their values would have two owners.
int64_t sort_segments(const SegmentsRequest& q, const int64_t* out_ptr, int64_t* order, int64_t* other) {
  int64_t n = 0;
  bool sorted = true;
  for (int64_t m = 0; m < q.count; ++m) {
    if (out_ptr[m + 1] == out_ptr[m]) continue;
    sorted = sorted && (n == 0 || first_value(q, order[n - 1]) <= first_value(q, m));
    order[n++] = m;
  }
  if (!sorted) sort_by_first_value(q, n, order, other);
  for (int64_t i = 1; i < n; ++i) {
    const int64_t a = q.index[order[i - 1]], b = q.index[order[i]];
    if (a != b && q.ptr[a + 1] > q.ptr[b])
      fail_value("ptr: expected chosen segments that do not overlap for a gradient, got segments ", a, " [", q.ptr[a],
                 ", ", q.ptr[a + 1], ") and ", b, " [", q.ptr[b], ", ", q.ptr[b + 1], ")");
  }
  return n;
}

}  // namespace

// ---- launcher ---------------------------------------------------------------------------------------------------

int64_t segments_ptr(const SegmentsRequest& q, int64_t* out) {
  int64_t total = 0;
  out[0] = 0;
  for (int64_t m = 0; m < q.count; ++m) {
    const int64_t s = q.index[m];
    if (s < 0 || s >= q.num_segments)
      fail_value("index: expected segment ids in [0, ", q.num_segments, "), got ", s, " at position ", m);
    const int64_t begin = q.ptr[s], end = q.ptr[s + 1];
    if (begin < 0 || begin > end || end > q.num_values)
      fail_value("ptr: expected 0 <= ptr[i] <= ptr[i + 1] <= ", q.num_values, " (rows of values), got ", begin, " and ",
                 end, " for segment ", s);
    if (end - begin > std::numeric_limits<int64_t>::max() - total)
      fail_value("index: expected a total length below 2^63, got more at position ", m);
    out[m + 1] = total += end - begin;
  }
  return total;
}

void gather_segments(const SegmentsRequest& q, const int64_t* out_ptr, const void* values, int64_t row_items,
                     int64_t item_bytes, IntView add, int64_t total, void* out, int64_t* batch, int threads) {
  const Copy copy{q,          out_ptr, static_cast<const char*>(values), row_items,
                  item_bytes, add,     static_cast<char*>(out),          batch};
  advise_huge_pages(out, total * row_items * item_bytes);
  advise_huge_pages(batch, total * int64_t(sizeof(int64_t)));
  const int64_t grain = std::max<int64_t>(1, kPieceBytes / (row_items * item_bytes + 8));
  parallel_for(total, grain, threads, [&](int64_t begin, int64_t end) { copy.rows(begin, end); });
}

void gather_segments_backward(const SegmentsRequest& q, const int64_t* out_ptr, const void* grad, int64_t row_items,
                              DType dtype, int64_t* workspace, void* grad_values, int threads) {
  const int64_t n = sort_segments(q, out_ptr, workspace, workspace + q.count);
  with_float_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Scatter<T> scatter{
        q, out_ptr, workspace, n, static_cast<const T*>(grad), row_items, static_cast<T*>(grad_values)};
    advise_huge_pages(grad_values, q.num_values * row_items * int64_t(sizeof(T)));
    if (n == 0) scatter.zero(0, q.num_values);
    const int64_t bytes = out_ptr[q.count] * row_items * int64_t(sizeof(T));
    parallel_for(n, kPieceBytes / (bytes / std::max<int64_t>(n, 1) + 8), threads,
                 [&](int64_t begin, int64_t end) { scatter.groups(begin, end); });
  });
}

}  // namespace moeyard::cpu
