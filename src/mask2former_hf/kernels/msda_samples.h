// A problem of deformable attention, and from its positions and weights the rows to read and what they weigh.

#pragma once

#include <cmath>

#include "cpu_vectors.h"

namespace {

constexpr int64_t kMaxSamples = 64, kLanes = 256;  // L * P of one head; samples that are prepared together

struct Problem {
  const void* value;
  const void* positions;   // offsets in pixels (fused) or locations in [0, 1]
  const void* weights;     // logits (fused) or weights, in the dtype of positions
  const float* reference;  // (Q, 2), fused only
  const uint8_t* padding;  // (B, S), nonzero rows count as zero; may be null
  const int64_t* shapes;   // (L, 2) as (H, W)
  const int64_t* sizes;    // the seven below
  int64_t fused, bfloat16, bfloat16_positions;  // 1 or 0
  const int64_t B = sizes[0], S = sizes[1], Q = sizes[2], h = sizes[3], D = sizes[4], L = sizes[5], P = sizes[6];
};

// What depends only on the sample's number within a query and head: its level's size and first row.
struct Levels {
  float width[kMaxSamples], height[kMaxSamples];
  int32_t start[kMaxSamples];
  float real[kMaxSamples];  // 1, or 0 beyond the samples
};

// The samples of a head of some queries: arrays, because every step is taken for all, eight or sixteen at a time, while
// one query's steps would wait for one another. The samples of each are padded to a multiple of eight.
struct Samples {
  int32_t row[4][kLanes];   // rows of the corners: left and right above, left and right below
  float weight[4][kLanes];  // of the corner's row in the output: its bilinear weight, 0 outside, times the attention
  float inside[4][kLanes];  // 1, or 0 for a corner outside the map; for gradients only
  float x[kLanes], y[kLanes], attention[kLanes];
};

Levels levels_of(const Problem& p) {
  Levels levels{};
  int64_t start = 0, i = 0;
  for (int64_t l = 0; l < p.L; ++l) {
    for (int64_t point = 0; point < p.P; ++point, ++i) {
      levels.width[i] = static_cast<float>(p.shapes[2 * l + 1]);
      levels.height[i] = static_cast<float>(p.shapes[2 * l]);
      levels.start[i] = static_cast<int32_t>(start);
      levels.real[i] = 1;
    }
    start += p.shapes[2 * l] * p.shapes[2 * l + 1];
  }
  for (; i < kMaxSamples; ++i) levels.width[i] = levels.height[i] = 1;
  return levels;
}

constexpr int64_t padded_to_eight(int64_t count) { return (count + 7) / 8 * 8; }
// From positions in pixels to rows and weights, of lanes [at, at + padded). Corners outside get weight 0 and the row of
// a cell inside: no branch.
template <bool GRADIENT>
INLINE void corners(int64_t padded, const Levels& levels, int64_t at, Samples& s) {
  for (int64_t i = 0; i < padded; ++i) {
    const int64_t j = at + i;
    const float W = levels.width[i], H = levels.height[i], px = s.x[j], py = s.y[j];
    const bool near = (px > -1) & (px < W) & (py > -1) & (py < H);  // false for NaN
    const float x = near ? px : 0, y = near ? py : 0, valid = near ? 1.0f : 0.0f;
    const int32_t left = static_cast<int32_t>(x + 1) - 1, top = static_cast<int32_t>(y + 1) - 1;
    const int32_t width = static_cast<int32_t>(W), height = static_cast<int32_t>(H);
    const int32_t near_left = left < 0 ? 0 : left, near_right = left + 1 < width ? left + 1 : width - 1;
    const int32_t upper = levels.start[i] + (top < 0 ? 0 : top) * width;
    const int32_t lower = levels.start[i] + (top + 1 < height ? top + 1 : height - 1) * width;
    const float in_left = left >= 0 ? valid : 0, in_right = left + 1 < width ? valid : 0;
    const float in_top = top >= 0 ? 1.0f : 0, in_bottom = top + 1 < height ? 1.0f : 0;
    const float fx = x - static_cast<float>(left), fy = y - static_cast<float>(top), attention = s.attention[j];
    s.row[0][j] = upper + near_left, s.row[1][j] = upper + near_right;
    s.row[2][j] = lower + near_left, s.row[3][j] = lower + near_right;
    s.weight[0][j] = attention * (in_top * in_left * (1 - fx) * (1 - fy));
    s.weight[1][j] = attention * (in_top * in_right * fx * (1 - fy));
    s.weight[2][j] = attention * (in_bottom * in_left * (1 - fx) * fy);
    s.weight[3][j] = attention * (in_bottom * in_right * fx * fy);
    if (!GRADIENT) continue;
    s.x[j] = fx, s.y[j] = fy;
    s.inside[0][j] = in_top * in_left, s.inside[1][j] = in_top * in_right;
    s.inside[2][j] = in_bottom * in_left, s.inside[3][j] = in_bottom * in_right;
  }
}

// Positions and weights of `count` samples as they were given; beyond them minus infinity for a weight.
template <typename T, int COUNT>
INLINE void read(const Problem& p, int64_t item, float* x, float* y, float* weight) {
  const int64_t count = COUNT ? COUNT : p.L * p.P, padded = padded_to_eight(count);
  const T* positions = static_cast<const T*>(p.positions) + item * count * 2;
  const T* weights = static_cast<const T*>(p.weights) + item * count;
  for (int64_t i = 0; i < count; ++i) x[i] = load_one(positions + 2 * i), y[i] = load_one(positions + 2 * i + 1);
  for (int64_t i = 0; i < count; ++i) weight[i] = load_one(weights + i);
  for (int64_t i = count; i < padded; ++i) x[i] = y[i] = -2, weight[i] = -INFINITY;
}

// Softmax of `padded` logits in place. Largest and total are found in a tree: a chain would take 4 cycles a step.
INLINE void softmax(int64_t padded, const Levels& levels, float* x) {
  vec largest = load(x);
  for (int64_t i = 8; i < padded; i += 8) largest = largest > load(x + i) ? largest : load(x + i);
  const float most = largest_of(largest);
  vec total = {};
  for (int64_t i = 0; i < padded; ++i) x[i] = exp_of_negative(x[i] - most) * levels.real[i];
  for (int64_t i = 0; i < padded; i += 8) total += load(x + i);
  const float scale = 1 / sum(total);
  for (int64_t i = 0; i < padded; ++i) x[i] *= scale;
}

// Attention weights and samples of one head of queries [q, q + n); COUNT is L * P or 0 for any.
template <int COUNT, bool GRADIENT>
INLINE void prepare(const Problem& p, const Levels& levels, int64_t b, int64_t q, int64_t n, int64_t head, Samples& s) {
  const int64_t count = COUNT ? COUNT : p.L * p.P, padded = padded_to_eight(count);
  for (int64_t k = 0; k < n; ++k) {
    const int64_t item = (b * p.Q + q + k) * p.h + head, at = k * padded;
    p.bfloat16_positions ? read<uint16_t, COUNT>(p, item, s.x + at, s.y + at, s.attention + at)
                         : read<float, COUNT>(p, item, s.x + at, s.y + at, s.attention + at);
  }
  for (int64_t k = 0; p.fused && k < n; ++k) softmax(padded, levels, s.attention + k * padded);
  for (int64_t k = 0; k < n; ++k) {
    const float reference_x = p.fused ? p.reference[2 * (q + k)] : 0;
    const float reference_y = p.fused ? p.reference[2 * (q + k) + 1] : 0;
    float *x = s.x + k * padded, *y = s.y + k * padded;
    for (int64_t i = 0; i < padded; ++i) {
      const float W = levels.width[i], H = levels.height[i];
      x[i] = (p.fused ? reference_x * W + x[i] : x[i] * W) - 0.5f;
      y[i] = (p.fused ? reference_y * H + y[i] : y[i] * H) - 0.5f;
    }
    corners<GRADIENT>(padded, levels, k * padded, s);
  }
  if (p.padding)
    for (int c = 0; c < 4; ++c)
      for (int64_t i = 0; i < n * padded; ++i)
        if (p.padding[b * p.S + s.row[c][i]]) s.inside[c][i] = s.weight[c][i] = 0;
}

}  // namespace
