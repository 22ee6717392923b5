#include <algorithm>
#include <cstring>
#include <limits>

#include "common/check.hpp"
#include "common/parallel.hpp"
#include "pack_batches/pack_batches.hpp"

namespace moeyard::cpu {
namespace {

// ---- kernel -----------------------------------------------------------------------------------------------------

constexpr int64_t kPieceBytes = 1 << 18;

int64_t first_value(const SegmentsRequest& q, int64_t m) { return q.ptr[q.index[m]]; }

// Addition modulo 2^bits is the same for signed and unsigned.
template <class U>
void add_items(void* items, int64_t n, int64_t number) {
  U* v = static_cast<U*>(items);
  for (int64_t i = 0; i < n; ++i) v[i] = U(v[i] + U(number));
}

void add_to(void* items, int64_t n, int64_t item_bytes, int64_t number) {
  switch (item_bytes) {
    case 1: return add_items<uint8_t>(items, n, number);
    case 2: return add_items<uint16_t>(items, n, number);
    case 4: return add_items<uint32_t>(items, n, number);
    default: return add_items<uint64_t>(items, n, number);
  }
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
      std::fill(batch + r, batch + r + n, m);
      if (row_bytes > 0 && n > 0) {
        const int64_t source = first_value(q, m) + (r - out_ptr[m]);
        std::memcpy(out + r * row_bytes, values + source * row_bytes, size_t(n * row_bytes));
        if (add) add_to(out + r * row_bytes, n * row_items, item_bytes, add[m]);
      }
      r += n;
    }
    const int64_t tail = std::max(begin, stop);
    if (tail >= end) return;
    std::fill(batch + tail, batch + end, q.count);
    if (row_bytes > 0) std::memset(out + tail * row_bytes, 0, size_t((end - tail) * row_bytes));
  }
};

// All output segments m in [from, to) are copies of one segment; the sum of each item runs over them in order of m.
template <class T>
struct Scatter {
  const SegmentsRequest& q;
  const int64_t* out_ptr;
  const T* grad;
  int64_t row_items;
  T* grad_values;

  void group(const int64_t* from, const int64_t* to) const {
    constexpr int64_t kItems = 512;
    const int64_t base = first_value(q, *from) * row_items, n = (out_ptr[*from + 1] - out_ptr[*from]) * row_items;
    for (int64_t c = 0; c < n; c += kItems) {
      const int64_t here = std::min(kItems, n - c);
      acc_t<T> sum[kItems] = {};
      for (const int64_t* m = from; m != to; ++m) {
        const T* g = grad + out_ptr[*m] * row_items + c;
        for (int64_t i = 0; i < here; ++i) sum[i] += to_float(g[i]);
      }
      for (int64_t i = 0; i < here; ++i) grad_values[base + c + i] = from_float<T>(sum[i]);
    }
  }
};

// Chosen segments by first value, then m, so that equal ones are neighbours. Empty ones are left out; returns how many
// are left. Throws when two different segments overlap: their values would have two owners.
int64_t sort_segments(const SegmentsRequest& q, const int64_t* out_ptr, int64_t* order) {
  int64_t n = 0;
  for (int64_t m = 0; m < q.count; ++m)
    if (out_ptr[m + 1] > out_ptr[m]) order[n++] = m;
  std::sort(order, order + n, [&](int64_t a, int64_t b) {
    const int64_t va = first_value(q, a), vb = first_value(q, b);
    return va != vb ? va < vb : a < b;
  });
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
  const int64_t grain = std::max<int64_t>(1, kPieceBytes / (row_items * item_bytes + 8));
  parallel_for(total, grain, threads, [&](int64_t begin, int64_t end) { copy.rows(begin, end); });
}

void gather_segments_backward(const SegmentsRequest& q, const int64_t* out_ptr, const void* grad, int64_t row_items,
                              DType dtype, int64_t* workspace, void* grad_values, int threads) {
  const int64_t n = sort_segments(q, out_ptr, workspace);
  with_float_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Scatter<T> scatter{q, out_ptr, static_cast<const T*>(grad), row_items, static_cast<T*>(grad_values)};
    // A piece takes the groups that start in it, to their ends.
    const auto starts = [&](int64_t i) { return i == 0 || q.index[workspace[i]] != q.index[workspace[i - 1]]; };
    parallel_for(n, 64, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (!starts(i)) continue;
        int64_t next = i + 1;
        while (next < n && !starts(next)) ++next;
        scatter.group(workspace + i, workspace + next);
      }
    });
  });
}

}  // namespace moeyard::cpu
