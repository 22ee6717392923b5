// Turns what a search found into the outputs: indices widened in order of the centres, then the geometry of the edges
// that were just written, while they are still in the nearest cache.
#pragma once
#include <cstdint>

#include "radius_graph/hit_store.hpp"
#include "radius_graph/radius_graph.hpp"

namespace moeyard::cpu {

/// Fills `out` from the hits of a search with the same arguments.
template <class T>
void emit(const HitStore& store, const PointSet& points, const PointSet& centres, const Periodicity& periodic,
          const RadiusOutputs& out, int threads);

}  // namespace moeyard::cpu
