// Attention of tokens within windows on CPUs, forward and backward (Liu et al., "Swin Transformer", ICCV 2021, eq. 4).
//
// torch would gather the windows, permute queries, keys and values, multiply thousands of matrices of 49 x 32 numbers,
// and put the results back: ten passes over memory. Here a head of a window is read from the tokens' own rows, attended
// in the first caches, and written to the tokens' rows. A token is in one window, so nothing is added up between
// threads but the gradients of the position bias and of padding; those are summed by chunks of windows and then in the
// chunks' order, so results do not depend on the number of threads. The arithmetic is float32.
// Layouts (row-major): projected (N, 3, h, D) queries, keys and values, and `fill` (3, h, D) those of padding, places
// (w, n) the token in each row of a window, N for padding, bias (h, n, n), seam (s, n, n) added in the last s windows.

#include <cmath>
#include <vector>

#include "cpu_vectors.h"

namespace {

constexpr int64_t kHeads = 4;           // of a task: neighbours in memory
constexpr double kTask = 4e6;           // multiplications of a task
constexpr int64_t kMostSums = 8 << 20;  // bytes of the sums of all chunks
#ifdef MSDA_THREADS_ALWAYS  // for tests
constexpr double kSmall = 1;
#else
constexpr double kSmall = 4e7;  // multiplications of one thread in about a millisecond
#endif
constexpr int64_t kTileRows = 3;  // with four vectors of columns a tile fits in 16 registers

struct Attention {
  const void* projected;
  const void* fill;
  const int64_t* places;
  const float* bias;
  const float* seam;     // may be null
  const int64_t* sizes;  // the six below
  float scale;           // of the scores
  const int64_t N = sizes[0], w = sizes[1], n = sizes[2], h = sizes[3], D = sizes[4], s = sizes[5];
  const int64_t wide = (n + 7) / 8 * 8;  // scores of a row, in memory
};

// 8 x 8 numbers, rows `from_stride` apart, to their transpose.
INLINE void transpose_block(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  vec x[8], y[8];
  for (int i = 0; i < 8; ++i) x[i] = load(from + i * from_stride);
  for (int i = 0; i < 8; i += 2) {
    y[i] = SHUFFLE(x[i], x[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    y[i + 1] = SHUFFLE(x[i], x[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; ++k) {
      x[i + 2 * k] = SHUFFLE(y[i + k], y[i + k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      x[i + 2 * k + 1] = SHUFFLE(y[i + k], y[i + k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    store(to + i * to_stride, SHUFFLE(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11));
    store(to + (i + 4) * to_stride, SHUFFLE(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15));
  }
}

INLINE void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t i = 0; i < rows; i += 8)
    for (int64_t j = 0; j < columns; j += 8) transpose_block(from + i * columns + j, columns, to + j * rows + i, rows);
}

// A factor by its elements' strides, so that it may be transposed.
struct Factor {
  const float* at;
  int64_t row, column;
};

template <int R, int V>
INLINE void tile(const Factor& a, int64_t inner, const float* b, int64_t width, float* c) {
  vec total[R][V] = {};
  for (int64_t k = 0; k < inner; ++k) {
    vec row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = load(b + k * width + 8 * v);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const float x = a.at[r * a.row + k * a.column];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) total[r][v] += x * row[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(c + r * width + 8 * v, total[r][v]);
}

template <int R>
INLINE void some_rows(const Factor& a, int64_t inner, const float* b, int64_t width, float* c) {
  int64_t j = 0;
  for (; j + 32 <= width; j += 32) tile<R, 4>(a, inner, b + j, width, c + j);
  switch ((width - j) / 8) {
    case 3: return tile<R, 3>(a, inner, b + j, width, c + j);
    case 2: return tile<R, 2>(a, inner, b + j, width, c + j);
    case 1: return tile<R, 1>(a, inner, b + j, width, c + j);
  }
}

// (rows, inner) @ (inner, width) -> (rows, width), width a multiple of eight.
CLONES void multiply(Factor a, int64_t rows, int64_t inner, const float* b, int64_t width, float* c) {
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows, a.at += kTileRows * a.row) some_rows<kTileRows>(a, inner, b, width, c + i * width);
  for (; i < rows; ++i, a.at += a.row) some_rows<1>(a, inner, b, width, c + i * width);
}

// Scores of window `window` become the exponentials of their softmax; `totals` are the sums of the rows.
INLINE void exponentials(const Attention& p, int64_t window, int64_t head, float* scores, float* totals) {
  const float* seam = window < p.w - p.s ? nullptr : p.seam + (window - (p.w - p.s)) * p.n * p.n;
  for (int64_t i = 0; i < p.n; ++i) {
    float* row = scores + i * p.wide;
    const float* bias = p.bias + (head * p.n + i) * p.n;
    for (int64_t j = 0; j < p.n; ++j) row[j] += bias[j];
    if (seam)
      for (int64_t j = 0; j < p.n; ++j) row[j] += seam[i * p.n + j];
    for (int64_t j = p.n; j < p.wide; ++j) row[j] = -INFINITY;
    vec largest = load(row), total = {};
    for (int64_t j = 8; j < p.wide; j += 8) largest = largest > load(row + j) ? largest : load(row + j);
    const float most = largest_of(largest);
    for (int64_t j = 0; j < p.wide; j += 8) {
      const vec x = load(row + j) - most, none = {};
      const vec e = x < none - 87.0f ? none : exp_of_negative(x);  // numbers as small as that would be slow later
      store(row + j, e);
      total += e;
    }
    totals[i] = sum(total);
  }
}

// Memory of a task: matrices (wide, D) whose last rows stay zero, (D, wide) and (wide, wide).
struct Scratch {
  std::vector<float> memory;
  float* next;
  Scratch(const Attention& p, int64_t tall, int64_t square)
      : memory(tall * p.wide * p.D + square * p.wide * p.wide + p.wide), next(memory.data()) {}
  float* take(int64_t size) { return (next += size) - size; }
};

// Rows of one head: queries (0), keys (1) or values (2) of all tokens, in `padding` those of padding.
template <typename T>
INLINE void read_rows(const Attention& p, const int64_t* places, int64_t part, int64_t head, float scale, float* to) {
  const int64_t at = (part * p.h + head) * p.D, stride = 3 * p.h * p.D;
  for (int64_t i = 0; i < p.n; ++i, to += p.D) {
    const T* row = at + (places[i] < p.N ? static_cast<const T*>(p.projected) + places[i] * stride
                                         : static_cast<const T*>(p.fill));
    for (int64_t d = 0; d < p.D; d += 8) store(to + d, load(row + d) * scale);
  }
}

// Work of a thread: some heads in some windows.
struct Part {
  int64_t chunk, first_head, last_head, first, last;
  int64_t count() const { return (last - first) * (last_head - first_head); }
  int64_t window(int64_t i) const { return first + i / (last_head - first_head); }
  int64_t head(int64_t i) const { return first_head + i % (last_head - first_head); }
};

// Windows in chunks of at least `multiplications` each, at most `most` chunks.
struct Parts {
  const Attention& p;
  int64_t per_chunk, chunks, groups = (p.h + kHeads - 1) / kHeads;
  Parts(const Attention& p, int64_t products, int64_t most) : p(p) {
    const double of_a_window = static_cast<double>(products * std::min(p.h, kHeads) * p.n) * p.n * p.D;
    per_chunk = std::max<int64_t>(static_cast<int64_t>(kTask / of_a_window) + 1, (p.w + most - 1) / most);
    chunks = (p.w + per_chunk - 1) / per_chunk;
  }
  int64_t count() const { return chunks * groups; }
  Part operator[](int64_t i) const {
    const int64_t chunk = i / groups, head = i % groups * kHeads, first = chunk * per_chunk;
    return {chunk, head, std::min(head + kHeads, p.h), first, std::min(first + per_chunk, p.w)};
  }
};

template <typename T>
INLINE void forward_part(const Attention& p, const Part& part, T* out) {
  Scratch scratch(p, 5, 1);
  const int64_t size = p.wide * p.D;
  float *query = scratch.take(size), *key = scratch.take(size), *value = scratch.take(size);
  float *keys = scratch.take(size), *attended = scratch.take(size), *scores = scratch.take(p.wide * p.wide);
  float* totals = scratch.take(p.wide);
  for (int64_t i = 0; i < part.count(); ++i) {  // no lambda: its code would not be the processor's version
    const int64_t window = part.window(i), head = part.head(i), *places = p.places + window * p.n;
    read_rows<T>(p, places, 0, head, p.scale, query);
    read_rows<T>(p, places, 1, head, 1, key);
    read_rows<T>(p, places, 2, head, 1, value);
    transpose(key, p.wide, p.D, keys);
    multiply({query, p.D, 1}, p.n, p.D, keys, p.wide, scores);
    exponentials(p, window, head, scores, totals);
    multiply({scores, p.wide, 1}, p.n, p.n, value, p.D, attended);
    for (int64_t k = 0; k < p.n; ++k) {
      if (places[k] >= p.N) continue;
      const float scale = 1 / totals[k];
      T* to = out + (places[k] * p.h + head) * p.D;
      for (int64_t d = 0; d < p.D; d += 8) store(to + d, load(attended + k * p.D + d) * scale);
    }
  }
}

template <typename T>
struct WindowGradients {
  const T* attended;  // (N, h, D), given
  T* projected;       // (N, 3, h, D)
  float* fill;        // (chunks, 3, h, D)
  float* bias;        // (chunks, h, n, wide)
};

template <typename T>
INLINE void write_rows(const Attention& p, const int64_t* places, int64_t part, int64_t head, float scale,
                       const float* from, T* to, float* fill) {
  const int64_t at = (part * p.h + head) * p.D, stride = 3 * p.h * p.D;
  for (int64_t i = 0; i < p.n; ++i, from += p.D)
    for (int64_t d = 0; d < p.D; d += 8) {
      const vec row = load(from + d) * scale;
      if (places[i] < p.N)
        store(to + places[i] * stride + at + d, row);
      else
        store(fill + at + d, load(fill + at + d) + row);
    }
}

// Softmax weights of exponentials, and in place of (n, wide) gradients of the weights those of the scores.
INLINE void softmax_gradients(const Attention& p, const float* totals, float* weights, float* gradients, float* sums) {
  for (int64_t i = 0; i < p.n; ++i, weights += p.wide, gradients += p.wide, sums += p.wide) {
    const float scale = 1 / totals[i];
    vec products = {};
    for (int64_t j = 0; j < p.wide; j += 8) {
      const vec weight = load(weights + j) * scale;
      store(weights + j, weight);
      products += weight * load(gradients + j);
    }
    const float mean = sum(products);
    for (int64_t j = 0; j < p.wide; j += 8) {
      const vec gradient = load(weights + j) * (load(gradients + j) - mean);
      store(gradients + j, gradient);
      store(sums + j, load(sums + j) + gradient);
    }
  }
}

template <typename T>
INLINE void backward_part(const Attention& p, const WindowGradients<T>& g, const Part& part) {
  Scratch scratch(p, 6, 2);
  const int64_t size = p.wide * p.D;
  float *query = scratch.take(size), *key = scratch.take(size), *value = scratch.take(size);
  float *transposed = scratch.take(size), *incoming = scratch.take(size), *result = scratch.take(size);
  float *weights = scratch.take(p.wide * p.wide), *of_scores = scratch.take(p.wide * p.wide);
  float* totals = scratch.take(p.wide);
  float* fill = g.fill + part.chunk * 3 * p.h * p.D;
  for (int64_t i = 0; i < part.count(); ++i) {  // no lambda: its code would not be the processor's version
    const int64_t window = part.window(i), head = part.head(i), *places = p.places + window * p.n;
    read_rows<T>(p, places, 0, head, p.scale, query);
    read_rows<T>(p, places, 1, head, 1, key);
    read_rows<T>(p, places, 2, head, 1, value);
    for (int64_t k = 0; k < p.n; ++k)
      for (int64_t d = 0; d < p.D; d += 8)
        store(incoming + k * p.D + d, places[k] < p.N ? load(g.attended + (places[k] * p.h + head) * p.D + d) : vec{});
    transpose(key, p.wide, p.D, transposed);
    multiply({query, p.D, 1}, p.n, p.D, transposed, p.wide, weights);
    exponentials(p, window, head, weights, totals);
    transpose(value, p.wide, p.D, transposed);
    multiply({incoming, p.D, 1}, p.n, p.D, transposed, p.wide, of_scores);
    softmax_gradients(p, totals, weights, of_scores, g.bias + (part.chunk * p.h + head) * p.n * p.wide);
    multiply({of_scores, p.wide, 1}, p.n, p.n, key, p.D, result);
    write_rows(p, places, 0, head, p.scale, result, g.projected, fill);
    multiply({of_scores, 1, p.wide}, p.n, p.n, query, p.D, result);
    write_rows(p, places, 1, head, 1, result, g.projected, fill);
    multiply({weights, 1, p.wide}, p.n, p.n, incoming, p.D, result);
    write_rows(p, places, 2, head, 1, result, g.projected, fill);
  }
}

CLONES void forward_task(const Attention& p, const Part& part, float* out) { forward_part(p, part, out); }
CLONES void forward_task(const Attention& p, const Part& part, uint16_t* out) { forward_part(p, part, out); }
CLONES void backward_task(const Attention& p, const WindowGradients<float>& g, const Part& part) {
  backward_part(p, g, part);
}
CLONES void backward_task(const Attention& p, const WindowGradients<uint16_t>& g, const Part& part) {
  backward_part(p, g, part);
}

int64_t useful_threads(const Attention& p, int64_t products, int64_t threads) {
  return static_cast<double>(products * p.w * p.h * p.n) * p.n * p.D < kSmall ? 1 : threads;
}

template <typename T>
void forward(const Attention& p, int64_t threads, T* out) {
  const Parts parts(p, 2, std::max<int64_t>(1, p.w));
  parallel(parts.count(), useful_threads(p, 2, threads), [&](int64_t i) { forward_task(p, parts[i], out); });
}

template <typename T>
void backward(const Attention& p, int64_t threads, const T* of_attended, T* of_projected, float* of_fill,
              float* of_bias) {
  const int64_t size = p.h * p.n * p.wide, width = 3 * p.h * p.D;
  const Parts parts(p, 5, std::max<int64_t>(1, kMostSums / (4 * size)));
  std::vector<float> fills(parts.chunks * width), biases(parts.chunks * size);
  const WindowGradients<T> g{of_attended, of_projected, fills.data(), biases.data()};
  parallel(parts.count(), useful_threads(p, 5, threads), [&](int64_t i) { backward_task(p, g, parts[i]); });
  for (int64_t chunk = 0; chunk < parts.chunks; ++chunk) {
    for (int64_t i = 0; i < width; ++i) of_fill[i] += fills[chunk * width + i];
    for (int64_t i = 0; i < p.h * p.n; ++i)
      for (int64_t j = 0; j < p.n; ++j) of_bias[i * p.n + j] += biases[chunk * size + i * p.wide + j];
  }
}

}  // namespace

extern "C" {

void msda_window_attention(const void* projected, const void* fill, const int64_t* places, const float* bias,
                           const float* seam, const int64_t* sizes, double scale, int64_t bfloat16, int64_t threads,
                           void* out) {
  const Attention p{projected, fill, places, bias, seam, sizes, static_cast<float>(scale)};
  bfloat16 ? forward(p, threads, static_cast<uint16_t*>(out)) : forward(p, threads, static_cast<float*>(out));
}

// `of_fill` and `of_bias` are added to.
void msda_window_attention_backward(const void* projected, const void* fill, const int64_t* places, const float* bias,
                                    const float* seam, const int64_t* sizes, double scale, int64_t bfloat16,
                                    int64_t threads, const void* of_attended, void* of_projected, float* of_fill,
                                    float* of_bias) {
  const Attention p{projected, fill, places, bias, seam, sizes, static_cast<float>(scale)};
  bfloat16 ? backward(p, threads, static_cast<const uint16_t*>(of_attended), static_cast<uint16_t*>(of_projected),
                      of_fill, of_bias)
           : backward(p, threads, static_cast<const float*>(of_attended), static_cast<float*>(of_projected), of_fill,
                      of_bias);
}
}
