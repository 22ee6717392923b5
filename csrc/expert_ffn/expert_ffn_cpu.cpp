// How the rows are shared out among workers. A worker takes segment after segment, with scratch of its own; what a
// segment is depends on the problem alone, so any number of threads gives the same bits.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "common/buffer.hpp"
#include "common/check.hpp"
#include "common/parallel.hpp"
#include "common/simd.hpp"
#include "expert_ffn/expert_ffn.hpp"
#include "expert_ffn/segments.hpp"

namespace moeyard::cpu {

bool expert_ffn_runs() {
#ifdef MOEYARD_X86
  return simd_level() == Simd::avx512 && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

bool expert_ffn_preferred() {
#ifdef MOEYARD_X86
  return expert_ffn_runs() && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

#ifdef MOEYARD_X86
namespace {

constexpr int64_t kMostRows = 1024;             // per segment: more rows repay the packing of weights less and less
constexpr int64_t kScratch = int64_t(8) << 20;  // numbers per worker, at most
constexpr int64_t kPartialSums = int64_t(16) << 20;  // numbers of all partial sums of weight gradients
constexpr int64_t kLeastRows = 128;

int64_t checked_end(const ExpertFfn& q) {
  int64_t before = 0;
  for (int64_t e = 0; e <= q.experts; ++e) {
    const int64_t stop = e < q.experts ? q.offsets[e] : q.rows;
    if (stop < before)
      fail_value("offsets: expected values that rise within [0, ", q.rows, "], got ", before, " before ", stop);
    if (e < q.experts) before = stop;
  }
  return before;
}

/// Every expert's rows in segments of at most `most` rows.
std::vector<Segment> segments_of(const ExpertFfn& q, int64_t most) {
  std::vector<Segment> found;
  for (int64_t e = 0, begin = 0; e < q.experts; ++e) {
    const int64_t end = q.offsets[e];
    for (; begin < end; begin = std::min(end, begin + most)) found.push_back({e, begin, std::min(end, begin + most)});
  }
  return found;
}

/// Rows per segment: enough segments for many threads, enough rows to repay the packing, and not too much scratch.
int64_t rows_per_segment(const ExpertFfn& q, int64_t scratch_of_one) {
  const int64_t most = std::min(kMostRows, std::max(kLeastRows, kScratch / std::max<int64_t>(scratch_of_one, 1)));
  return std::clamp(q.rows / 32, kLeastRows, most) / 8 * 8;
}

/// Calls work(i, scratch) for every i in [0, count), each worker with its own scratch of `numbers` floats.
template <class Work>
void share_out(int64_t count, int64_t numbers, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(std::max(threads, 1), count);
  run_tasks(workers, threads, [&](int64_t) {
    Buffer<float> scratch(numbers);
    for (int64_t i; (i = next.fetch_add(1)) < count;) work(i, scratch.data());
  });
}

void clear(float* from, int64_t numbers) {
  if (from && numbers) std::memset(from, 0, size_t(numbers) * sizeof(float));
}

/// Consecutive segments of one expert whose weight gradients go into one sum.
struct Span {
  int64_t first, last, partial;  ///< segments [first, last); partial: -1 for the expert's own output, else which sum
};

/// An expert's first span writes to the output; the others, so that threads can share a large expert, to sums of their
/// own. Their number is bounded by their memory.
std::vector<Span> spans_of(const std::vector<Segment>& segments, int64_t numbers_of_sum) {
  const int64_t most = std::clamp<int64_t>(kPartialSums / std::max<int64_t>(numbers_of_sum, 1), 1, 64);
  const int64_t length = std::max<int64_t>(1, (int64_t(segments.size()) + most - 1) / most);
  std::vector<Span> spans;
  int64_t partials = 0;
  for (int64_t i = 0; i < int64_t(segments.size()); ++i) {
    const bool same = i > 0 && segments[size_t(i)].expert == segments[size_t(i) - 1].expert;
    if (same && spans.back().last - spans.back().first < length)
      spans.back().last = i + 1;
    else
      spans.push_back({i, i + 1, same ? partials++ : -1});
  }
  return spans;
}

}  // namespace

void expert_ffn(const ExpertFfn& q, float* y, float* hidden, int threads) {
  const int64_t end = checked_end(q);
  const int64_t rows = rows_per_segment(q, q.hidden);
  const std::vector<Segment> segments = segments_of(q, rows);
  share_out(int64_t(segments.size()), forward_scratch(q, rows), threads,
            [&](int64_t i, float* scratch) { forward_segment(q, segments[size_t(i)], y, hidden, scratch); });
  clear(y + end * q.dim, (q.rows - end) * q.dim);
}

void expert_ffn_backward(const ExpertFfn& q, const float* grad, const float* hidden, const ExpertFfnGradients& out,
                         int threads) {
  const int64_t end = checked_end(q);
  const int64_t rows = rows_per_segment(q, q.width() + std::max(q.hidden, q.dim));
  const std::vector<Segment> segments = segments_of(q, rows);
  const int64_t up_size = q.dim * q.width(), down_size = q.hidden * q.dim;
  const std::vector<Span> spans = spans_of(segments, up_size + down_size);
  int64_t partials = 0;
  for (const Span& span : spans) partials += span.partial >= 0;
  Buffer<float> sums(out.down ? partials * (up_size + down_size) : 0);

  share_out(int64_t(spans.size()), backward_scratch(q, rows), threads, [&](int64_t i, float* scratch) {
    const Span& span = spans[size_t(i)];
    const int64_t e = segments[size_t(span.first)].expert;
    ExpertFfnGradients mine = out;
    if (out.down && span.partial < 0) {
      mine.up += e * up_size, mine.down += e * down_size;
    } else if (out.down) {
      mine.up = sums.data() + span.partial * (up_size + down_size), mine.down = mine.up + up_size;
    }
    for (int64_t s = span.first; s < span.last; ++s)
      backward_segment(q, segments[size_t(s)], grad, hidden, mine, s > span.first, scratch);
  });

  if (out.x) clear(out.x + end * q.dim, (q.rows - end) * q.dim);
  if (!out.down) return;
  for (int64_t e = 0; e < q.experts; ++e)
    if (q.offsets[e] == (e ? q.offsets[e - 1] : 0))
      clear(out.up + e * up_size, up_size), clear(out.down + e * down_size, down_size);
  // Number by number in the order of the spans, so it does not matter who adds which numbers.
  parallel_for(partials ? up_size + down_size : 0, int64_t(1) << 14, threads, [&](int64_t from, int64_t to) {
    for (const Span& span : spans) {
      if (span.partial < 0) continue;
      const int64_t e = segments[size_t(span.first)].expert;
      const float* sum = sums.data() + span.partial * (up_size + down_size);
      float *up = out.up + e * up_size, *down = out.down + e * down_size - up_size;
      for (int64_t i = from; i < std::min(to, up_size); ++i) up[i] += sum[i];
      for (int64_t i = std::max(from, up_size); i < to; ++i) down[i] += sum[i];
    }
  });
}
#else
void expert_ffn(const ExpertFfn&, float*, float*, int) { fail_value("expert_ffn: no kernel for this processor"); }
void expert_ffn_backward(const ExpertFfn&, const float*, const float*, const ExpertFfnGradients&, int) {
  fail_value("expert_ffn: no kernel for this processor");
}
#endif

}  // namespace moeyard::cpu
