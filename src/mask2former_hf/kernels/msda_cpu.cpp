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

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#define INLINE static inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__linux__) && !defined(MSDA_NO_CLONES)
// One binary for every x86-64: the loader picks the version for the processor.
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

namespace {

constexpr int kMaxSamples = 64;  // L * P of one head
// Multiplications: 10^7 take about 1 ms forward and 4 ms backward (one core with AVX-512). A call of less than 2 ms runs
// on one thread: a second one would save half of that at best, and on a busy machine costs 6 to 20 ms (measured), because
// the call waits for whoever lost its core in the middle of a task. A thread more for each 0.5 ms from there on.
struct Work {
  double alone, share;
};
#ifdef MSDA_THREADS_ALWAYS  // for tests
constexpr Work kForwardWork{1, 1}, kBackwardWork{1, 1};
#else
constexpr Work kForwardWork{2e7, 5e6}, kBackwardWork{5e6, 1.25e6};
#endif
typedef float vec __attribute__((vector_size(32), aligned(4)));
typedef uint16_t half_vec __attribute__((vector_size(16), aligned(2)));
typedef uint32_t bit_vec __attribute__((vector_size(32), aligned(4)));

struct Problem {
  const void* value;
  const float* positions;   // offsets in pixels (fused) or locations in [0, 1]
  const float* weights;     // logits (fused) or weights
  const float* reference;   // (Q, 2), fused only
  const uint8_t* padding;   // (B, S), nonzero rows count as zero; may be null
  const int64_t* shapes;    // (L, 2) as (H, W)
  int64_t B, S, Q, h, D, L, P;
  bool fused, bfloat16;
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
};

// The samples of one query and head, by number: arrays, because they are computed eight at a time. Padded to a multiple
// of eight.
struct Samples {
  int32_t row[4][kMaxSamples];   // rows of the corners: left and right above, left and right below
  float inside[4][kMaxSamples];  // 1, or 0 for a corner outside the map
  float corner[4][kMaxSamples];  // bilinear weight, 0 outside
  float x[kMaxSamples], y[kMaxSamples], attention[kMaxSamples];
};

INLINE vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
INLINE vec load(const uint16_t* p) {  // bfloat16 is the upper half of a float32
  bit_vec bits = __builtin_convertvector(*reinterpret_cast<const half_vec*>(p), bit_vec) << 16;
  vec result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
INLINE float load_one(const float* p) { return *p; }
INLINE float load_one(const uint16_t* p) {
  uint32_t bits = static_cast<uint32_t>(*p) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
INLINE uint16_t round_to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 64);  // keeps NaN a NaN
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
INLINE float sum(vec x) { return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7])); }

// exp for x <= 0 to 2 units in the last place, without a call, so that loops over it become vector code.
INLINE float exp_of_negative(float x) {
  x = x < -87.0f ? -87.0f : x;  // so that NaN stays NaN
  const float finite = x > -87.0f ? x : -87.0f;  // for the exponent, an integer: there is none for NaN
  const int32_t exponent = static_cast<int32_t>(finite * 1.44269504f - 0.5f);  // nearest, as x <= 0
  const float n = static_cast<float>(exponent);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float e = 1.9875691500e-4f;
  e = e * r + 1.3981999507e-3f;
  e = e * r + 8.3334519073e-3f;
  e = e * r + 4.1665795894e-2f;
  e = e * r + 1.6666665459e-1f;
  e = e * r + 5.0000001201e-1f;
  e = e * r * r + r + 1.0f;
  const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return e * scale;
}

Levels levels_of(const Problem& p) {
  Levels levels{};
  int64_t start = 0, i = 0;
  for (int64_t l = 0; l < p.L; ++l) {
    for (int64_t point = 0; point < p.P; ++point, ++i) {
      levels.width[i] = static_cast<float>(p.shapes[2 * l + 1]);
      levels.height[i] = static_cast<float>(p.shapes[2 * l]);
      levels.start[i] = static_cast<int32_t>(start);
    }
    start += p.shapes[2 * l] * p.shapes[2 * l + 1];
  }
  for (; i < kMaxSamples; ++i) levels.width[i] = levels.height[i] = 1;
  return levels;
}

// Attention weights and samples of one query and head.
INLINE void prepare(const Problem& p, const Levels& levels, int64_t b, int64_t q, int64_t head, Samples& s) {
  const int64_t count = p.L * p.P, padded = (count + 7) / 8 * 8, item = (b * p.Q + q) * p.h + head;
  const float* positions = p.positions + item * count * 2;
  const float* weights = p.weights + item * count;
  float px[kMaxSamples], py[kMaxSamples];
  for (int64_t i = 0; i < padded; ++i) px[i] = py[i] = -2, s.attention[i] = 0;
  if (p.fused) {
    const float reference_x = p.reference[2 * q], reference_y = p.reference[2 * q + 1];
    float largest = weights[0], total = 0;
    for (int64_t i = 1; i < count; ++i) largest = std::max(largest, weights[i]);
    for (int64_t i = 0; i < count; ++i) s.attention[i] = weights[i] - largest;
    for (int64_t i = 0; i < padded; ++i) s.attention[i] = exp_of_negative(s.attention[i]);
    for (int64_t i = 0; i < count; ++i) total += s.attention[i];
    const float scale = 1 / total;
    for (int64_t i = 0; i < padded; ++i) s.attention[i] *= scale;
    for (int64_t i = 0; i < count; ++i) {
      px[i] = reference_x * levels.width[i] + positions[2 * i] - 0.5f;
      py[i] = reference_y * levels.height[i] + positions[2 * i + 1] - 0.5f;
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      s.attention[i] = weights[i];
      px[i] = positions[2 * i] * levels.width[i] - 0.5f;
      py[i] = positions[2 * i + 1] * levels.height[i] - 0.5f;
    }
  }
  // Corners outside get weight 0 and the address of a cell inside: no branch, so eight samples at a time.
  for (int64_t i = 0; i < padded; ++i) {
    const float W = levels.width[i], H = levels.height[i];
    const bool near = (px[i] > -1) & (px[i] < W) & (py[i] > -1) & (py[i] < H);  // false for NaN
    const float x = near ? px[i] : 0, y = near ? py[i] : 0, valid = near ? 1.0f : 0.0f;
    const int32_t left = static_cast<int32_t>(x + 1) - 1, top = static_cast<int32_t>(y + 1) - 1;
    const int32_t width = static_cast<int32_t>(W), height = static_cast<int32_t>(H);
    const int32_t near_left = left < 0 ? 0 : left, near_right = left + 1 < width ? left + 1 : width - 1;
    const int32_t upper = levels.start[i] + (top < 0 ? 0 : top) * width;
    const int32_t lower = levels.start[i] + (top + 1 < height ? top + 1 : height - 1) * width;
    const float in_left = left >= 0 ? valid : 0, in_right = left + 1 < width ? valid : 0;
    const float in_top = top >= 0 ? 1.0f : 0, in_bottom = top + 1 < height ? 1.0f : 0;
    const float fx = x - static_cast<float>(left), fy = y - static_cast<float>(top);
    s.x[i] = fx, s.y[i] = fy;
    s.row[0][i] = upper + near_left, s.row[1][i] = upper + near_right;
    s.row[2][i] = lower + near_left, s.row[3][i] = lower + near_right;
    s.inside[0][i] = in_top * in_left, s.inside[1][i] = in_top * in_right;
    s.inside[2][i] = in_bottom * in_left, s.inside[3][i] = in_bottom * in_right;
    s.corner[0][i] = in_top * in_left * (1 - fx) * (1 - fy), s.corner[1][i] = in_top * in_right * fx * (1 - fy);
    s.corner[2][i] = in_bottom * in_left * (1 - fx) * fy, s.corner[3][i] = in_bottom * in_right * fx * fy;
  }
  if (p.padding)
    for (int c = 0; c < 4; ++c)
      for (int64_t i = 0; i < count; ++i)
        if (p.padding[b * p.S + s.row[c][i]]) s.inside[c][i] = s.corner[c][i] = 0;
}

template <typename T, int D8>  // D8 = D / 8 vectors, or 0 for any other D
INLINE void forward_head(const Problem& p, const Levels& levels, int64_t b, int64_t head, int64_t first, int64_t last,
                         void* out) {
  const int64_t D = D8 ? 8 * D8 : p.D, stride = p.h * D, count = p.L * p.P;
  const T* value = static_cast<const T*>(p.value) + b * p.S * stride + head * D;
  Samples s;
  for (int64_t q = first; q < last; ++q) {
    prepare(p, levels, b, q, head, s);
    const int64_t at = (b * p.Q + q) * stride + head * D;
    float* out_float = static_cast<float*>(out) + at;
    uint16_t* out_half = static_cast<uint16_t*>(out) + at;
    if constexpr (D8 > 0) {
      vec total[D8] = {};
      for (int64_t i = 0; i < count; ++i)
        for (int c = 0; c < 4; ++c) {
          const float weight = s.attention[i] * s.corner[c][i];
          const T* row = value + s.row[c][i] * stride;
          for (int d = 0; d < D8; ++d) total[d] += weight * load(row + 8 * d);
        }
      for (int d = 0; d < D8; ++d) {
        if (sizeof(T) == 4)
          *reinterpret_cast<vec*>(out_float + 8 * d) = total[d];
        else
          for (int k = 0; k < 8; ++k) out_half[8 * d + k] = round_to_bfloat16(total[d][k]);
      }
    } else {
      for (int64_t d = 0; d < D; ++d) {
        float total = 0;
        for (int64_t i = 0; i < count; ++i)
          for (int c = 0; c < 4; ++c)
            total += s.attention[i] * s.corner[c][i] * load_one(value + s.row[c][i] * stride + d);
        if (sizeof(T) == 4)
          out_float[d] = total;
        else
          out_half[d] = round_to_bfloat16(total);
      }
    }
  }
}

template <typename T, int D8>
INLINE void backward_head(const Problem& p, const Levels& levels, const Gradients& g, int64_t b, int64_t head) {
  const int64_t D = D8 ? 8 * D8 : p.D, stride = p.h * D, count = p.L * p.P;
  const int64_t base = b * p.S * stride + head * D;
  const T* value = static_cast<const T*>(p.value) + base;
  float* value_gradient = g.value + base;
  float attention_gradient[kMaxSamples];
  Samples s;
  for (int64_t q = 0; q < p.Q; ++q) {
    prepare(p, levels, b, q, head, s);
    const float* incoming = g.output + (b * p.Q + q) * stride + head * D;
    const int64_t item = (b * p.Q + q) * p.h + head;
    float weighted = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float x = s.x[i], y = s.y[i];
      float dot[4];  // <incoming, corner's row>
      for (int c = 0; c < 4; ++c) {
        const int64_t at = s.row[c][i] * stride;
        const float weight = s.attention[i] * s.corner[c][i];
        if constexpr (D8 > 0) {
          vec total = {};
          for (int d = 0; d < D8; ++d) {
            const vec in = load(incoming + 8 * d);
            total += in * load(value + at + 8 * d);
            *reinterpret_cast<vec*>(value_gradient + at + 8 * d) += weight * in;
          }
          dot[c] = s.inside[c][i] * sum(total);
        } else {
          float total = 0;
          for (int64_t d = 0; d < D; ++d) {
            total += incoming[d] * load_one(value + at + d);
            value_gradient[at + d] += weight * incoming[d];
          }
          dot[c] = s.inside[c][i] * total;
        }
      }
      attention_gradient[i] =
          (1 - y) * ((1 - x) * dot[0] + x * dot[1]) + y * ((1 - x) * dot[2] + x * dot[3]);
      weighted += s.attention[i] * attention_gradient[i];
      const float along_x = (1 - y) * (dot[1] - dot[0]) + y * (dot[3] - dot[2]);
      const float along_y = (1 - x) * (dot[2] - dot[0]) + x * (dot[3] - dot[1]);
      const int64_t l = i / p.P;
      float* position = g.positions + (item * count + i) * 2;
      position[0] = s.attention[i] * along_x * (p.fused ? 1 : p.shapes[2 * l + 1]);
      position[1] = s.attention[i] * along_y * (p.fused ? 1 : p.shapes[2 * l]);
    }
    float* weights = g.weights + item * count;
    for (int64_t i = 0; i < count; ++i)
      weights[i] = p.fused ? s.attention[i] * (attention_gradient[i] - weighted) : attention_gradient[i];
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

CLONES void forward_task(const Problem& p, const Levels& levels, int64_t b, int64_t head, int64_t first, int64_t last, void* out) {
#define CALL(N) p.bfloat16 ? forward_head<uint16_t, N>(p, levels, b, head, first, last, out) \
                           : forward_head<float, N>(p, levels, b, head, first, last, out)
  FOR_HEAD_DIM(CALL)
#undef CALL
}

CLONES void backward_task(const Problem& p, const Levels& levels, const Gradients& g, int64_t b, int64_t head) {
#define CALL(N) p.bfloat16 ? backward_head<uint16_t, N>(p, levels, g, b, head) : backward_head<float, N>(p, levels, g, b, head)
  FOR_HEAD_DIM(CALL)
#undef CALL
}

struct Progress {
  std::atomic<int64_t> next{0};  // task to take
  int64_t finished = 0;
  std::mutex mutex;
  std::condition_variable all_finished;
};

// Tasks 0 .. count - 1 on up to `threads` threads. Threads are started for the call: that costs about 20 us and leaves
// nothing behind that a fork or a second Python thread could trip over, as a pool (OpenMP's included) would. Waiting is
// sleeping, and only for tasks that somebody has begun: on a busy machine a new thread may get a core long after the
// others have done its share (10 ms, measured), so threads are detached, and a late one finds no task and ends.
template <typename Task>
void parallel(int64_t count, int64_t threads, const Task& task) {
  threads = std::min(threads, count);
  if (threads < 2) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  const auto progress = std::make_shared<Progress>();
  const auto work = [progress, count, &task] {  // `task` lives as long as there are tasks
    int64_t own = 0;
    for (int64_t i = progress->next++; i < count; i = progress->next++, ++own) task(i);
    std::lock_guard<std::mutex> lock(progress->mutex);
    progress->finished += own;
    if (progress->finished == count) progress->all_finished.notify_one();
  };
  try {
    for (int64_t i = 1; i < threads; ++i) std::thread(work).detach();
  } catch (const std::exception&) {  // no memory or no right to another thread: the ones at hand do the work
  }
  work();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->all_finished.wait(lock, [&] { return progress->finished == count; });
}

int64_t useful_threads(const Problem& p, int64_t threads, const Work& of_a_thread) {
  const double work = 4.0 * p.B * p.Q * p.h * p.L * p.P * (p.D + 8);  // 8: what a sample costs besides its channels
  if (work < of_a_thread.alone) return 1;
  return static_cast<int64_t>(std::min<double>(threads, work / of_a_thread.share));
}

}  // namespace

extern "C" {

// Changes with the arguments below; the Python side refuses another one.
int64_t msda_interface_version() { return 1; }
int64_t msda_max_samples() { return kMaxSamples; }

void msda_forward(const void* value, const float* positions, const float* weights, const float* reference,
                  const uint8_t* padding, const int64_t* shapes, const int64_t* sizes, int64_t fused,
                  int64_t bfloat16, int64_t threads, void* out) {
  const Problem p{value,    positions, weights,  reference, padding,  shapes,     sizes[0],     sizes[1],
                  sizes[2], sizes[3],  sizes[4], sizes[5],  sizes[6], fused != 0, bfloat16 != 0};
  const Levels levels = levels_of(p);
  constexpr int64_t kTile = 2048;  // queries: small enough to balance, large enough to keep a head in cache
  const int64_t tiles = (p.Q + kTile - 1) / kTile;
  parallel(p.B * p.h * tiles, useful_threads(p, threads, kForwardWork), [&](int64_t i) {
    const int64_t b = i / (p.h * tiles), head = i / tiles % p.h, first = i % tiles * kTile;
    forward_task(p, levels, b, head, first, std::min(first + kTile, p.Q), out);
  });
}

void msda_backward(const void* value, const float* positions, const float* weights, const float* reference,
                   const uint8_t* padding, const int64_t* shapes, const int64_t* sizes, int64_t fused,
                   int64_t bfloat16, int64_t threads, const float* output_gradient, float* value_gradient,
                   float* positions_gradient, float* weights_gradient) {
  const Problem p{value,    positions, weights,  reference, padding,  shapes,     sizes[0],     sizes[1],
                  sizes[2], sizes[3],  sizes[4], sizes[5],  sizes[6], fused != 0, bfloat16 != 0};
  const Gradients g{output_gradient, value_gradient, positions_gradient, weights_gradient};
  const Levels levels = levels_of(p);
  parallel(p.B * p.h, useful_threads(p, threads, kBackwardWork),
           [&](int64_t i) { backward_task(p, levels, g, i / p.h, i % p.h); });
}
}
