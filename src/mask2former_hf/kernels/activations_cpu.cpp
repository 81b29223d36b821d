// What stands between the two products of a feed-forward block's backward pass, on CPUs in float32.
//
// Of the wide rows before the activation and the gradients after it one pass makes the activated rows, for the second
// weight's gradient, the gradients before it, and their sums over the rows, the first bias' gradient. torch takes three
// passes, and GELU's exponential twice; in bfloat16, where less has to be moved, it is faster. Sums are of blocks of rows
// and then of those in order, so that they do not depend on the number of threads.
// Layouts (row-major): wide, gradient, activated and of_wide (N, W), sums (W); activated may be wide, of_wide gradient.

#include <vector>

#include "cpu_vectors.h"

namespace {

constexpr int64_t kElements = 1 << 16;  // of a task

struct Rows {
  const float* wide;
  const float* gradient;
  float* activated;  // unused for ReLU: the wide rows are rectified already
  float* of_wide;
  int64_t N, W;
};

// x Phi(x) and its derivative Phi(x) + x phi(x), with erf to 1.5e-7 (Abramowitz and Stegun, 7.1.26).
INLINE void gelu(vec x, vec* value, vec* derivative) {
  const vec none = {}, distance = x < none ? -x : x;
  const vec t = 1.0f / (1.0f + distance * (0.3275911f * 0.70710678f));
  const vec bell = exp_of_negative(x * x * -0.5f);
  vec tail = t * 1.061405429f - 1.453152027f;
  tail = tail * t + 1.421413741f;
  tail = tail * t - 0.284496736f;
  tail = (tail * t + 0.254829592f) * t * bell * 0.5f;  // Phi(-|x|)
  const vec phi = x < none ? tail : 1.0f - tail;
  *value = x * phi;
  *derivative = phi + x * bell * 0.39894228f;
}

template <bool GELU>
INLINE void block(const Rows& p, int64_t first, int64_t last, float* sums) {
  for (int64_t row = first; row < last; ++row)
    for (int64_t k = 0; k < p.W; k += 8) {
      const int64_t at = row * p.W + k;
      const vec x = load(p.wide + at), none = {};
      vec of_x = load(p.gradient + at);
      if constexpr (GELU) {
        vec value, derivative;
        gelu(x, &value, &derivative);
        store(p.activated + at, value);
        of_x *= derivative;
      } else {
        of_x = x <= none ? none : of_x;  // as torch, for NaN
      }
      store(p.of_wide + at, of_x);
      store(sums + k, load(sums + k) + of_x);
    }
}

CLONES void gelu_block(const Rows& p, int64_t first, int64_t last, float* sums) { block<true>(p, first, last, sums); }
CLONES void relu_block(const Rows& p, int64_t first, int64_t last, float* sums) { block<false>(p, first, last, sums); }

}  // namespace

extern "C" {

// W is a multiple of eight.
void msda_activation_backward(const float* wide, const float* gradient, int64_t N, int64_t W, int64_t gelu,
                              int64_t threads, float* activated, float* of_wide, float* sums) {
  const Rows p{wide, gradient, activated, of_wide, N, W};
  const int64_t rows = std::max<int64_t>(1, kElements / W), tasks = (N + rows - 1) / rows;
  std::vector<float> own(tasks * W);
  parallel(tasks, threads, [&](int64_t i) {
    const int64_t first = i * rows, last = std::min(first + rows, N);
    gelu ? gelu_block(p, first, last, own.data() + i * W) : relu_block(p, first, last, own.data() + i * W);
  });
  for (int64_t i = 0; i < tasks; ++i)
    for (int64_t k = 0; k < W; ++k) sums[k] += own[i * W + k];
}
}
