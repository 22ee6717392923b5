#include <algorithm>
#include <utility>

#include "common/huge_pages.hpp"
#include "pack_batches/best_fit.hpp"
#include "pack_batches/pack_batches.hpp"
#include "pack_batches/samples.hpp"

namespace moeyard::cpu {
namespace {

// ---- kernel -----------------------------------------------------------------------------------------------------

// One open batch, closed by the first sample that does not fit.
class NextFit {
 public:
  NextFit(const PackRequest& q, int64_t* index, int64_t* skipped) : q_(q), index_(index), skipped_(skipped) {}

  void pack(const Samples& samples, const Block& block) {
    for (int64_t i = 0; i < block.n; ++i) {
      samples.prefetch(block.first + i);
      if (oversize(q_, block.size[i], block.size2[i])) {
        place_alone(block, i);
        continue;
      }
      if (block.size[i] > room_ || block.size2[i] > room2_ || count_ >= q_.max_samples || block.rank[i] - rank_ > 1) {
        close();
        room_ = q_.budget, room2_ = q_.budget2, rank_ = block.rank[i];
      }
      room_ -= block.size[i], room2_ -= block.size2[i], ++count_;
      *index_++ = block.id[i];
    }
  }

  PackPlan finish() {
    close();
    return std::move(plan_);
  }

 private:
  void close() {
    if (count_ > 0) plan_.fill.push_back(q_.budget - room_), plan_.counts.push_back(uint32_t(count_));
    room_ = -1, count_ = 0;  // fits nothing
  }
  void place_alone(const Block& block, int64_t i) {
    const bool own_batch = q_.oversize == Oversize::own_batch;
    if (own_batch) close();
    place_oversize(q_, block, i, plan_);
    if (own_batch) plan_.counts.push_back(1);
    *(own_batch ? index_ : skipped_)++ = block.id[i];
  }

  const PackRequest& q_;
  PackPlan plan_;
  int64_t room_ = -1, room2_ = 0, count_ = 0;
  uint32_t rank_ = 0;
  int64_t *index_, *skipped_;
};

template <class BestFit>
PackPlan best_fit(const PackRequest& q, Samples& samples, uint32_t* batch_of_position) {
  BestFit packer(q);
  Block block;
  for (samples.next(block); block.n > 0; samples.next(block))
    packer.pack(samples, block, batch_of_position + block.first);
  return packer.finish();
}

PackPlan next_fit(const PackRequest& q, Samples& samples, int64_t* index, int64_t* skipped) {
  NextFit packer(q, index, skipped);
  Block block;
  for (samples.next(block); block.n > 0; samples.next(block)) packer.pack(samples, block);
  return packer.finish();
}

// Best fit: lists from notes.
void list_samples(const PackRequest& q, const uint32_t* batch_of_position, int64_t batches, int64_t* index,
                  int64_t* ptr, int64_t* skipped) {
  for (int64_t p = 0; p < q.length; ++p)
    if (batch_of_position[p] != kSkipped) ++ptr[batch_of_position[p] + 1];
  for (int64_t b = 0; b < batches; ++b) ptr[b + 1] += ptr[b];
  // ptr[b] serves as batch b's cursor; afterwards it is where b + 1 starts, and everything moves up by one.
  for (int64_t p = 0; p < q.length; ++p) {
    const uint32_t batch = batch_of_position[p];
    *(batch == kSkipped ? skipped++ : &index[ptr[batch]++]) = id_at(q, p);
  }
  for (int64_t b = batches; b > 0; --b) ptr[b] = ptr[b - 1];
  ptr[0] = 0;
}

}  // namespace

// ---- launcher ---------------------------------------------------------------------------------------------------

int64_t count_skipped(const PackRequest& q) { return check_sizes(q); }

PackPlan pack_batches(const PackRequest& q, uint8_t* seen, uint32_t* batch_of_position, int64_t* index,
                      int64_t* skipped) {
  Samples samples(q, seen, q.lookahead > 0);
  if (q.lookahead == 0) {
    advise_huge_pages(index, q.length * int64_t(sizeof(int64_t)));
    return next_fit(q, samples, index, skipped);
  }
  advise_huge_pages(batch_of_position, q.length * int64_t(sizeof(uint32_t)));
  if (VectorBestFit::takes(q)) return best_fit<VectorBestFit>(q, samples, batch_of_position);
  return best_fit<TreeBestFit>(q, samples, batch_of_position);
}

void pack_batches_fill(const PackRequest& q, const PackPlan& plan, const uint32_t* batch_of_position, int64_t* index,
                       int64_t* ptr, int64_t* fill, int64_t* skipped) {
  const int64_t batches = int64_t(plan.fill.size());
  std::copy(plan.fill.begin(), plan.fill.end(), fill);
  std::fill(ptr, ptr + batches + 1, 0);
  if (q.lookahead > 0) {
    advise_huge_pages(index, q.length * int64_t(sizeof(int64_t)));
    return list_samples(q, batch_of_position, batches, index, ptr, skipped);
  }
  for (int64_t b = 0; b < batches; ++b) ptr[b + 1] = ptr[b] + plan.counts[size_t(b)];
}

}  // namespace moeyard::cpu
