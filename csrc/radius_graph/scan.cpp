#include "radius_graph/scan.hpp"

#include "radius_graph/geometry.hpp"

#ifdef MOEYARD_X86
#include <immintrin.h>

#include <array>
#include <bit>
#endif

namespace moeyard::cpu {
namespace {

template <class T>
int64_t scan_baseline(const Columns<T>& block, const T* centre, T r2, int32_t self, int32_t* hits) {
  const T *px = block.x, *py = block.y, *pz = block.z;
  const int32_t* id = block.id;
  int64_t found = 0;
  for (int64_t k = 0; k < block.n; ++k) {
    const Vec3<T> d{px[k] - centre[0], py[k] - centre[1], pz[k] - centre[2]};
    hits[found] = id[k];
    found += (squared_norm(d) < r2) & (id[k] != self);
  }
  return found;
}

#ifdef MOEYARD_X86

// For each mask the lanes that are set, first ones first: AVX2 has no compress instruction.
template <int Lanes>
constexpr std::array<std::array<int32_t, 8>, (1 << Lanes)> compress_table() {
  std::array<std::array<int32_t, 8>, (1 << Lanes)> table{};
  for (int mask = 0; mask < (1 << Lanes); ++mask)
    for (int lane = 0, k = 0; lane < Lanes; ++lane)
      if (mask >> lane & 1) table[mask][k++] = lane;
  return table;
}
alignas(32) constexpr auto kCompress = compress_table<8>();

MOEYARD_TARGET_AVX2 inline int64_t compress_avx2(int32_t* hits, __m256i id, unsigned mask) {
  const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(kCompress[mask].data()));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(hits), _mm256_permutevar8x32_epi32(id, lanes));
  return std::popcount(mask);
}

MOEYARD_TARGET_AVX2 int64_t scan_avx2(const Columns<float>& block, const float* centre, float r2, int32_t self,
                                      int32_t* hits) {
  const __m256 x = _mm256_set1_ps(centre[0]), y = _mm256_set1_ps(centre[1]), z = _mm256_set1_ps(centre[2]);
  const __m256 limit = _mm256_set1_ps(r2);
  const __m256i me = _mm256_set1_epi32(self);
  int64_t found = 0;
  for (int64_t k = 0; k < block.n; k += 8) {
    const __m256 dx = _mm256_sub_ps(_mm256_loadu_ps(&block.x[k]), x),
                 dy = _mm256_sub_ps(_mm256_loadu_ps(&block.y[k]), y),
                 dz = _mm256_sub_ps(_mm256_loadu_ps(&block.z[k]), z);
    const __m256 d2 = _mm256_add_ps(_mm256_add_ps(_mm256_mul_ps(dx, dx), _mm256_mul_ps(dy, dy)), _mm256_mul_ps(dz, dz));
    const __m256i id = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(&block.id[k]));
    const __m256 mine = _mm256_castsi256_ps(_mm256_cmpeq_epi32(id, me));
    const __m256 near = _mm256_andnot_ps(mine, _mm256_cmp_ps(d2, limit, _CMP_LT_OQ));
    found += compress_avx2(hits + found, id, unsigned(_mm256_movemask_ps(near)));
  }
  return found;
}

MOEYARD_TARGET_AVX2 int64_t scan_avx2(const Columns<double>& block, const double* centre, double r2, int32_t self,
                                      int32_t* hits) {
  const __m256d x = _mm256_set1_pd(centre[0]), y = _mm256_set1_pd(centre[1]), z = _mm256_set1_pd(centre[2]);
  const __m256d limit = _mm256_set1_pd(r2);
  const __m128i me = _mm_set1_epi32(self);
  int64_t found = 0;
  for (int64_t k = 0; k < block.n; k += 4) {
    const __m256d dx = _mm256_sub_pd(_mm256_loadu_pd(&block.x[k]), x),
                  dy = _mm256_sub_pd(_mm256_loadu_pd(&block.y[k]), y),
                  dz = _mm256_sub_pd(_mm256_loadu_pd(&block.z[k]), z);
    const __m256d d2 =
        _mm256_add_pd(_mm256_add_pd(_mm256_mul_pd(dx, dx), _mm256_mul_pd(dy, dy)), _mm256_mul_pd(dz, dz));
    const __m128i id = _mm_loadu_si128(reinterpret_cast<const __m128i*>(&block.id[k]));
    const int mine = _mm_movemask_ps(_mm_castsi128_ps(_mm_cmpeq_epi32(id, me)));
    const int near = _mm256_movemask_pd(_mm256_cmp_pd(d2, limit, _CMP_LT_OQ)) & ~mine;
    found += compress_avx2(hits + found, _mm256_castsi128_si256(id), unsigned(near));
  }
  return found;
}

MOEYARD_TARGET_AVX512 int64_t scan_avx512(const Columns<float>& block, const float* centre, float r2, int32_t self,
                                          int32_t* hits) {
  const __m512 x = _mm512_set1_ps(centre[0]), y = _mm512_set1_ps(centre[1]), z = _mm512_set1_ps(centre[2]);
  const __m512 limit = _mm512_set1_ps(r2);
  const __m512i me = _mm512_set1_epi32(self);
  int64_t found = 0;
  for (int64_t k = 0; k < block.n; k += 16) {
    const __m512 dx = _mm512_sub_ps(_mm512_loadu_ps(&block.x[k]), x),
                 dy = _mm512_sub_ps(_mm512_loadu_ps(&block.y[k]), y),
                 dz = _mm512_sub_ps(_mm512_loadu_ps(&block.z[k]), z);
    const __m512 d2 = _mm512_add_ps(_mm512_add_ps(_mm512_mul_ps(dx, dx), _mm512_mul_ps(dy, dy)), _mm512_mul_ps(dz, dz));
    const __m512i id = _mm512_loadu_si512(&block.id[k]);
    const __mmask16 near = _mm512_mask_cmp_ps_mask(_mm512_cmpneq_epi32_mask(id, me), d2, limit, _CMP_LT_OQ);
    _mm512_storeu_si512(hits + found, _mm512_maskz_compress_epi32(near, id));
    found += std::popcount(unsigned(near));
  }
  return found;
}

MOEYARD_TARGET_AVX512 int64_t scan_avx512(const Columns<double>& block, const double* centre, double r2, int32_t self,
                                          int32_t* hits) {
  const __m512d x = _mm512_set1_pd(centre[0]), y = _mm512_set1_pd(centre[1]), z = _mm512_set1_pd(centre[2]);
  const __m512d limit = _mm512_set1_pd(r2);
  const __m256i me = _mm256_set1_epi32(self);
  int64_t found = 0;
  for (int64_t k = 0; k < block.n; k += 8) {
    const __m512d dx = _mm512_sub_pd(_mm512_loadu_pd(&block.x[k]), x),
                  dy = _mm512_sub_pd(_mm512_loadu_pd(&block.y[k]), y),
                  dz = _mm512_sub_pd(_mm512_loadu_pd(&block.z[k]), z);
    const __m512d d2 =
        _mm512_add_pd(_mm512_add_pd(_mm512_mul_pd(dx, dx), _mm512_mul_pd(dy, dy)), _mm512_mul_pd(dz, dz));
    const __m256i id = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(&block.id[k]));
    const __mmask8 near = _mm512_mask_cmp_pd_mask(_mm256_cmpneq_epi32_mask(id, me), d2, limit, _CMP_LT_OQ);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(hits + found), _mm256_maskz_compress_epi32(near, id));
    found += std::popcount(unsigned(near));
  }
  return found;
}

#endif

}  // namespace

template <class T>
Scan<T> pick_scan([[maybe_unused]] Simd level) {
#ifdef MOEYARD_X86
  if (level == Simd::avx512) return static_cast<Scan<T>>(scan_avx512);
  if (level == Simd::avx2) return static_cast<Scan<T>>(scan_avx2);
#endif
  return scan_baseline<T>;
}

template Scan<float> pick_scan<float>(Simd);
template Scan<double> pick_scan<double>(Simd);

}  // namespace moeyard::cpu
