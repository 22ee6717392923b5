// Choosing the best of a row, by a team of lanes. A key is NaN for an expert that must not be chosen, -inf for one that
// may only fill up when nothing better is left, and any other number for a candidate. Order: key descending, then
// expert ascending; -0 and +0 are equal.
#pragma once
#include "topk_gating/gate_row.cuh"

namespace moeyard::cuda {
namespace {

/// The keys of a team lie in shared memory, four to a chunk, where a lane can index them; their largest per chunk in
/// registers. A lane touches nothing but its own chunks, so no barrier is needed.
template <class Team>
struct TeamKeys {
  float* key;  ///< of the warp: [chunk][lane][4]
  float top[Team::chunks];

  /// The keys of the lane's entries; those for which kept(m) does not hold must not be chosen.
  template <class Kept>
  __device__ void fill(const Team& team, const float (&keys)[Team::count], Kept kept) {
#pragma unroll
    for (int n = 0; n < Team::chunks; ++n) {
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = kept(4 * n + i) ? keys[4 * n + i] : kNaN<float>;
      *reinterpret_cast<float4*>(key + team.place(team.lane, 4 * n)) = make_float4(v[0], v[1], v[2], v[3]);
      top[n] = fmaxf(fmaxf(v[0], v[1]), fmaxf(v[2], v[3]));
    }
  }

  /// Entry m of the calling lane is not to be chosen any more.
  __device__ void remove(const Team& team, int m) {
    float* chunk = key + team.place(team.lane, m / 4 * 4);
    chunk[m % 4] = kNaN<float>;
    const float4 v = *reinterpret_cast<const float4*>(chunk);
    const float left = fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w));
#pragma unroll
    for (int n = 0; n < Team::chunks; ++n) top[n] = n == m / 4 ? left : top[n];
  }

  /// The best expert, which is taken out where `take` holds.
  __device__ int next(const Team& team, bool take) {
    float best = top[0];
#pragma unroll
    for (int n = 1; n < Team::chunks; ++n) best = fmaxf(best, top[n]);
    best = team_max<Team::lanes>(best);
    int chunk = -1;
#pragma unroll
    for (int n = Team::chunks - 1; n >= 0; --n) chunk = top[n] == best ? n : chunk;
    int m = 0, expert = INT_MAX;
    if (chunk >= 0) {
      const float4 v = *reinterpret_cast<const float4*>(key + team.place(team.lane, 4 * chunk));
      m = 4 * chunk + (v.x == best ? 0 : v.y == best ? 1 : v.z == best ? 2 : 3);
      expert = team.expert(m);
    }
    const int winner = team_min<Team::lanes>(expert);
    if (take && expert == winner) remove(team, m);
    return winner;
  }
};

/// Group-limited selection (DeepSeek-V3, arXiv:2412.19437, section 2.1.2) where a group is some blocks of 32 experts:
/// a bit for each of the best `topk_groups` groups. A group's value is the sum of its best one or two candidates.
template <class Team>
__device__ unsigned kept_groups(const GatingProblem& g, const Team& team, const float (&keys)[Team::count]) {
  const int groups = int(g.num_groups), size = int(g.experts) / groups / kLanes;  // in blocks
  float own = kLowest<float>, first = kLowest<float>, second = kLowest<float>;
  int group = 0, left = size;
#pragma unroll
  for (int b = 0; b < Team::blocks; ++b) {
#pragma unroll
    for (int c = 0; c < Team::run; ++c) {
      const float v = keys[b * Team::run + c];
      second = fmaxf(second, fminf(first, v));
      first = fmaxf(first, v);
    }
    if (--left > 0) continue;
#pragma unroll
    for (int d = Team::lanes / 2; d > 0; d /= 2) {
      const float a = __shfl_xor_sync(kAllLanes, first, d), b = __shfl_xor_sync(kAllLanes, second, d);
      second = fmaxf(fminf(first, a), fmaxf(second, b));
      first = fmaxf(first, a);
    }
    float sum = 0.0f + first;
    if (g.group_score_experts == 2 && second > kLowest<float>) sum += second;
    // A group without a candidate ranks below every other, even below one whose sum overflows.
    if (team.lane == group)
      own = first > kLowest<float> ? fmaxf(sum, -score_math::Format<float>::largest) : kLowest<float>;
    ++group, left = size, first = second = kLowest<float>;
  }
  int better = 0;
  for (int n = 0; n < groups; ++n) {
    const float other = __shfl_sync(kAllLanes, own, n, Team::lanes);
    better += other > own || (other == own && n < team.lane);
  }
  return team.mine(__ballot_sync(kAllLanes, team.lane < groups && better < g.topk_groups));
}

/// Calls `kept(m)` for the entries whose group has its bit.
template <class Team>
struct KeptEntries {
  unsigned bits;  ///< of the lane's blocks
  __device__ KeptEntries(const GatingProblem& g, unsigned groups) : bits(kAllLanes) {
    if (g.num_groups == 0) return;
    const int size = int(g.experts / g.num_groups) / kLanes;
    bits = 0;
    int group = 0, left = size;
#pragma unroll
    for (int b = 0; b < Team::blocks; ++b) {
      bits |= (groups >> group & 1u) << b;
      if (--left == 0) ++group, left = size;
    }
  }
  __device__ bool operator()(int m) const { return bits >> (m / Team::run) & 1u; }
};

/// The slots of a team's row: slot s = lane + L r is id[r] of a lane, -1 while it is free.
template <class Team>
struct TeamSlots {
  int id[Team::run];

  __device__ static int slot(const Team& team, int r) { return team.lane + Team::lanes * r; }

  /// id of slot s, for all lanes of the team.
  __device__ int at(int s) const {
    int mine = id[0];
#pragma unroll
    for (int r = 1; r < Team::run; ++r) {
      const int other = id[r];  // read in any case: a choice between reads puts the array into memory
      mine = s / Team::lanes == r ? other : mine;
    }
    return __shfl_sync(kAllLanes, mine, s % Team::lanes, Team::lanes);
  }
  __device__ void put(const Team& team, int s, int expert) {
#pragma unroll
    for (int r = 0; r < Team::run; ++r) id[r] = s == slot(team, r) ? expert : id[r];
  }
  /// A bit for each free slot.
  __device__ unsigned free(const Team& team) const {
    unsigned bits = 0;
#pragma unroll
    for (int r = 0; r < Team::run; ++r) bits |= team.mine(__ballot_sync(kAllLanes, id[r] < 0)) << Team::lanes * r % 32;
    return bits;
  }

  /// Reads the forced ids of row t, row and columns of `forced`; what is wrong counts as free.
  __device__ void load_forced(const GatingProblem& g, const int64_t* forced, int64_t t, bool live, const Team& team,
                              unsigned* errors) {
#pragma unroll
    for (int r = 0; r < Team::run; ++r) {
      const int s = slot(team, r);
      const int64_t v = live && s < g.forced_slots ? forced[t * g.forced_slots + s] : -1;
      const bool wrong = v < -1 || v >= g.experts;
      if (wrong) atomicOr(errors, unsigned(kBadForcedId));
      id[r] = wrong ? -1 : int(v);
    }
    for (int s = 0; s < int(g.forced_slots); ++s) {
      const int v = at(s);
#pragma unroll
      for (int r = 0; r < Team::run; ++r) {
        if (v < 0 || id[r] != v || slot(team, r) <= s) continue;
        atomicOr(errors, unsigned(kRepeatedForcedId));
        id[r] = -1;
      }
    }
  }

  /// Fills the free slots among the first k with the best of the keys, in order.
  __device__ void choose(const GatingProblem& g, const Team& team, TeamKeys<Team>& keys) {
    for (int s = 0; s < int(g.forced_slots); ++s) {
      const int v = at(s);
      if (v >= 0 && Team::owner(v) == team.lane) keys.remove(team, Team::entry(v));
    }
    const unsigned open = free(team);
#pragma unroll 1
    for (int s = 0; s < int(g.k); ++s) {
      const bool take = open >> s & 1u;
      if (!__any_sync(kAllLanes, take)) continue;
      const int expert = keys.next(team, take);
      if (take) put(team, s, expert);
    }
  }
};

/// The keys of a team as integers of which no two are equal: a key's upper bits, in its order, then the expert, lowest
/// last. To choose by them takes a quarter of the instructions, and no memory. Where two keys that differ share the
/// upper bits, and an order between them matters, they cannot tell.
template <class Team>
struct ShortKeys {
  static constexpr unsigned ids = Team::span - 1;
  unsigned key[Team::count];

  /// Of keys that are not NaN; kept(m), unless `all`: whether the lane's entry m may be chosen.
  template <class Kept>
  __device__ ShortKeys(const Team& team, const float (&keys)[Team::count], bool all, Kept kept) {
#pragma unroll
    for (int m = 0; m < Team::count; ++m) {
      const int bits = __float_as_int(keys[m] + 0.0f);  // -0 is made +0
      const unsigned ordered = unsigned(bits ^ (bits >> 31 | INT_MIN));
      key[m] = (ordered & ~ids) | (ids - unsigned(team.expert(m)));
    }
    if (all) return;
#pragma unroll
    for (int m = 0; m < Team::count; ++m) key[m] = kept(m) ? key[m] : 0;
  }

  /// The best expert of every team after `last`, all of them as keys.
  __device__ unsigned next(unsigned last) const {
    // Minus `last`, modulo 2^32, those below it exceed all others: nothing has to be taken out.
    unsigned best[2] = {0 - last, 0 - last};  // two chains, each half as long
#pragma unroll
    for (int m = 0; m < Team::count; ++m) best[m % 2] = add_max(key[m], 0 - last, best[m % 2]);
    return team_max<Team::lanes>(max(best[0], best[1]) + last);
  }

  /// Fills k slots, by way of `chosen`: the warp's memory for 32 slots per team. False if the keys cannot tell, of
  /// which nothing is known where `all_tell` (the lower bits are alike) or, in one team, where the row is not live.
  __device__ bool choose(int k, bool all_tell, bool live, const Team& team, int* chosen, int (&id)[Team::run]) const {
    int* const own = chosen + team.index * kTeamSlots;
    unsigned last = 0, nearest = UINT_MAX;
#pragma unroll 1
    for (int s = 0; s < k; ++s) {
      const unsigned best = next(last);
      if (team.lane == 0) own[s] = int(ids - (best & ids));
      nearest = min(nearest, best ^ last);
      last = best;
    }
    if (!all_tell) {
      nearest = min(nearest, next(last) ^ last);
      if (__any_sync(kAllLanes, live && nearest <= ids)) return false;
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < Team::run; ++r)
      if (TeamSlots<Team>::slot(team, r) < k) id[r] = own[TeamSlots<Team>::slot(team, r)];
    __syncwarp();
    return true;
  }
};

}  // namespace
}  // namespace moeyard::cuda
