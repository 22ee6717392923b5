#include "pack_batches/best_fit.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

namespace moeyard::cpu {
namespace {

// Whether a batch of rank `batch` is finished by a sample of rank `sample`.
bool is_finished(uint32_t batch, uint32_t sample, uint8_t finished) {
  return ((finished & kThis) && batch == sample) || ((finished & kPrevious) && batch + 1 == sample);
}

}  // namespace

// ---- tree -------------------------------------------------------------------------------------------------------

uint32_t TreeBestFit::place(const Block& block, int64_t i) {
  const int64_t size = block.size[i], size2 = block.size2[i];
  const uint32_t rank = block.rank[i];
  auto best = open_.lower_bound(Open{size, -1, 0, 0, 0});
  while (best != open_.end() && (size2 > best->room2 || rank - best->rank > 1)) ++best;
  Tree::node_type node;
  if (best != open_.end()) {
    node = open_.extract(best);
  } else {
    // Nodes are reused: the set allocates no more often than a batch is opened below the limit.
    if (int64_t(open_.size()) == q_.lookahead) node = open_.extract(open_.begin()), close(node.value());
    const Open fresh{q_.budget, int64_t(plan_.fill.size()), q_.sizes2 ? q_.budget2 : 0, 0, rank};
    plan_.fill.push_back(0);
    if (node.empty()) node = open_.extract(open_.insert(fresh).first);
    node.value() = fresh;
  }
  Open& batch = node.value();
  batch.room -= size, batch.room2 -= size2, ++batch.count;
  const uint32_t number = uint32_t(batch.number);
  if (batch.room > 0 && batch.count < q_.max_samples)
    open_.insert(std::move(node));
  else
    close(batch);
  return number;
}

void TreeBestFit::close_finished(uint32_t rank, uint8_t finished) {
  for (auto at = open_.begin(); at != open_.end();) {
    const bool closes = is_finished(at->rank, rank, finished);
    if (closes) close(*at);
    at = closes ? open_.erase(at) : std::next(at);
  }
}

void TreeBestFit::pack(const Samples& samples, const Block& block, uint32_t* batch) {
  for (int64_t i = 0; i < block.n; ++i) {
    samples.prefetch(block.first + i);
    batch[i] = oversize(q_, block.size[i], block.size2[i]) ? place_oversize(q_, block, i, plan_) : place(block, i);
    if (block.finished[i]) close_finished(block.rank[i], block.finished[i]);
  }
}

PackPlan TreeBestFit::finish() {
  for (const Open& batch : open_) close(batch);
  return std::move(plan_);
}

// ---- vectors ----------------------------------------------------------------------------------------------------

namespace {
constexpr uint32_t kFree = 0xffffffffu;
// Keys less what a sample takes are below this where it fits and wrap around above it where not.
constexpr uint32_t kFits = 0x80000000u;
}  // namespace

namespace {

template <Simd level>
struct Register {
  static constexpr int kLanes = level == Simd::avx512 ? 16 : level == Simd::avx2 ? 8 : 4;
  typedef uint32_t type __attribute__((vector_size(kLanes * sizeof(uint32_t))));
};

// Leaves the least lane in every lane.
template <int kBy, class V, size_t... i>
MOEYARD_INLINE void spread_least(V& v, std::index_sequence<i...> lanes) {
  const V other = __builtin_shufflevector(v, v, (i ^ kBy)...);
  v = v < other ? v : other;
  if constexpr (kBy > 1) spread_least<kBy / 2>(v, lanes);
}

}  // namespace

// The first kUsed places in registers. kRules: there are sizes2 or segments.
template <int kUsed, bool kRules>
struct VectorBestFit::Kernel {
  template <Simd level>
  struct Rooms {
    using V = typename Register<level>::type;
    static constexpr int kLanes = Register<level>::kLanes, kVectors = kUsed / kLanes;
    V key[kVectors], room2[kVectors], rank[kVectors], rest[kVectors], least;

    MOEYARD_INLINE void load(const VectorBestFit& open) {
      for (int v = 0; v < kVectors; ++v) {
        std::memcpy(&key[v], open.key_ + v * kLanes, sizeof(V));
        if (kRules) std::memcpy(&room2[v], open.room2_ + v * kLanes, sizeof(V));
        if (kRules) std::memcpy(&rank[v], open.rank_ + v * kLanes, sizeof(V));
      }
    }
    MOEYARD_INLINE void store(VectorBestFit& open) const {
      for (int v = 0; v < kVectors; ++v) {
        std::memcpy(open.key_ + v * kLanes, &key[v], sizeof(V));
        if (kRules) std::memcpy(open.room2_ + v * kLanes, &room2[v], sizeof(V));
      }
    }
    // What the key of the best fit will be; kFits or more where there is none.
    MOEYARD_INLINE uint32_t find(uint32_t size, uint32_t size2, uint32_t sample_rank) {
      least = V{} + kFree;
      for (int v = 0; v < kVectors; ++v) {
        rest[v] = key[v] - size * kPlaces;
        // The sign of what goes wrong: size2 above room2, ranks apart by more than 1. Arithmetic, because gcc joins two
        // vector conditions in a way that takes the vectors apart.
        if (kRules) rest[v] |= ((room2[v] - size2) | (0u - ((sample_rank - rank[v]) >> 1))) & kFits;
        least = rest[v] < least ? rest[v] : least;
      }
      spread_least<kLanes / 2>(least, std::make_index_sequence<kLanes>());
      return least[0];
    }
    // Puts the sample where `find` found room: no two places have equal keys.
    MOEYARD_INLINE void put(uint32_t size2) {
      for (int v = 0; v < kVectors; ++v) {
        if (kRules) room2[v] = rest[v] == least ? room2[v] - size2 : room2[v];
        key[v] = rest[v] == least ? rest[v] : key[v];
      }
    }
  };

  // Packs from sample `from` of the block on and returns how far it came: to the end, or to a sample that needs more
  // than kUsed places. What happens once per batch is done in memory.
  template <Simd level>
  static MOEYARD_INLINE int64_t run(VectorBestFit* open, const Samples* samples, const Block* block, int64_t from,
                                    uint32_t* batch) {
    const PackRequest& q = open->q_;
    Rooms<level> rooms;
    rooms.load(*open);
    int64_t i = from;
    for (; i < block->n; ++i) {
      samples->prefetch(block->first + i);
      const uint32_t size = uint32_t(block->size[i]), size2 = uint32_t(block->size2[i]), rank = block->rank[i];
      if (oversize(q, block->size[i], block->size2[i])) {
        batch[i] = place_oversize(q, *block, i, open->plan_);
      } else if (const uint32_t key = rooms.find(size, size2, rank); key < kFits) {
        rooms.put(size2);
        const int place = int(key % kPlaces);
        batch[i] = open->number_[place];
        if (++open->count_[place] == q.max_samples || key < kPlaces)
          rooms.store(*open), open->close(place), rooms.load(*open);
      } else if (open->open_ == kUsed && kUsed < q.lookahead) {
        break;
      } else {
        rooms.store(*open), batch[i] = open->open(size, size2, rank), rooms.load(*open);
      }
      if (kRules && block->finished[i])
        rooms.store(*open), open->close_finished(rank, block->finished[i]), rooms.load(*open);
    }
    rooms.store(*open);
    return i;
  }
};

bool VectorBestFit::takes(const PackRequest& q) {
  constexpr int64_t kBudgets = int64_t(kFits) / kPlaces;
  return q.lookahead <= kPlaces && q.budget < kBudgets && (!q.sizes2 || q.budget2 < int64_t(kFits));
}

VectorBestFit::VectorBestFit(const PackRequest& q) : q_(q) {
  std::fill_n(key_, kPlaces, kFree);
  std::fill_n(room2_, kPlaces, 0u);
  std::fill_n(rank_, kPlaces, 0u);
}

uint32_t VectorBestFit::open(uint32_t size, uint32_t size2, uint32_t rank) {
  if (open_ == q_.lookahead) close(int(*std::min_element(key_, key_ + open_) % kPlaces));
  const int place = open_++;
  const uint32_t number = uint32_t(plan_.fill.size());
  plan_.fill.push_back(0);
  key_[place] = (uint32_t(q_.budget) - size) * kPlaces + uint32_t(place);
  room2_[place] = q_.sizes2 ? uint32_t(q_.budget2) - size2 : 0;
  rank_[place] = rank, number_[place] = number, count_[place] = 1;
  if (size == q_.budget || q_.max_samples == 1) close(place);
  return number;
}

void VectorBestFit::close(int place) {
  plan_.fill[number_[place]] = q_.budget - key_[place] / kPlaces;
  --open_;
  const auto close_up = [&](auto* values) { std::copy(values + place + 1, values + open_ + 1, values + place); };
  close_up(key_), close_up(room2_), close_up(rank_), close_up(number_), close_up(count_);
  for (int p = place; p < open_; ++p) --key_[p];  // it holds its place, which is one less
  key_[open_] = kFree;
}

void VectorBestFit::close_finished(uint32_t rank, uint8_t finished) {
  for (int place = open_ - 1; place >= 0; --place)
    if (is_finished(rank_[place], rank, finished)) close(place);
}

void VectorBestFit::pack(const Samples& samples, const Block& block, uint32_t* batch) {
  constexpr int kFew = 16;  // most epochs never need more
  const bool rules = q_.sizes2 || q_.segments;
  for (int64_t i = 0; i < block.n;) {
    if (open_ < kFew || q_.lookahead <= kFew)
      i = rules ? run_on_level<Kernel<kFew, true>>(this, &samples, &block, i, batch)
                : run_on_level<Kernel<kFew, false>>(this, &samples, &block, i, batch);
    else
      i = rules ? run_on_level<Kernel<kPlaces, true>>(this, &samples, &block, i, batch)
                : run_on_level<Kernel<kPlaces, false>>(this, &samples, &block, i, batch);
  }
}

PackPlan VectorBestFit::finish() {
  while (open_ > 0) close(open_ - 1);
  return std::move(plan_);
}

}  // namespace moeyard::cpu
