// Multi-scale deformable attention for CPUs (Zhu et al., "Deformable DETR", ICLR 2021, eq. 3), forward and backward.
//
// A plain C interface over raw pointers: no header of torch, so one binary serves every torch version. Two forms:
//   standard: sampling locations in [0, 1] and attention weights are given;
//   fused:    the raw offsets in pixels, attention logits and reference points are given; locations and the softmax
//             exist only in registers and on the stack, never as tensors.
// Layouts (row-major): value (B, S, h, D), offsets or locations (B, Q, h, L, P, 2), logits or weights (B, Q, h, L * P),
// reference points (Q, 2), output (B, Q, h * D). Samples outside a map count as zero, also NaN and infinite ones.
//
// Work is split over (batch, head): one head's rows of `value` are 1 MB at 640 x 640, so consecutive queries, which in
// Mask2Former's encoder are consecutive pixels, find them in the second-level cache; and in the backward pass only one
// thread ever writes a head's gradient, so there is nothing atomic and the result does not depend on the thread count.
// In `value` the rows of a head lie h * D apart, a power of two, so that they share a few sets of the caches and push
// each other out; where there are many queries, the forward pass first copies every head's rows together.

#include <cmath>
#include <new>

#include "cpu_vectors.h"

namespace {

constexpr int64_t kMaxSamples = 64, kLanes = 256;  // L * P of one head; samples that are prepared together
// Multiplications: 10^7 take about 0.8 ms forward and 4 ms backward (one core with AVX-512). A call of less than 2 ms
// runs on one thread: a second one would save half of that at best, and on a busy machine costs 6 to 20 ms (measured),
// for the call waits for whoever lost its core in the middle of a task. A thread more for each 0.5 ms from there on.
struct Work {
  double alone, share;
};
#ifdef MSDA_THREADS_ALWAYS  // for tests
constexpr Work kForwardWork{1, 1}, kBackwardWork{1, 1};
#else
constexpr Work kForwardWork{2.5e7, 6e6}, kBackwardWork{5e6, 1.25e6};
#endif

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

struct Gradients {
  const float* output;  // (B, Q, h * D)
  float* value;         // (B, S, h, D), zeros
  float* positions;
  float* weights;
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

// Rows of one head: `value` is the first of them, each `stride` values from the next.
template <typename T>
struct Head {
  const T* value;
  int64_t stride;
};

// One query's output from samples at lane `at` on; D8 = D / 8 vectors, or 0 for any other D.
template <typename T, int D8>
INLINE void gather(const Head<T>& rows, int64_t D, int64_t count, int64_t at, const Samples& s, T* out) {
  if constexpr (D8 > 0) {
    constexpr int kSums = D8 > 4 ? 1 : 2;  // as many as registers allow: an addition waits for the one before
    Pair total[kSums][D8 / 2 + 1] = {};
    for (int64_t i = at; i < at + count; ++i)
      for (int c = 0; c < 4; ++c) {
        const float weight = s.weight[c][i];
        const T* row = rows.value + s.row[c][i] * rows.stride;
        Pair* sums = total[c % kSums];
        for (int d = 0; d < D8 / 2; ++d) {
          const Pair channels = load_pair(row + 16 * d);
          sums[d].a += weight * channels.a;
          sums[d].b += weight * channels.b;
        }
        if (D8 % 2) sums[D8 / 2].a += weight * load(row + 8 * (D8 - 1));
      }
    for (int d = 0; d < D8 / 2 + D8 % 2; ++d)
      for (int more = 1; more < kSums; ++more) total[0][d].a += total[more][d].a, total[0][d].b += total[more][d].b;
    for (int d = 0; d < D8 / 2; ++d) store_pair(out + 16 * d, total[0][d]);
    if (D8 % 2)
      for (int k = 0; k < 8; ++k) store_one(out + 8 * (D8 - 1) + k, total[0][D8 / 2].a[k]);
  } else {
    for (int64_t d = 0; d < D; ++d) {
      float total = 0;
      for (int64_t i = at; i < at + count; ++i)
        for (int c = 0; c < 4; ++c) total += s.weight[c][i] * load_one(rows.value + s.row[c][i] * rows.stride + d);
      store_one(out + d, total);
    }
  }
}

template <typename T, int D8, int COUNT>
INLINE void forward_head(const Problem& p, const Levels& levels, const Head<T>& rows, int64_t b, int64_t head,
                         int64_t first, int64_t last, T* out) {
  const int64_t D = D8 ? 8 * D8 : p.D, count = COUNT ? COUNT : p.L * p.P, padded = padded_to_eight(count);
  Samples s;
  for (int64_t q = first; q < last; q += kLanes / padded) {
    const int64_t n = std::min(kLanes / padded, last - q);
    prepare<COUNT, false>(p, levels, b, q, n, head, s);
    for (int64_t k = 0; k < n; ++k)
      gather<T, D8>(rows, D, count, k * padded, s, out + ((b * p.Q + q + k) * p.h + head) * D);
  }
}

// Gradients of one query's samples, at lane `at` and on, and what they add to the gradient of value.
template <typename T, int D8>
INLINE void scatter(const Problem& p, const Gradients& g, const T* value, float* value_gradient, int64_t item,
                    int64_t at, const Samples& s) {
  const int64_t D = D8 ? 8 * D8 : p.D, stride = p.h * D, count = p.L * p.P;
  const float* incoming = g.output + item * D;
  float attention_gradient[kMaxSamples], weighted = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t j = at + i;
    const float x = s.x[j], y = s.y[j];
    float dot[4];  // <incoming, corner's row>
    for (int c = 0; c < 4; ++c) {
      const int64_t row = s.row[c][j] * stride;
      const float weight = s.weight[c][j];
      if constexpr (D8 > 0) {
        vec total = {};
        for (int d = 0; d < D8; ++d) {
          const vec in = load(incoming + 8 * d);
          total += in * load(value + row + 8 * d);
          *reinterpret_cast<vec*>(value_gradient + row + 8 * d) += weight * in;
        }
        dot[c] = s.inside[c][j] * sum(total);
      } else {
        float total = 0;
        for (int64_t d = 0; d < D; ++d) {
          total += incoming[d] * load_one(value + row + d);
          value_gradient[row + d] += weight * incoming[d];
        }
        dot[c] = s.inside[c][j] * total;
      }
    }
    attention_gradient[i] = (1 - y) * ((1 - x) * dot[0] + x * dot[1]) + y * ((1 - x) * dot[2] + x * dot[3]);
    weighted += s.attention[j] * attention_gradient[i];
    const float along_x = (1 - y) * (dot[1] - dot[0]) + y * (dot[3] - dot[2]);
    const float along_y = (1 - x) * (dot[2] - dot[0]) + x * (dot[3] - dot[1]);
    const int64_t l = i / p.P;
    float* position = g.positions + (item * count + i) * 2;
    position[0] = s.attention[j] * along_x * (p.fused ? 1 : p.shapes[2 * l + 1]);
    position[1] = s.attention[j] * along_y * (p.fused ? 1 : p.shapes[2 * l]);
  }
  float* weights = g.weights + item * count;
  for (int64_t i = 0; i < count; ++i)
    weights[i] = p.fused ? s.attention[at + i] * (attention_gradient[i] - weighted) : attention_gradient[i];
}

template <typename T, int D8>
INLINE void backward_head(const Problem& p, const Levels& levels, const Gradients& g, int64_t b, int64_t head) {
  const int64_t base = (b * p.S * p.h + head) * p.D, padded = padded_to_eight(p.L * p.P);
  Samples s;
  for (int64_t q = 0; q < p.Q; q += kLanes / padded) {
    const int64_t n = std::min(kLanes / padded, p.Q - q), item = (b * p.Q + q) * p.h + head;
    prepare<0, true>(p, levels, b, q, n, head, s);
    for (int64_t k = 0; k < n; ++k)
      scatter<T, D8>(p, g, static_cast<const T*>(p.value) + base, g.value + base, item + k * p.h, k * padded, s);
  }
}

#define FOR_HEAD_DIM(CALL)      \
  switch (p.D) {                \
    case 8: CALL(1); break;     \
    case 16: CALL(2); break;    \
    case 24: CALL(3); break;    \
    case 32: CALL(4); break;    \
    case 64: CALL(8); break;    \
    default: CALL(0); break;    \
  }

template <typename T>
INLINE void forward_rows(const Problem& p, const Levels& levels, const Head<T>& rows, int64_t b, int64_t head,
                         int64_t first, int64_t last, T* out) {
  if (p.D == 32 && p.L * p.P == 12) return forward_head<T, 4, 12>(p, levels, rows, b, head, first, last, out);
#define CALL(N) forward_head<T, N, 0>(p, levels, rows, b, head, first, last, out)
  FOR_HEAD_DIM(CALL)
#undef CALL
}

CLONES void forward_task(const Problem& p, const Levels& levels, const Head<float>& rows, int64_t b, int64_t head,
                         int64_t first, int64_t last, float* out) {
  forward_rows(p, levels, rows, b, head, first, last, out);
}
CLONES void forward_task(const Problem& p, const Levels& levels, const Head<uint16_t>& rows, int64_t b, int64_t head,
                         int64_t first, int64_t last, uint16_t* out) {
  forward_rows(p, levels, rows, b, head, first, last, out);
}
CLONES void backward_task(const Problem& p, const Levels& levels, const Gradients& g, int64_t b, int64_t head) {
#define CALL(N) \
  p.bfloat16 ? backward_head<uint16_t, N>(p, levels, g, b, head) : backward_head<float, N>(p, levels, g, b, head)
  FOR_HEAD_DIM(CALL)
#undef CALL
}

int64_t useful_threads(const Problem& p, int64_t threads, const Work& of_a_thread) {
  const double work = 4.0 * p.B * p.Q * p.h * p.L * p.P * (p.D + 8);  // 8: what a sample costs besides its channels
  if (work < of_a_thread.alone) return 1;
  return static_cast<int64_t>(std::min<double>(threads, work / of_a_thread.share));
}

struct Release {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};

// Every head's rows together, (B, h, S, D), or null: where there are few queries, and where there is no memory.
template <typename T>
std::unique_ptr<T, Release> rows_by_head(const Problem& p, int64_t threads) {
  std::unique_ptr<T, Release> copy;
  if (p.h == 1 || p.Q * p.L * p.P < p.S) return copy;
  const int64_t kTile = 1024, tiles = (p.S + kTile - 1) / kTile, size = sizeof(T) * p.D;
  copy.reset(static_cast<T*>(::operator new(size * p.B * p.S * p.h, std::align_val_t(64), std::nothrow)));
  if (!copy) return copy;
  parallel(p.B * tiles, threads, [&](int64_t i) {
    const int64_t b = i / tiles, first = i % tiles * kTile, last = std::min(first + kTile, p.S);
    for (int64_t head = 0; head < p.h; ++head) {
      const T* from = static_cast<const T*>(p.value) + (b * p.S * p.h + head) * p.D;
      T* to = copy.get() + (b * p.h + head) * p.S * p.D;
      for (int64_t row = first; row < last; ++row) std::memcpy(to + row * p.D, from + row * p.h * p.D, size);
    }
  });
  return copy;
}

template <typename T>
void forward(const Problem& p, int64_t threads, T* out) {
  const Levels levels = levels_of(p);
  threads = useful_threads(p, threads, kForwardWork);
  const auto together = rows_by_head<T>(p, threads);
  constexpr int64_t kTile = 2048;  // queries: small enough to balance, large enough to keep a head in cache
  const int64_t tiles = (p.Q + kTile - 1) / kTile, head_size = p.S * p.D;
  parallel(p.B * p.h * tiles, threads, [&](int64_t i) {
    const int64_t b = i / (p.h * tiles), head = i / tiles % p.h, first = i % tiles * kTile;
    const Head<T> rows = together ? Head<T>{together.get() + (b * p.h + head) * head_size, p.D}
                                  : Head<T>{static_cast<const T*>(p.value) + (b * p.S * p.h + head) * p.D, p.h * p.D};
    forward_task(p, levels, rows, b, head, first, std::min(first + kTile, p.Q), out);
  });
}

}  // namespace

extern "C" {

// Changes with the arguments below; the Python side refuses another one.
int64_t msda_interface_version() { return 3; }
int64_t msda_max_samples() { return kMaxSamples; }

void msda_forward(const void* value, const void* positions, const void* weights, const float* reference,
                  const uint8_t* padding, const int64_t* shapes, const int64_t* sizes, int64_t fused,
                  int64_t bfloat16, int64_t bfloat16_positions, int64_t threads, void* out) {
  const Problem p{value, positions, weights, reference, padding, shapes, sizes, fused, bfloat16, bfloat16_positions};
  bfloat16 ? forward(p, threads, static_cast<uint16_t*>(out)) : forward(p, threads, static_cast<float*>(out));
}

void msda_backward(const void* value, const void* positions, const void* weights, const float* reference,
                   const uint8_t* padding, const int64_t* shapes, const int64_t* sizes, int64_t fused,
                   int64_t bfloat16, int64_t bfloat16_positions, int64_t threads, const float* output_gradient,
                   float* value_gradient, float* positions_gradient, float* weights_gradient) {
  const Problem p{value, positions, weights, reference, padding, shapes, sizes, fused, bfloat16, bfloat16_positions};
  const Gradients g{output_gradient, value_gradient, positions_gradient, weights_gradient};
  const Levels levels = levels_of(p);
  parallel(p.B * p.h, useful_threads(p, threads, kBackwardWork),
           [&](int64_t i) { backward_task(p, levels, g, i / p.h, i % p.h); });
}
}
