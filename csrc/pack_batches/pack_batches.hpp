// pack_batches: cuts an epoch into batches whose total sizes stay within budgets. gather_segments: collates them.
//
// Packing runs in phases, because outputs are allocated by torch: `count_skipped` says how long `index` and `skipped`
// are, `pack_batches` how many batches there are, `pack_batches_fill` writes what depends on that.
#pragma once
#include <cstdint>
#include <deque>

#include "common/dtype.hpp"
#include "common/int_view.hpp"

namespace moeyard {

enum class Oversize : int { error = 0, own_batch = 1, skip = 2 };

/// What to pack. `order` (null: identity) holds distinct sample ids; sizes, segments and sizes2 are indexed by id.
struct PackRequest {
  IntView sizes;
  int64_t samples;      ///< length of sizes, segments and sizes2
  IntView order;        ///< or null
  int64_t length;       ///< length of order, at most samples and 2^32 - 2
  IntView segments;     ///< or null
  IntView sizes2;       ///< or null
  int64_t budget;       ///< positive
  int64_t budget2;      ///< positive; read with sizes2 only
  int64_t max_samples;  ///< positive
  int64_t lookahead;    ///< 0: next-fit; else the number of batches that may be open
  Oversize oversize;
};

/// All batches, in the order in which they were opened. Deques: a growing vector needs three times its size at times.
struct PackPlan {
  std::deque<int64_t> fill;
  std::deque<uint32_t> counts;  ///< next-fit only
};

/// Marks a skipped sample among the batches of positions.
constexpr uint32_t kSkipped = 0xffffffffu;

struct SegmentsRequest {
  IntView ptr;  ///< [num_segments + 1]; only the entries of chosen segments are read
  int64_t num_segments;
  int64_t num_values;  ///< rows of values
  IntView index;       ///< [count] ids in [0, num_segments)
  int64_t count;
};

namespace cpu {

/// How many samples oversize="skip" leaves out. Throws for a negative size.
int64_t count_skipped(const PackRequest& request);

/// Plans. `seen` holds a zeroed bit per sample. Next-fit writes index[length - skipped] and `skipped`; best fit writes
/// batch_of_position[length], where p's is the batch of the p-th sample of the order, or kSkipped. Throws for an id
/// that is out of range or repeated, and for an oversize sample (error).
PackPlan pack_batches(const PackRequest& request, uint8_t* seen, uint32_t* batch_of_position, int64_t* index,
                      int64_t* skipped);

/// Writes ptr[batches + 1] and fill[batches]; for best fit also index and skipped. Batches come in the order in which
/// they were opened.
void pack_batches_fill(const PackRequest& request, const PackPlan& plan, const uint32_t* batch_of_position,
                       int64_t* index, int64_t* ptr, int64_t* fill, int64_t* skipped);

/// out[m] = total length of the first m chosen segments, m = 0 ... count; returns the last. Throws for an id or a
/// segment out of range.
int64_t segments_ptr(const SegmentsRequest& request, int64_t* out);

/// out[out_ptr[m] + i] = values[ptr[index[m]] + i] (+ add[m], wrapping around) for rows of `row_items` items of
/// `item_bytes` bytes; batch says m for every row. Rows from out_ptr[count] to total are zero, their batch is count.
void gather_segments(const SegmentsRequest& request, const int64_t* out_ptr, const void* values, int64_t row_items,
                     int64_t item_bytes, IntView add, int64_t total, void* out, int64_t* batch, int threads);

/// The gradient: grad_values[v] = sum of grad over the output rows that came from v, in the order of m; `workspace`
/// holds 2 * count elements. Throws when chosen segments overlap.
void gather_segments_backward(const SegmentsRequest& request, const int64_t* out_ptr, const void* grad,
                              int64_t row_items, DType dtype, int64_t* workspace, void* grad_values, int threads);

}  // namespace cpu

// The same on `device`, enqueued on `stream`; they return without waiting. What the CPU throws for, a kernel can only
// report: gather_segments sets a bit of `errors` (common/device_errors.hpp), takes the bad segment as an empty one and
// goes on.
namespace cuda {

/// What pack_batches finds, on the device. The last five: the first sample with a negative size or size2, and the first
/// position with an id that is out of range, one that came before, a sample that is too large (error); ~0 for none.
struct PackSummary {
  unsigned long long batches, packed, negative, negative2, bad_id, repeated, oversize;
};

/// Next-fit (lookahead 0) of at most 2^31 - 2 samples. Writes the summary and index[length]: packed ids from the front,
/// those left out from the back. Nothing is reported: whoever reads the summary raises what it tells.
int64_t pack_batches_workspace(const PackRequest& request);
void pack_batches(const PackRequest& request, int64_t* index, PackSummary* summary, void* workspace, int device,
                  void* stream);

/// ptr[batches + 1] and fill[batches] of a call whose workspace is untouched since.
void pack_batches_fill(const PackRequest& request, const int64_t* index, const PackSummary* summary, int64_t batches,
                       void* workspace, int64_t* ptr, int64_t* fill, int device, void* stream);

/// Where segments_ptr stops counting rows: 2^62 - 1.
constexpr int64_t kTooManyRows = (int64_t(1) << 62) - 1;

/// Bytes of the workspace that segments_ptr fills and gather_segments reads.
int64_t segments_workspace(int64_t count);

/// Starts beyond `limit` are cut to it (kShortTotal). kTooManyRows for no limit.
void segments_ptr(const SegmentsRequest& request, int64_t limit, int64_t* out, void* workspace, unsigned* errors,
                  int device, void* stream);

void gather_segments(const SegmentsRequest& request, const int64_t* out_ptr, const void* workspace, const void* values,
                     int64_t row_items, int64_t item_bytes, IntView add, int64_t total, void* out, int64_t* batch,
                     int device, void* stream);

/// count is below 2^31. Of chosen segments that overlap some get too little (kSegmentsOverlap).
int64_t gather_segments_backward_workspace(const SegmentsRequest& request);
void gather_segments_backward(const SegmentsRequest& request, const int64_t* out_ptr, const void* grad,
                              int64_t row_items, DType dtype, void* workspace, void* grad_values, unsigned* errors,
                              int device, void* stream);

}  // namespace cuda
}  // namespace moeyard
