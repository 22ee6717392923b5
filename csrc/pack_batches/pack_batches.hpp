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
}  // namespace moeyard
