// The score functions behind a C entry, so that a test can measure their error over whole ranges.
#include "common/score_math.hpp"

using namespace moeyard::score_math;

template <class A>
static void probe(int function, const A* x, A* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    switch (function) {
      case 0: out[i] = exp_nonpositive(x[i]); break;
      case 1: out[i] = log_positive(x[i]); break;
      case 2: out[i] = log1p_unit(x[i]); break;
      case 3: out[i] = sigmoid(x[i]); break;
      case 4: out[i] = softplus(x[i]); break;
      case 5: out[i] = sqrtsoftplus(x[i]); break;
      case 6: out[i] = sigmoid_slope(x[i]); break;
      default: out[i] = sqrtsoftplus_slope(x[i]); break;
    }
  }
}

#ifdef _WIN32
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C"
#endif
EXPORT void probe_f32(int function, const float* x, float* out, int64_t n) { probe(function, x, out, n); }
EXPORT void probe_f64(int function, const double* x, double* out, int64_t n) { probe(function, x, out, n); }
