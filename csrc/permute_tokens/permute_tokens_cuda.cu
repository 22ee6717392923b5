// Two kernels with an optional dot product per slot do all four passes, and a third copies rows of any type.
//
// A team of threads works on one token: it keeps the token's words in registers while the rows of the token's slots go
// by. Teams are as large as the row is long, from one thread to a block, so that neighbouring threads touch
// neighbouring words. Nothing is shared between teams and there is no atomic sum: orders depend on sizes alone.
#include <algorithm>
#include <type_traits>
#include <utility>

#include "common/device.cuh"
#include "common/device_errors.hpp"
#include "common/words.cuh"
#include "permute_tokens/permute_tokens.hpp"

namespace moeyard::cuda {
namespace {

// ---- launch parameters ------------------------------------------------------------------------------------------

constexpr int kWarp = 32;
constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kSlots = 8;                      // of a token at a time: their rows, weights and dots stay in registers
constexpr int kWords = 4;                      // of a row per thread, for rows longer than a warp and up to a block
constexpr int kSumBlocks = 3, kDotBlocks = 2;  // per multiprocessor: leaves registers for kSlots words on their way

// ---- kernel -----------------------------------------------------------------------------------------------------

constexpr unsigned kFull = 0xffffffffu;

template <class T>
__device__ sum_t<T> to_sum(T v) {
  if constexpr (std::is_integral_v<T>)
    return sum_t<T>(v);
  else
    return widen(v);
}

template <class T>
__device__ T from_sum(sum_t<T> v) {
  if constexpr (std::is_integral_v<T>)
    return T(v);
  else
    return narrow<T>(v);
}

// A plan and how a grid is spread over it.
struct Move {
  Plan plan;
  int64_t words;        // of a row
  int team_bits;        // a team has 1 << team_bits threads
  int64_t free_blocks;  // the first blocks of the grid look for rows without a slot
  unsigned* errors;
};

// The token of this thread's team; past the last for the teams that have none.
__device__ int64_t team_token(const Move& m) {
  return ((int64_t(blockIdx.x) - m.free_blocks) * kThreads + threadIdx.x) >> m.team_bits;
}

__device__ int team_lane(const Move& m) { return int(threadIdx.x) & ((1 << m.team_bits) - 1); }

// The rows of kSlots slots of a token, from choice `first` on; -1 for none. What is out of range must not become an
// address. One look at the errors after all loads, for a branch after each would hold up the next.
__device__ void load_rows(const Move& m, int64_t token, int64_t first, int32_t (&row)[kSlots]) {
  const int32_t* const rows = m.plan.row_of_slot + token * m.plan.k + first;
  const int64_t slots = token < m.plan.tokens ? m.plan.k - first : 0;
#pragma unroll
  for (int j = 0; j < kSlots; ++j) row[j] = j < slots ? __ldg(rows + j) : -1;
  bool bad = false;
#pragma unroll
  for (int j = 0; j < kSlots; ++j) {
    const bool outside = row[j] < -1 || row[j] >= m.plan.rows;
    bad |= outside;
    row[j] = outside ? -1 : row[j];
  }
  if (bad) atomicOr(m.errors, unsigned(kBadPlan));
}

// The weights of the same slots: 0 for those without a row, 1 if there are no weights.
template <class Weight>
__device__ void load_weights(const Move& m, const Weight* weights, int64_t token, int64_t first,
                             const int32_t (&row)[kSlots], Weight (&weight)[kSlots]) {
#pragma unroll
  for (int j = 0; j < kSlots; ++j) {
    weight[j] = Weight(row[j] >= 0);
    if (weights && row[j] >= 0) weight[j] = __ldg(weights + token * m.plan.k + first + j);
  }
}

// Zeroes rows without a slot. Each lane looks at one row; if rows are long, the block's warps share the free ones of 32
// rows, else each warp has 32 of its own.
template <class W>
__device__ void zero_free_rows(const Move& m, W* out) {
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int shared_by = m.words > kWarp ? kWarps : 1;
  const int64_t base = (int64_t(blockIdx.x) * kWarps + warp) / shared_by * kWarp, row = base + lane;
  const int64_t slots = m.plan.tokens * m.plan.k;
  const int32_t slot = row < m.plan.rows ? m.plan.slot_of_row[row] : 0;
  const bool bad = row < m.plan.rows && (slot < -1 || slot >= slots);
  if (bad) atomicOr(m.errors, unsigned(kBadPlan));
  unsigned free_rows = __ballot_sync(kFull, slot == -1 || bad);
  for (int i = 0; free_rows; ++i, free_rows &= free_rows - 1) {
    if (i % shared_by != warp % shared_by) continue;
    W* const to = out + (base + __ffs(int(free_rows)) - 1) * m.words;
    for (int64_t c = lane; c < m.words; c += kWarp) store(to + c, W{});
  }
}

// Every token's words to the rows of its slots.
template <class W>
__global__ void __launch_bounds__(kThreads) copy_rows_kernel(const W* x, Move m, W* out) {
  if (blockIdx.x < m.free_blocks) return zero_free_rows(m, out);
  const int64_t token = team_token(m);
  if (token >= m.plan.tokens) return;
  for (int64_t first = 0; first < m.plan.k; first += kSlots) {
    int32_t row[kSlots];
    load_rows(m, token, first, row);
#pragma unroll 1  // else each thread divides 64-bit numbers, to know how often; eight stores wait on every load anyway
    for (int64_t c = team_lane(m); c < m.words; c += 1 << m.team_bits) {
      const W word = load(x + token * m.words + c);
#pragma unroll
      for (int j = 0; j < kSlots; ++j)
        if (row[j] >= 0) store(out + row[j] * m.words + c, word);
    }
  }
}

template <class T, int N>
struct Arrays {
  using Weight = sum_t<T>;
  const Word<T, N>* tokens;  // [tokens, words] what is spread, or what the dots are taken with
  const Word<T, N>* rows;    // [rows, words] likewise for combine
  const Weight* weights;     // [slots] or null
  Word<T, N>* out;           // null: the dots alone
  Weight* dots;              // [slots] or null
};

template <class T, int N>
__device__ void add_dot(const Word<T, N>& a, const Word<T, N>& b, sum_t<T>& dot) {
#pragma unroll
  for (int i = 0; i < N; ++i) dot += to_sum(a.item[i]) * to_sum(b.item[i]);
}

// The words of kSlots rows, all on their way before the first is used; zeros for slots without a row. Addresses are
// computed as numbers: that of a row which is not there is no place in the array.
template <class W>
__device__ void load_words(const W* rows, const int32_t (&row)[kSlots], int64_t words, int64_t c, W (&word)[kSlots]) {
#pragma unroll
  for (int j = 0; j < kSlots; ++j) {
    const auto at = reinterpret_cast<uintptr_t>(rows) + uintptr_t(row[j] * words + c) * sizeof(W);
    word[j] = load_if(row[j] >= 0, reinterpret_cast<const W*>(at));
  }
}

// Adds up what the team's threads have of the dots of kSlots slots, and writes them. For a whole block.
template <class Dot>
__device__ void write_dots(const Move& m, int64_t token, int64_t first, const int32_t (&row)[kSlots],
                           Dot (&dot)[kSlots], Dot* dots) {
  CU_SHARED(Dot, parts, [kWarps][kSlots]);
  const int team = 1 << m.team_bits, lane = team_lane(m), warp = int(threadIdx.x) / kWarp;
  const int64_t slots = token < m.plan.tokens ? m.plan.k - first : 0;
  Dot* const to = dots + token * m.plan.k + first;
#pragma unroll
  for (int j = 0; j < kSlots; ++j) dot[j] = row[j] >= 0 ? dot[j] : Dot(0);  // even where the token is NaN
  for (int d = min(team, kWarp) / 2; d; d /= 2)
#pragma unroll
    for (int j = 0; j < kSlots; ++j) dot[j] += __shfl_xor_sync(kFull, dot[j], d);
  if (team <= kWarp) {
#pragma unroll
    for (int j = 0; j < kSlots; ++j)
      if (j < slots && (j & (team - 1)) == lane) to[j] = dot[j];
    return;
  }
#pragma unroll
  for (int j = 0; j < kSlots; ++j)
    if (lane % kWarp == 0) parts[warp][j] = dot[j];
  __syncthreads();
  if (lane < kSlots && lane < slots) {
    Dot sum = parts[warp][lane];
    for (int w = 1; w < team / kWarp; ++w) sum += parts[warp + w][lane];
    to[lane] = sum;
  }
  __syncthreads();
}

// rows[row] = weight * token for the slots of every token, and the dots of the token with a.rows.
template <class T, int N, bool kDots>
__global__ void __launch_bounds__(kThreads, kDots ? kDotBlocks : kSumBlocks) spread_kernel(Arrays<T, N> a, Move m) {
  if (blockIdx.x < m.free_blocks) return zero_free_rows(m, a.out);
  const int64_t token = team_token(m), words = token < m.plan.tokens ? m.words : 0;
  for (int64_t first = 0; first < m.plan.k; first += kSlots) {
    int32_t row[kSlots];
    sum_t<T> weight[kSlots], dot[kSlots] = {};
    load_rows(m, token, first, row);
    load_weights(m, a.weights, token, first, row, weight);
#pragma unroll 1
    for (int64_t c = team_lane(m); c < words; c += 1 << m.team_bits) {
      const Word<T, N> x = load(a.tokens + token * words + c);
      Word<T, N> y[kSlots];
      if constexpr (kDots) load_words(a.rows, row, words, c, y);
#pragma unroll
      for (int j = 0; j < kSlots; ++j) {
        if constexpr (kDots) add_dot(x, y[j], dot[j]);
        if (!a.out || row[j] < 0) continue;
        Word<T, N> scaled;
#pragma unroll
        for (int i = 0; i < N; ++i) scaled.item[i] = from_sum<T>(weight[j] * to_sum(x.item[i]));
        store(a.out + row[j] * words + c, scaled);
      }
    }
    if constexpr (kDots) write_dots(m, token, first, row, dot, a.dots);
  }
}

template <class T, int N>
struct Total {
  sum_t<T> item[N];
};

// Adds weight * row in slot order. Slots without a row add 0 * 0, which changes no sum that began at +0.
template <bool kWeighted, class T, int N>
__device__ void add_words(const Word<T, N> (&word)[kSlots], const sum_t<T> (&weight)[kSlots], Total<T, N>& total) {
#pragma unroll
  for (int j = 0; j < kSlots; ++j)
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const sum_t<T> term = to_sum(word[j].item[i]);
      total.item[i] += kWeighted ? weight[j] * term : term;
    }
}

template <class T, int N>
__device__ void store_total(const Total<T, N>& total, Word<T, N>* to) {
  Word<T, N> word;
#pragma unroll
  for (int i = 0; i < N; ++i) word.item[i] = from_sum<T>(total.item[i]);
  store(to, word);
}

// out[token] = sum over its slots of weight * row.
template <bool kWeighted, class T, int N>
__global__ void __launch_bounds__(kThreads, kSumBlocks) combine_kernel(Arrays<T, N> a, Move m) {
  const int64_t token = team_token(m), k = m.plan.k;
  if (token >= m.plan.tokens) return;
  int32_t row[kSlots];
  sum_t<T> weight[kSlots];
  load_rows(m, token, 0, row);
  load_weights(m, a.weights, token, 0, row, weight);
  for (int64_t c = team_lane(m); c < m.words; c += 1 << m.team_bits) {
    Total<T, N> total{};
    for (int64_t first = 0; first < k; first += kSlots) {
      if (k > kSlots) {
        load_rows(m, token, first, row);
        load_weights(m, a.weights, token, first, row, weight);
      }
      Word<T, N> y[kSlots];
      load_words(a.rows, row, m.words, c, y);
      add_words<kWeighted>(y, weight, total);
    }
    store_total(total, a.out + token * m.words + c);
  }
}

// The dots of every token with the rows of its slots, and in the same pass the sums, if kSlots slots are enough.
template <class T, int N, bool kSums>
__global__ void __launch_bounds__(kThreads, kDotBlocks) combine_dots_kernel(Arrays<T, N> a, Move m) {
  const int64_t token = team_token(m), words = token < m.plan.tokens ? m.words : 0;
  for (int64_t first = 0; first < (kSums ? 1 : m.plan.k); first += kSlots) {
    int32_t row[kSlots];
    sum_t<T> weight[kSlots], dot[kSlots] = {};
    load_rows(m, token, first, row);
    if constexpr (kSums) load_weights(m, a.weights, token, first, row, weight);
    for (int64_t c = team_lane(m); c < words; c += 1 << m.team_bits) {
      const Word<T, N> x = load(a.tokens + token * words + c);
      Word<T, N> y[kSlots];
      load_words(a.rows, row, words, c, y);
#pragma unroll
      for (int j = 0; j < kSlots; ++j) add_dot(x, y[j], dot[j]);
      if constexpr (kSums) {
        Total<T, N> total{};
        add_words<true>(y, weight, total);
        store_total(total, a.out + token * words + c);
      }
    }
    write_dots(m, token, first, row, dot, a.dots);
  }
}

// ---- launcher ---------------------------------------------------------------------------------------------------

Move make_move(const Plan& plan, int64_t words, bool zeroes, unsigned* errors) {
  const int64_t threads = words <= kWarp ? words : std::max<int64_t>(kWarp, ceil_div(words, kWords));
  int bits = 0;
  while (1 << bits < std::min<int64_t>(threads, kThreads)) ++bits;
  const int64_t looked_at = words > kWarp ? kWarp : kThreads;  // rows of a block in zero_free_rows
  return {plan, words, bits, zeroes ? ceil_div(plan.rows, looked_at) : 0, errors};
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const Move& m, Stream stream, Args&&... args) {
  const int64_t blocks = m.free_blocks + ceil_div(m.plan.tokens << m.team_bits, kThreads);
  if (blocks) cu_launch(kernel, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, std::forward<Args>(args)...);
}

template <class W>
void copy_rows(const void* x, const Plan& plan, int64_t row_bytes, void* out, unsigned* errors, Stream stream) {
  const Move m = make_move(plan, row_bytes / int64_t(sizeof(W)), true, errors);
  launch(copy_rows_kernel<W>, m, stream, static_cast<const W*>(x), m, static_cast<W*>(out));
}

template <class T>
constexpr int kWide = kVector / int(sizeof(T));
template <class T>
constexpr int kNarrow = sizeof(T) == 2 ? 2 : 1;  // an even number of 16-bit elements

struct Pointers {
  const void *tokens, *rows, *weights;
  void *out, *dots;
};

// Calls run(arrays) with the widest words that all rows allow.
template <class T, class Run>
void with_words(const Pointers& p, int64_t features, Run&& run) {
  const auto arrays = [&]<int N>(std::integral_constant<int, N>) {
    using W = Word<T, N>;
    using Weight = const sum_t<T>;
    return Arrays<T, N>{static_cast<const W*>(p.tokens), static_cast<const W*>(p.rows), static_cast<Weight*>(p.weights),
                        static_cast<W*>(p.out), static_cast<sum_t<T>*>(p.dots)};
  };
  const int64_t bytes = word_bytes(features * int64_t(sizeof(T)), {p.tokens, p.rows, p.out});
  if (bytes == kVector) return run(arrays(std::integral_constant<int, kWide<T>>{}));
  if (kNarrow<T> > 1 && bytes >= kNarrow<T> * int64_t(sizeof(T)))
    return run(arrays(std::integral_constant<int, kNarrow<T>>{}));
  run(arrays(std::integral_constant<int, 1>{}));
}

template <class T, int N>
void spread(const Arrays<T, N>& a, const Plan& plan, int64_t features, unsigned* errors, Stream stream) {
  const Move m = make_move(plan, features / N, a.out, errors);
  if (a.dots)
    launch(spread_kernel<T, N, true>, m, stream, a, m);
  else
    launch(spread_kernel<T, N, false>, m, stream, a, m);
}

template <class T, int N>
void combine(const Arrays<T, N>& a, const Plan& plan, int64_t features, unsigned* errors, Stream stream) {
  const Move m = make_move(plan, features / N, false, errors);
  if constexpr (std::is_integral_v<T>) {
    launch(combine_kernel<false, T, N>, m, stream, a, m);
  } else {
    const bool dots = a.dots && plan.k > 0, together = dots && a.out && plan.k <= kSlots;
    if (together) return launch(combine_dots_kernel<T, N, true>, m, stream, a, m);
    if (dots) launch(combine_dots_kernel<T, N, false>, m, stream, a, m);
    if (!a.out) return;
    if (a.weights)
      launch(combine_kernel<true, T, N>, m, stream, a, m);
    else
      launch(combine_kernel<false, T, N>, m, stream, a, m);
  }
}

template <class F>
void with_sum_type(DType dtype, F&& f) {
  if (dtype == DType::i32) return f(int32_t{});
  if (dtype == DType::i64) return f(int64_t{});
  with_float_type(dtype, f);
}

}  // namespace

void permute_rows(const void* x, const Plan& plan, int64_t row_bytes, void* out, unsigned* errors, int device,
                  void* stream) {
  const LaunchScope scope("moeyard::permute_rows", device);
  if (row_bytes == 0) return;
  with_word(word_bytes(row_bytes, {x, out}), [&](auto word) {
    copy_rows<decltype(word)>(x, plan, row_bytes, out, errors, static_cast<Stream>(stream));
  });
}

void permute_weighted(const void* x, const void* weights, const void* y, const Plan& plan, int64_t features,
                      DType dtype, void* out, void* dots, unsigned* errors, int device, void* stream) {
  const LaunchScope scope("moeyard::permute_weighted", device);
  with_float_type(dtype, [&](auto zero) {
    with_words<decltype(zero)>({x, y, weights, out, dots}, features,
                               [&](const auto& a) { spread(a, plan, features, errors, static_cast<Stream>(stream)); });
  });
}

void unpermute_rows(const void* y, const void* weights, const void* x, const Plan& plan, int64_t features, DType dtype,
                    void* out, void* dots, unsigned* errors, int device, void* stream) {
  const LaunchScope scope("moeyard::unpermute_rows", device);
  with_sum_type(dtype, [&](auto zero) {
    with_words<decltype(zero)>({x, y, weights, out, dots}, features,
                               [&](const auto& a) { combine(a, plan, features, errors, static_cast<Stream>(stream)); });
  });
}

}  // namespace moeyard::cuda
