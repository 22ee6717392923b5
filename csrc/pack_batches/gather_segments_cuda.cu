// gather_segments: prefix sums of the chosen segments' lengths, then one kernel over the tiles of the output. Backward:
// the chosen segments sorted by first value, then one kernel over the tiles of the values.
#include <algorithm>

#include "common/device.cuh"
#include "common/device_errors.hpp"
#include "common/digit_sort.cuh"
#include "common/scan.cuh"
#include "common/words.cuh"
#include "common/workspace.hpp"
#include "pack_batches/pack_batches.hpp"
#include "pack_batches/segment_tiles.cuh"

namespace moeyard::cuda {
namespace {

constexpr int kWords = 8;  // per thread on their way together

// ---- where segments start -------------------------------------------------------------------------------------------

// A number of rows. Zero-size rows can be so many that sums would overflow: those stop at a bound.
struct Rows {
  int64_t n = 0;
  __device__ Rows operator+(const Rows& o) const { return {min(n + o.n, kTooManyRows)}; }
};

// A chosen segment as [begin, end) of the values; empty, with a note in `errors`, where it is out of range.
struct Segment {
  int64_t begin, end;
};
__device__ Segment segment(const SegmentsRequest& q, int64_t m, unsigned* errors) {
  const int64_t s = q.index[m];
  const bool known = s >= 0 && s < q.num_segments;
  const Segment found = known ? Segment{q.ptr[s], q.ptr[s + 1]} : Segment{0, 0};
  const bool inside = 0 <= found.begin && found.begin <= found.end && found.end <= q.num_values;
  if (!(known && inside)) atomicOr(errors, unsigned(known ? kBadSegmentPtr : kBadSegmentId));
  return inside ? found : Segment{0, 0};
}

struct Lengths {
  SegmentsRequest q;
  unsigned* errors;
  __device__ Rows operator()(int64_t m) const {
    const Segment s = segment(q, m, errors);
    return {min(s.end - s.begin, kTooManyRows)};
  }
};

// Starts in the output, cut at `limit`, and what has to be added to a row of it to find that of the values.
struct Starts {
  SegmentsRequest q;
  int64_t *out_ptr, *shift, limit;
  unsigned* errors;
  __device__ void operator()(int64_t m, Rows before, Rows length) const {
    out_ptr[m] = min(before.n, limit);
    shift[m] = length.n > 0 ? q.ptr[q.index[m]] - before.n : 0;
  }
  __device__ void total(Rows all) const {
    out_ptr[q.count] = min(all.n, limit);
    if (all.n > limit) atomicOr(errors, unsigned(kShortTotal));
  }
};

// ---- forward --------------------------------------------------------------------------------------------------------

// Of the output; the last is its end, and rows from there on belong to no segment.
struct OutputStarts {
  const int64_t* out_ptr;
  int64_t segments;
  __device__ int64_t count() const { return segments + 1; }
  __device__ int64_t operator()(int64_t m) const { return out_ptr[m]; }
};

struct Chosen {
  OutputStarts starts;
  const int64_t* shift;
  IntView add;
};

template <class W, bool kAdd>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(Tiles tiles, Chosen chosen, const W* values, W* out, int64_t* batch) {
  CU_SHARED(int64_t, segment_of, [kTileRows]);
  CU_SHARED(int64_t, source, [kTileRows]);  // the row's first word in the values; -1 for zeros
  const int64_t first = tiles.first_row();
  const int rows = tiles.rows_here();
  number_rows(tiles, chosen.starts, segment_of);
  for (int r = int(threadIdx.x); r < rows; r += kThreads) {
    const int64_t m = segment_of[r];
    source[r] = m < chosen.starts.segments ? (chosen.shift[m] + first + r) * tiles.row_words : -1;
    if (blockIdx.y == 0) batch[first + r] = m;
  }
  __syncthreads();
  const int words = rows * int(tiles.columns);
  for (int base = int(threadIdx.x); base < words; base += kThreads * kWords) {
    W word[kWords];
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      const int w = base + j * kThreads, r = tiles.row_of(w);
      const int64_t from = w < words ? source[r] : -1, at = tiles.column_of(w, r);
      const bool wanted = from >= 0 && at < tiles.row_words;
      word[j] = load_if(wanted, values + (wanted ? from + at : 0));
      if constexpr (kAdd)
        if (from >= 0) word[j] = W(word[j] + W(chosen.add[segment_of[r]]));
    }
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      const int w = base + j * kThreads, r = tiles.row_of(w);
      const int64_t at = tiles.column_of(w, r);
      if (w < words && at < tiles.row_words) store(out + (first + r) * tiles.row_words + at, word[j]);
    }
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

// First values of the chosen segments, the last segment first: so equal ones follow each other with falling m in the
// sorted list. Empty segments have none.
struct FirstValues {
  SegmentsRequest q;
  const int64_t* out_ptr;
  __device__ int64_t segment(int64_t item) const { return q.count - 1 - item; }
  __device__ int64_t operator()(int64_t item) const {
    const int64_t m = segment(item);
    return out_ptr[m + 1] > out_ptr[m] ? q.ptr[q.index[m]] : -1;
  }
};

// The sorted list: values [begin, end) go to the output's rows from `row` on.
struct Sorted {
  int64_t *begin, *end, *row;
  const unsigned* listed;
  __device__ int64_t count() const { return *listed; }
  __device__ int64_t operator()(int64_t i) const { return begin[i]; }
};

__global__ void __launch_bounds__(kThreads) list_kernel(SortPass<FirstValues> p, Sorted s, unsigned* errors) {
  const int64_t i = thread_number();
  if (i >= s.count()) return;
  const int32_t item = p.list[i];
  const int64_t m = p.keys.segment(item), row = p.keys.out_ptr[m], begin = p.keys(item);
  const int64_t end = begin + (p.keys.out_ptr[m + 1] - row);
  s.begin[i] = begin, s.end[i] = end, s.row[i] = row;
  if (i + 1 == s.count()) return;
  const int32_t next = p.list[i + 1];
  const bool same = p.keys.q.index[m] == p.keys.q.index[p.keys.segment(next)];
  if (!same && p.keys(next) < end) atomicOr(errors, unsigned(kSegmentsOverlap));
}

// A value gets the sum over the segments that start last before it; where segments overlap, some have lost it.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_kernel(Tiles tiles, Sorted s, const T* grad, T* grad_values) {
  CU_SHARED(int64_t, segment_of, [kTileRows]);
  const int64_t first = tiles.first_row();
  number_rows(tiles, s, segment_of);
  const int words = tiles.rows_here() * int(tiles.columns);
  for (int w = int(threadIdx.x); w < words; w += kThreads) {
    const int r = tiles.row_of(w);
    const int64_t value = first + r, at = tiles.column_of(w, r), last = segment_of[r];
    if (at >= tiles.row_words) continue;
    acc_t<T> sum = 0;
    for (int64_t i = last; i >= 0 && s.begin[i] == s.begin[last]; --i)
      if (value < s.end[i]) sum += widen(grad[(s.row[i] + value - s.begin[i]) * tiles.row_words + at]);
    grad_values[value * tiles.row_words + at] = narrow<T>(sum);
  }
}

// ---- launcher ---------------------------------------------------------------------------------------------------

template <bool kAdd, class W>
void gather(int64_t total, int64_t row_bytes, const Chosen& chosen, const void* values, void* out, int64_t* batch,
            Stream stream) {
  const Tiles tiles(total, row_bytes / int64_t(sizeof(W)));
  cu_launch(gather_kernel<W, kAdd>, tiles.grid(), dim3(kThreads), 0, stream, tiles, chosen,
            static_cast<const W*>(values), static_cast<W*>(out), batch);
}

// How a backward pass is worked on, and where in the workspace what lies.
struct Work {
  SortShape shape;
  SortRoom room;
  Sorted sorted;

  Work(const SegmentsRequest& q, Workspace& w)
      : shape(q.count, std::max<int64_t>(q.num_values - 1, 0)), room(shape, true, w), sorted{} {
    sorted = {w.take<int64_t>(q.count), w.take<int64_t>(q.count), w.take<int64_t>(q.count), room.listed};
  }
};

}  // namespace

int64_t segments_workspace(int64_t count) { return (count + prefix_sums_workspace(count)) * int64_t(sizeof(int64_t)); }

void segments_ptr(const SegmentsRequest& q, int64_t limit, int64_t* out_ptr, void* workspace, unsigned* errors,
                  int device, void* stream) {
  const LaunchScope scope("moeyard::segments_ptr", device);
  auto* const shift = static_cast<int64_t*>(workspace);
  static_assert(sizeof(Rows) == sizeof(int64_t));
  prefix_sums(Lengths{q, errors}, Starts{q, out_ptr, shift, limit, errors}, q.count,
              reinterpret_cast<Rows*>(shift + q.count), static_cast<Stream>(stream));
}

void gather_segments(const SegmentsRequest& q, const int64_t* out_ptr, const void* workspace, const void* values,
                     int64_t row_items, int64_t item_bytes, IntView add, int64_t total, void* out, int64_t* batch,
                     int device, void* stream) {
  const LaunchScope scope("moeyard::gather_segments", device);
  if (total == 0) return;
  const int64_t row_bytes = row_items * item_bytes;
  const Chosen chosen{{out_ptr, q.count}, static_cast<const int64_t*>(workspace), add};
  with_word(add ? item_bytes : word_bytes(row_bytes, {values, out}), [&](auto word) {
    using W = decltype(word);
    if constexpr (sizeof(W) < kVector)
      if (add) return gather<true, W>(total, row_bytes, chosen, values, out, batch, static_cast<Stream>(stream));
    gather<false, W>(total, row_bytes, chosen, values, out, batch, static_cast<Stream>(stream));
  });
}

int64_t gather_segments_backward_workspace(const SegmentsRequest& q) {
  Workspace w(nullptr);
  Work(q, w);
  return w.bytes();
}

void gather_segments_backward(const SegmentsRequest& q, const int64_t* out_ptr, const void* grad, int64_t row_items,
                              DType dtype, void* workspace, void* grad_values, unsigned* errors, int device,
                              void* stream) {
  const LaunchScope scope("moeyard::gather_segments_backward", device);
  if (q.num_values == 0) return;
  Workspace parts(workspace);
  const Work work(q, parts);
  const auto s = static_cast<Stream>(stream);
  const auto sorted = sort_items(FirstValues{q, out_ptr}, work.shape, work.room, NoSide{}, s);
  cu_launch(list_kernel, grid_of(q.count), dim3(kThreads), 0, s, sorted, work.sorted, errors);
  const Tiles tiles(q.num_values, row_items);
  with_float_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    cu_launch(sum_kernel<T>, tiles.grid(), dim3(kThreads), 0, s, tiles, work.sorted, static_cast<const T*>(grad),
              static_cast<T*>(grad_values));
  });
}

}  // namespace moeyard::cuda
