// Prints a digest of everything that some kernels write, one line per case: equal digests are equal bits.
// Floating-point kernels only, and data from integer arithmetic, so that nothing but the kernels can differ between two
// machines.
#include <cstdio>
#include <cstring>
#include <vector>

#include "radius_graph/radius_graph.hpp"
#include "topk_gating/topk_gating.hpp"

using namespace moeyard;

namespace {

struct Random {
  uint64_t state = 42;
  double operator()() {  // in [-1, 1)
    state = state * 6364136223846793005u + 1442695040888963407u;
    return double(state >> 11) / double(uint64_t(1) << 52) - 1;
  }
};

template <class T>
std::vector<T> numbers(size_t count, double scale) {
  Random random;
  std::vector<T> x(count);
  for (T& v : x) v = from_float<T>(acc_t<T>(random() * scale));
  return x;
}

uint64_t digest = 0;
template <class T>
void add(const std::vector<T>& x) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(x.data());
  for (size_t i = 0; i < x.size() * sizeof(T); ++i) digest = (digest ^ bytes[i]) * 1099511628211u;
}

void print(const char* kernel, const char* what, int number) {
  std::printf("%s %s %d: %016llx\n", kernel, what, number, static_cast<unsigned long long>(digest));
  digest = 0;
}

template <class T>
void gating(DType dtype, Score score) {
  using A = acc_t<T>;
  const int64_t rows = 700, experts = 67, k = 5;
  const size_t slots = size_t(rows * k), columns = size_t(experts);
  const GatingProblem problem{dtype, rows, experts, k, score, true, 1.5};
  const std::vector<T> logits = numbers<T>(size_t(rows * experts), 4);
  std::vector<A> weights(slots), score_sum(columns), weight_sum(columns), logsumexp_sq(1), entropy_sum(1);
  std::vector<int32_t> ids(slots), counts(columns);
  cpu::topk_gating(problem, {logits.data(), nullptr, nullptr, nullptr},
                   {weights.data(), ids.data(), counts.data(), score_sum.data(), weight_sum.data(), logsumexp_sq.data(),
                    entropy_sum.data()},
                   2);
  add(weights), add(ids), add(counts), add(score_sum), add(weight_sum), add(logsumexp_sq), add(entropy_sum);
  std::vector<T> grad(logits.size());
  cpu::topk_gating_backward(
      problem, logits.data(), ids.data(), nullptr,
      {weights.data(), score_sum.data(), weight_sum.data(), logsumexp_sq.data(), entropy_sum.data()}, grad.data(), 2);
  add(grad);
  print("topk_gating", sizeof(T) == 8 ? "float64" : sizeof(T) == 4 ? "float32" : "half", int(dtype) * 10 + int(score));
}

template <class T>
void edges(DType dtype, bool periodic, RadiusOptions options) {
  const int64_t n = 900;
  const std::vector<T> xyz = numbers<T>(size_t(3 * n), 9);
  const std::vector<T> cell = {T(17), T(0.3), 0, 0, T(18.5), T(-1), T(0.1), 0, T(19)};
  const PointSet points{xyz.data(), n};
  const Periodicity box{periodic ? cell.data() : nullptr};
  const cpu::RadiusHits hits = cpu::radius_graph_search(dtype, points, {}, box, options, 2);
  const size_t m = size_t(hits.num_edges);
  std::vector<int64_t> centre(m), neighbour(m);
  std::vector<T> distance(m), vector(3 * m);
  std::vector<int32_t> shift(periodic ? 3 * m : 0), degrees(static_cast<size_t>(n));
  std::vector<int64_t> totals(2);
  bool overflow = true;
  cpu::radius_graph_fill(hits, dtype, points, {}, box,
                         {hits.num_edges, centre.data(), neighbour.data(), distance.data(), vector.data(),
                          periodic ? shift.data() : nullptr, degrees.data(), &totals[0], &totals[1], &overflow},
                         2);
  add(centre), add(neighbour), add(distance), add(vector), add(shift), add(degrees), add(totals);
  print("radius_graph", sizeof(T) == 8 ? "float64" : "float32", int(m));
}

template <class T>
void all_edges(DType dtype) {
  for (bool periodic : {false, true}) {
    edges<T>(dtype, periodic, {.r = 3.0});
    edges<T>(dtype, periodic, {.r = 3.0, .max_neighbors = 7, .symmetric = true});
    edges<T>(dtype, periodic, {.k = 9});
  }
}

}  // namespace

int main() {
  for (Score score : {Score::softmax, Score::softmax_topk, Score::sigmoid, Score::sqrtsoftplus}) {
    gating<float>(DType::f32, score);
    gating<double>(DType::f64, score);
    gating<bf16>(DType::bf16, score);
    gating<f16>(DType::f16, score);
  }
  all_edges<float>(DType::f32);
  all_edges<double>(DType::f64);
}
