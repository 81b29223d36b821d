// Group norm of maps with channels innermost on CPUs, in place, if asked for with a sum and a ReLU in the same pass.
//
// torch's own takes the variance in this layout for the mean square less the squared mean, in which digits cancel; here
// every block of rows has its own mean, and blocks are combined as in Chan, Golub and LeVeque, "Updating formulae and a
// pairwise algorithm for computing sample variances", 1979. Layouts: x and `plus` (B, N, C), weight and bias (C).

#include <cmath>
#include <vector>

#include "cpu_vectors.h"

namespace {

constexpr int64_t kRows = 64;         // of a block whose mean is its own: 64 KB of 256 channels in float32
constexpr int64_t kBlocks = 16;       // of a task
constexpr double kAlone = 1 << 18;    // values that one thread normalises in less than 0.2 ms

struct Maps {
  void* x;
  const void* plus;  // may be null
  const float* weight;
  const float* bias;
  int64_t B, N, C, groups;
  double epsilon;
  bool rectify;
};

// Where channel c stands in arrays that are read and written in pairs; those behind the last pair stay where they are.
template <typename T>
INLINE int64_t place(int64_t c, int64_t wide) {
  return sizeof(T) == 4 || c >= wide ? c : c / 16 * 16 + c % 16 / 2 + c % 2 * 8;
}

struct Moments {
  double count = 0, mean = 0, squares = 0;  // squares: of the distances from the mean, summed
  void add(double n, double other_mean, double other_squares) {
    const double distance = other_mean - mean, all = count + n;
    squares += other_squares + distance * distance * count * n / all;
    mean += distance * n / all;
    count = all;
  }
};

// Moments of each group in rows [first, last) of one image; `channels` has room for 2 * C.
template <typename T>
INLINE void measure(const Maps& m, const T* rows, int64_t first, int64_t last, float* channels, Moments* moments) {
  const int64_t C = m.C, wide = C / 16 * 16, width = C / m.groups;
  float *mean = channels, *squares = channels + C;
  for (int64_t row = first; row < last; row += kRows) {
    const int64_t end = std::min(row + kRows, last);
    const float share = 1.0f / static_cast<float>(end - row);
    for (int64_t c = 0; c < wide; c += 16) {
      Pair sum = {}, square = {};
      for (int64_t r = row; r < end; ++r) {
        const Pair x = load_pair(rows + r * C + c);
        sum.a += x.a, sum.b += x.b;
      }
      sum.a *= share, sum.b *= share;
      for (int64_t r = row; r < end; ++r) {
        const Pair x = load_pair(rows + r * C + c);
        const vec a = x.a - sum.a, b = x.b - sum.b;
        square.a += a * a, square.b += b * b;
      }
      store_pair(mean + c, sum);
      store_pair(squares + c, square);
    }
    for (int64_t c = wide; c < C; ++c) {
      float sum = 0, square = 0;
      for (int64_t r = row; r < end; ++r) sum += load_one(rows + r * C + c);
      mean[c] = sum * share;
      for (int64_t r = row; r < end; ++r) {
        const float x = load_one(rows + r * C + c) - mean[c];
        square += x * x;
      }
      squares[c] = square;
    }
    for (int64_t c = 0; c < C; ++c)
      moments[c / width].add(static_cast<double>(end - row), mean[place<T>(c, wide)], squares[place<T>(c, wide)]);
  }
}

struct Affine {  // by channel, at its place
  std::vector<float> mean, scale, shift;
};

// Rows [first, last) become (x - mean) * scale + shift, `plus` a summand, rectified if asked for.
template <typename T>
INLINE void apply(const Maps& m, T* rows, const T* plus, int64_t first, int64_t last, const Affine& affine) {
  const int64_t C = m.C, wide = C / 16 * 16;
  const float *mean = affine.mean.data(), *scale = affine.scale.data(), *shift = affine.shift.data();
  const float least = m.rectify ? 0.0f : -INFINITY;
  const vec floor = vec{} + least;
  for (int64_t r = first; r < last; ++r) {
    for (int64_t c = 0; c < wide; c += 16) {
      const Pair x = load_pair(rows + r * C + c), mu = load_pair(mean + c), a = load_pair(scale + c);
      Pair y = load_pair(shift + c);
      y.a += (x.a - mu.a) * a.a, y.b += (x.b - mu.b) * a.b;
      if (plus) {
        const Pair other = load_pair(plus + r * C + c);
        y.a += other.a, y.b += other.b;
      }
      store_pair(rows + r * C + c, {y.a < floor ? floor : y.a, y.b < floor ? floor : y.b});  // NaN stays
    }
    for (int64_t c = wide; c < C; ++c) {
      float y = (load_one(rows + r * C + c) - mean[c]) * scale[c] + shift[c];
      if (plus) y += load_one(plus + r * C + c);
      store_one(rows + r * C + c, y < least ? least : y);
    }
  }
}

CLONES void measure_task(const Maps& m, const float* rows, int64_t first, int64_t last, float* channels, Moments* to) {
  measure(m, rows, first, last, channels, to);
}
CLONES void measure_task(const Maps& m, const uint16_t* rows, int64_t first, int64_t last, float* channels,
                         Moments* to) {
  measure(m, rows, first, last, channels, to);
}
CLONES void apply_task(const Maps& m, float* rows, const float* plus, int64_t first, int64_t last,
                       const Affine& affine) {
  apply(m, rows, plus, first, last, affine);
}
CLONES void apply_task(const Maps& m, uint16_t* rows, const uint16_t* plus, int64_t first, int64_t last,
                       const Affine& affine) {
  apply(m, rows, plus, first, last, affine);
}

// What makes of one image's groups those of mean 0 and variance 1, and then weighs them.
template <typename T>
Affine affine_of(const Maps& m, const std::vector<Moments>& groups) {
  const int64_t width = m.C / m.groups;
  Affine affine{std::vector<float>(m.C), std::vector<float>(m.C), std::vector<float>(m.C)};
  for (int64_t c = 0; c < m.C; ++c) {
    const Moments& moments = groups[c / width];
    const int64_t at = place<T>(c, m.C / 16 * 16);
    affine.mean[at] = static_cast<float>(moments.mean);
    affine.scale[at] = static_cast<float>(m.weight[c] / std::sqrt(moments.squares / moments.count + m.epsilon));
    affine.shift[at] = m.bias[c];
  }
  return affine;
}

template <typename T>
void group_norm(const Maps& m, int64_t threads) {
  constexpr int64_t kTask = kRows * kBlocks;
  const int64_t tasks = (m.N + kTask - 1) / kTask;
  if (static_cast<double>(m.B) * m.N * m.C < kAlone) threads = 1;
  std::vector<Moments> parts(m.B * tasks * m.groups);
  parallel(m.B * tasks, threads, [&](int64_t i) {
    const int64_t b = i / tasks, first = i % tasks * kTask;
    std::vector<float> channels(2 * m.C);
    measure_task(m, static_cast<const T*>(m.x) + b * m.N * m.C, first, std::min(first + kTask, m.N), channels.data(),
                 &parts[i * m.groups]);
  });
  std::vector<Affine> affine;
  for (int64_t b = 0; b < m.B; ++b) {
    std::vector<Moments> groups(m.groups);
    for (int64_t i = 0; i < tasks * m.groups; ++i) {
      const Moments& part = parts[b * tasks * m.groups + i];
      groups[i % m.groups].add(part.count, part.mean, part.squares);
    }
    affine.push_back(affine_of<T>(m, groups));
  }
  parallel(m.B * tasks, threads, [&](int64_t i) {
    const int64_t b = i / tasks, first = i % tasks * kTask, image = b * m.N * m.C;
    apply_task(m, static_cast<T*>(m.x) + image, m.plus ? static_cast<const T*>(m.plus) + image : nullptr, first,
               std::min(first + kTask, m.N), affine[b]);
  });
}

}  // namespace

extern "C" void msda_group_norm(void* x, const void* plus, const float* weight, const float* bias, const int64_t* sizes,
                                double epsilon, int64_t rectify, int64_t bfloat16, int64_t threads) {
  const Maps m{x, plus, weight, bias, sizes[0], sizes[1], sizes[2], sizes[3], epsilon, rectify != 0};
  bfloat16 ? group_norm<uint16_t>(m, threads) : group_norm<float>(m, threads);
}
