#include "radius_graph/radius_graph.hpp"

#include <array>
#include <cmath>
#include <limits>

#include "radius_graph/emit.hpp"
#include "radius_graph/search_graph.hpp"

namespace moeyard::cpu {

RadiusHits::RadiusHits() = default;
RadiusHits::RadiusHits(RadiusHits&&) noexcept = default;
RadiusHits::~RadiusHits() = default;

namespace {

// Graphs at least this large are searched by all threads together, one after the other; smaller ones are tasks.
constexpr int64_t kLargeGraph = 1 << 14;
constexpr int64_t kTaskPoints = 1 << 11;
constexpr int64_t kFillGrain = 1 << 11;

int64_t size_of(const Graph& g) { return (g.end - g.begin) + (g.centre_end - g.centre_begin); }

// Small graphs in tasks of about kTaskPoints points, then the large ones.
template <class T>
void search_graphs(const SearchCall<T>& call, const std::vector<Graph>& graphs, int threads) {
  std::vector<size_t> bounds{0};
  int64_t points = 0;
  for (size_t g = 0; g < graphs.size(); ++g) {
    points += size_of(graphs[g]) < kLargeGraph ? size_of(graphs[g]) : 0;
    if (points >= kTaskPoints || g + 1 == graphs.size()) bounds.push_back(g + 1), points = 0;
  }
  Worker<T> own(call.store);
  share(call.store, own, int64_t(bounds.size()) - 1, 1, threads, [&](Worker<T>& worker, int64_t begin, int64_t end) {
    for (size_t g = bounds[size_t(begin)]; g < bounds[size_t(end)]; ++g)
      if (size_of(graphs[g]) < kLargeGraph) GraphSearch<T>(call, graphs[g]).run(worker, 1);
  });
  for (const Graph& g : graphs)
    if (size_of(g) >= kLargeGraph) GraphSearch<T>(call, g).run(own, threads);
}

// ---- symmetric selection: the union of every centre's choice and of those that chose it ---------------------------

template <int Stride>
std::unique_ptr<HitStore> symmetrize(const HitStore& chosen, int threads) {
  using Hit = std::array<int32_t, Stride>;
  const int64_t n = chosen.centres();
  const auto for_each = [&](int64_t i, auto&& f) {
    for (const int32_t *at = chosen.hits(i), *end = at + chosen.count(i) * Stride; at != end; at += Stride) {
      Hit hit;
      std::copy(at, at + Stride, hit.begin());
      f(hit);
    }
  };
  std::vector<int64_t> end(size_t(n + 1), 0);  // of the edges into a centre's list, once they are in place
  for (int64_t i = 0; i < n; ++i) for_each(i, [&](const Hit& hit) { ++end[size_t(hit[0] + 1)]; });
  for (int64_t i = 0; i < n; ++i) end[size_t(i + 1)] += end[size_t(i)];
  std::vector<Hit> reversed(static_cast<size_t>(end.back()));
  for (int64_t i = 0; i < n; ++i)
    for_each(i, [&](const Hit& hit) {
      Hit back = hit;
      back[0] = int32_t(i);
      for (int k = 1; k < Stride; ++k) back[size_t(k)] = -hit[size_t(k)];
      reversed[size_t(end[size_t(hit[0])]++)] = back;
    });
  auto both = std::make_unique<HitStore>(n, Stride);
  parallel_for(n, kFillGrain, threads, [&](int64_t begin, int64_t stop) {
    HitWriter writer(*both);
    std::vector<Hit> hits;
    for (int64_t i = begin; i < stop; ++i) {
      hits.assign(reversed.begin() + (i ? end[size_t(i - 1)] : 0), reversed.begin() + end[size_t(i)]);
      for_each(i, [&](const Hit& hit) { hits.push_back(hit); });
      std::sort(hits.begin(), hits.end());
      hits.erase(std::unique(hits.begin(), hits.end()), hits.end());
      int32_t* out = writer.room(int64_t(hits.size()));
      for (const Hit& hit : hits) out = std::copy(hit.begin(), hit.end(), out);
      writer.keep(i, int64_t(hits.size()));
    }
  });
  return both;
}

// ---- search ---------------------------------------------------------------------------------------------------

template <class T>
RadiusHits search(const PointSet& points, const PointSet& centres, const Periodicity& periodic,
                  const RadiusOptions& options, int threads) {
  const bool same = centres.xyz == nullptr;
  check_request<T>(points, centres, periodic, options);
  check_finite<T>(points, point_names(!same).xyz, threads);
  if (!same) check_finite<T>(centres, centre_names().xyz, threads);
  const PointSet& homes = same ? points : centres;
  const std::vector<Graph> graphs = match_graphs(points, centres);

  RadiusHits hits;
  hits.store = std::make_unique<HitStore>(homes.count, periodic.cell ? 4 : 1);
  if (!same) hits.store->clear();
  std::atomic<int64_t> truncated{0};
  const Pairs<T> pairs{static_cast<const T*>(points.xyz), static_cast<const T*>(homes.xyz), same};
  const T r = T(options.r);
  const SearchCall<T> call{
      pairs, r * r, options, periodic, pick_scan<T>(simd_level()), pick_order(simd_level()), *hits.store, truncated};
  search_graphs(call, graphs, threads);
  hits.num_edges = hits.store->finish();
  if (options.symmetric && options.max_neighbors > 0) {
    hits.store = periodic.cell ? symmetrize<4>(*hits.store, threads) : symmetrize<1>(*hits.store, threads);
    hits.num_edges = hits.store->finish();
  }
  hits.truncated = truncated;
  return hits;
}

}  // namespace

RadiusHits radius_graph_search(DType dtype, const PointSet& points, const PointSet& centres,
                               const Periodicity& periodic, const RadiusOptions& options, int threads) {
  return dtype == DType::f64 ? search<double>(points, centres, periodic, options, threads)
                             : search<float>(points, centres, periodic, options, threads);
}

void radius_graph_fill(const RadiusHits& hits, DType dtype, const PointSet& points, const PointSet& centres,
                       const Periodicity& periodic, const RadiusOutputs& out, int threads) {
  *out.truncated = hits.truncated;
  *out.num_edges = hits.num_edges;
  *out.overflow = hits.num_edges > out.capacity;
  dtype == DType::f64 ? emit<double>(*hits.store, points, centres, periodic, out, threads)
                      : emit<float>(*hits.store, points, centres, periodic, out, threads);
}

}  // namespace moeyard::cpu
