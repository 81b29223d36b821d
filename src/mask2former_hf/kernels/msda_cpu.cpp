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
// each other out; where there are many queries, every head's rows are first copied together, and gradients of value are
// added up head by head.

#if defined(__unix__)
#include <pthread.h>
#endif

#include <new>

#include "msda_samples.h"

namespace {

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

struct Gradients {
  const void* output;  // (B, Q, h * D) in the dtype of value, given
  float* sums;         // (B, h, S, D) zeros, in which those of value are added up
  void* value;         // (B, S, h, D)
  void* positions;
  void* weights;
};

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

// Not inside each of what follows: that would be compiled for minutes. Nothing else is where the samples are written.
CLONES void prepare_samples(const Problem& p, const Levels& levels, int64_t b, int64_t q, int64_t n, int64_t head,
                            Samples& __restrict s) {
  p.L * p.P == 12 ? prepare<12, false>(p, levels, b, q, n, head, s) : prepare<0, false>(p, levels, b, q, n, head, s);
}
CLONES void prepare_samples_for_gradients(const Problem& p, const Levels& levels, int64_t b, int64_t q, int64_t n,
                                          int64_t head, Samples& __restrict s) {
  p.L * p.P == 12 ? prepare<12, true>(p, levels, b, q, n, head, s) : prepare<0, true>(p, levels, b, q, n, head, s);
}

template <typename T, int D8, int COUNT>
INLINE void forward_head(const Problem& p, const Levels& levels, const Head<T>& rows, int64_t b, int64_t head,
                         int64_t first, int64_t last, T* out) {
  const int64_t D = D8 ? 8 * D8 : p.D, count = COUNT ? COUNT : p.L * p.P, padded = padded_to_eight(count);
  Samples s;
  for (int64_t q = first; q < last; q += kLanes / padded) {
    const int64_t n = std::min(kLanes / padded, last - q);
    prepare_samples(p, levels, b, q, n, head, s);
    for (int64_t k = 0; k < n; ++k)
      gather<T, D8>(rows, D, count, k * padded, s, out + ((b * p.Q + q + k) * p.h + head) * D);
  }
}

// Dot products of the incoming gradient with the rows of a sample's corners, 0 outside; the gradients of those rows are
// added to their sums.
template <typename T, int D8>
INLINE void scatter_corners(const Head<T>& rows, int64_t D, const T* incoming, const vec* in, float* sums, int64_t j,
                            const Samples& s, float* dot) {
  vec totals[4] = {};
  for (int c = 0; c < 4; ++c) {
    const T* row = rows.value + s.row[c][j] * rows.stride;
    float* to = sums + s.row[c][j] * D;
    const float weight = s.weight[c][j];
    for (int d = 0; d < D8; ++d) {
      totals[c] += in[d] * load(row + 8 * d);
      store(to + 8 * d, load(to + 8 * d) + weight * in[d]);
    }
    dot[c] = 0;
    for (int64_t d = 8 * D8; d < D; ++d) {
      dot[c] += load_one(incoming + d) * load_one(row + d);
      to[d] += weight * load_one(incoming + d);
    }
  }
  const vec dots = four_sums(totals[0], totals[1], totals[2], totals[3]);
  for (int c = 0; c < 4; ++c) dot[c] = s.inside[c][j] * (dot[c] + dots[c]);
}

// Gradients of the positions and weights of one query's samples.
template <typename P>
INLINE void write_gradients(const Problem& p, const Gradients& g, int64_t item, int64_t count, const float* along_x,
                            const float* along_y, const float* of_weights) {
  P* position = static_cast<P*>(g.positions) + item * count * 2;
  for (int64_t i = 0; i < count; ++i, position += 2) {
    const int64_t l = p.fused ? 0 : i / p.P;
    store_one(position, along_x[i] * (p.fused ? 1 : p.shapes[2 * l + 1]));
    store_one(position + 1, along_y[i] * (p.fused ? 1 : p.shapes[2 * l]));
  }
  P* weights = static_cast<P*>(g.weights) + item * count;
  for (int64_t i = 0; i < count; ++i) store_one(weights + i, of_weights[i]);
}

// Of one query's samples, at lane `at` and on, all gradients, and what they add to the sums of the head's values.
template <typename T, int D8, int COUNT>
INLINE void scatter(const Problem& p, const Gradients& g, const Head<T>& rows, float* sums, int64_t item, int64_t at,
                    const Samples& s) {
  const int64_t D = D8 ? 8 * D8 : p.D, count = COUNT ? COUNT : p.L * p.P;
  const T* incoming = static_cast<const T*>(g.output) + item * D;
  vec in[D8 + 1];
  for (int d = 0; d < D8; ++d) in[d] = load(incoming + 8 * d);
  float dots[4][kMaxSamples], attention_gradient[kMaxSamples], along_x[kMaxSamples], along_y[kMaxSamples], weighted = 0;
  for (int64_t i = 0; i < count; ++i) {
    float dot[4];
    scatter_corners<T, D8>(rows, D, incoming, in, sums, at + i, s, dot);
    for (int c = 0; c < 4; ++c) dots[c][i] = dot[c];
  }
  for (int64_t i = 0; i < count; ++i) {
    const float x = s.x[at + i], y = s.y[at + i], attention = s.attention[at + i];
    const float a = dots[0][i], b = dots[1][i], c = dots[2][i], d = dots[3][i];
    attention_gradient[i] = (1 - y) * ((1 - x) * a + x * b) + y * ((1 - x) * c + x * d);
    along_x[i] = attention * ((1 - y) * (b - a) + y * (d - c));
    along_y[i] = attention * ((1 - x) * (c - a) + x * (d - b));
  }
  for (int64_t i = 0; i < count; ++i) weighted += s.attention[at + i] * attention_gradient[i];
  for (int64_t i = 0; p.fused && i < count; ++i)
    attention_gradient[i] = s.attention[at + i] * (attention_gradient[i] - weighted);
  p.bfloat16_positions ? write_gradients<uint16_t>(p, g, item, count, along_x, along_y, attention_gradient)
                       : write_gradients<float>(p, g, item, count, along_x, along_y, attention_gradient);
}

template <typename T, int D8, int COUNT>
INLINE void backward_head(const Problem& p, const Levels& levels, const Gradients& g, const Head<T>& rows, int64_t b,
                          int64_t head) {
  const int64_t D = D8 ? 8 * D8 : p.D, padded = padded_to_eight(COUNT ? COUNT : p.L * p.P);
  float* sums = g.sums + (b * p.h + head) * p.S * D;
  Samples s;
  for (int64_t q = 0; q < p.Q; q += kLanes / padded) {
    const int64_t n = std::min(kLanes / padded, p.Q - q), item = (b * p.Q + q) * p.h + head;
    prepare_samples_for_gradients(p, levels, b, q, n, head, s);
    for (int64_t k = 0; k < n; ++k)
      scatter<T, D8, COUNT>(p, g, rows, sums, item + k * p.h, k * padded, s);
  }
  T* to = static_cast<T*>(g.value) + (b * p.S * p.h + head) * D;
  for (int64_t row = 0; row < p.S; ++row, to += p.h * D, sums += D) {
    for (int d = 0; d < D8; ++d) store(to + 8 * d, load(sums + 8 * d));
    for (int64_t d = 8 * D8; d < D; ++d) store_one(to + d, sums[d]);
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
template <typename T>
INLINE void backward_rows(const Problem& p, const Levels& levels, const Gradients& g, const Head<T>& rows, int64_t b,
                          int64_t head) {
  if (p.D == 32 && p.L * p.P == 12) return backward_head<T, 4, 12>(p, levels, g, rows, b, head);
#define CALL(N) backward_head<T, N, 0>(p, levels, g, rows, b, head)
  FOR_HEAD_DIM(CALL)
#undef CALL
}
CLONES void backward_task(const Problem& p, const Levels& levels, const Gradients& g, const Head<float>& rows,
                          int64_t b, int64_t head) {
  backward_rows(p, levels, g, rows, b, head);
}
CLONES void backward_task(const Problem& p, const Levels& levels, const Gradients& g, const Head<uint16_t>& rows,
                          int64_t b, int64_t head) {
  backward_rows(p, levels, g, rows, b, head);
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
Head<T> rows_of(const Problem& p, const T* together, int64_t b, int64_t head) {
  return together ? Head<T>{together + (b * p.h + head) * p.S * p.D, p.D}
                  : Head<T>{static_cast<const T*>(p.value) + (b * p.S * p.h + head) * p.D, p.h * p.D};
}

template <typename T>
void forward(const Problem& p, int64_t threads, T* out) {
  const Levels levels = levels_of(p);
  threads = useful_threads(p, threads, kForwardWork);
  const auto together = rows_by_head<T>(p, threads);
  constexpr int64_t kTile = 2048;  // queries: small enough to balance, large enough to keep a head in cache
  const int64_t tiles = (p.Q + kTile - 1) / kTile;
  parallel(p.B * p.h * tiles, threads, [&](int64_t i) {
    const int64_t b = i / (p.h * tiles), head = i / tiles % p.h, first = i % tiles * kTile;
    const Head<T> rows = rows_of(p, together.get(), b, head);
    forward_task(p, levels, rows, b, head, first, std::min(first + kTile, p.Q), out);
  });
}

template <typename T>
void backward(const Problem& p, const Gradients& g, int64_t threads) {
  const Levels levels = levels_of(p);
  threads = useful_threads(p, threads, kBackwardWork);
  const auto together = rows_by_head<T>(p, threads);
  parallel(p.B * p.h, threads, [&](int64_t i) {
    const int64_t b = i / p.h, head = i % p.h;
    backward_task(p, levels, g, rows_of(p, together.get(), b, head), b, head);
  });
}

}  // namespace

extern "C" {

// Changes with the arguments below; the Python side refuses another one.
int64_t msda_interface_version() { return 6; }
int64_t msda_max_samples() { return kMaxSamples; }

// GOMP_parallel of the process' OpenMP, or null for threads of our own, as in every fork from then on.
void msda_use_pool(void* entry) {
  msda_pool = reinterpret_cast<PoolEntry>(entry);
#if defined(__unix__)
  static const int registered = pthread_atfork(nullptr, nullptr, [] { msda_pool = nullptr; });
  (void)registered;
#endif
}

void msda_forward(const void* value, const void* positions, const void* weights, const float* reference,
                  const uint8_t* padding, const int64_t* shapes, const int64_t* sizes, int64_t fused,
                  int64_t bfloat16, int64_t bfloat16_positions, int64_t threads, void* out) {
  const Problem p{value, positions, weights, reference, padding, shapes, sizes, fused, bfloat16, bfloat16_positions};
  bfloat16 ? forward(p, threads, static_cast<uint16_t*>(out)) : forward(p, threads, static_cast<float*>(out));
}

void msda_backward(const void* value, const void* positions, const void* weights, const float* reference,
                   const uint8_t* padding, const int64_t* shapes, const int64_t* sizes, int64_t fused,
                   int64_t bfloat16, int64_t bfloat16_positions, int64_t threads, const void* output_gradient,
                   float* sums, void* value_gradient, void* positions_gradient, void* weights_gradient) {
  const Problem p{value, positions, weights, reference, padding, shapes, sizes, fused, bfloat16, bfloat16_positions};
  const Gradients g{output_gradient, sums, value_gradient, positions_gradient, weights_gradient};
  bfloat16 ? backward<uint16_t>(p, g, threads) : backward<float>(p, g, threads);
}
}
