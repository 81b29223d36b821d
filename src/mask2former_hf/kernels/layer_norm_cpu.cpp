// Layer norm of rows on CPUs, if asked for of a sum, in one pass over memory: torch's two read the sum again.
// Layouts (row-major): x, update, sum and out (M, C), weight and bias (C); C a multiple of eight. All in float32.

#include <cmath>
#include <vector>

#include "bf16_cpu.h"

namespace {

struct Rows {
  const void* x;
  const void* update;  // may be null
  const float* weight;
  const float* bias;
  int64_t M, C;
  float epsilon;
  void* sum;  // may be null
  void* out;
};

constexpr int64_t kRowsOfATask = 64;
constexpr double kFewValues = 1 << 18;  // that one thread normalises in less than 0.2 ms

template <typename T>
INLINE void norm_rows(const Rows& p, int64_t first, int64_t last, float* row) {
  const int64_t C = p.C;
  const float share = 1.0f / static_cast<float>(C);
  for (int64_t i = first; i < last; ++i) {
    const T* x = static_cast<const T*>(p.x) + i * C;
    vec total = {};
    for (int64_t c = 0; c < C; c += 8) {
      vec y = load(x + c);
      if (p.update) {
        y += load(static_cast<const T*>(p.update) + i * C + c);
        if (p.sum) store(static_cast<T*>(p.sum) + i * C + c, y);
      }
      store(row + c, y);
      total += y;
    }
    const float mean = sum(total) * share;
    vec squares = {};
    for (int64_t c = 0; c < C; c += 8) {
      const vec y = load(row + c) - mean;
      squares += y * y;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) * share + p.epsilon);
    for (int64_t c = 0; c < C; c += 8)
      store(static_cast<T*>(p.out) + i * C + c, (load(row + c) - mean) * scale * load(p.weight + c) + load(p.bias + c));
  }
}

CLONES void norm_task(const Rows& p, int64_t first, int64_t last, float* row, const float*) {
  norm_rows<float>(p, first, last, row);
}
CLONES void norm_task(const Rows& p, int64_t first, int64_t last, float* row, const uint16_t*) {
  norm_rows<uint16_t>(p, first, last, row);
}

#ifdef BF16_TARGET
// 16 channels at a time, for a multiple of them.
BF16_TARGET void norm_task_bf16(const Rows& p, int64_t first, int64_t last, float* row) {
  const int64_t C = p.C;
  const float share = 1.0f / static_cast<float>(C);
  for (int64_t i = first; i < last; ++i) {
    const __m256i* x = reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(p.x) + i * C);
    const __m256i* update =
        p.update ? reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(p.update) + i * C) : nullptr;
    __m256i* sum = p.sum ? reinterpret_cast<__m256i*>(static_cast<uint16_t*>(p.sum) + i * C) : nullptr;
    __m256i* out = reinterpret_cast<__m256i*>(static_cast<uint16_t*>(p.out) + i * C);
    __m512 total = _mm512_setzero_ps(), squares = total;
    for (int64_t c = 0; c < C / 16; ++c) {
      __m512 y = widened(_mm256_loadu_si256(x + c));
      if (update) y = _mm512_add_ps(y, widened(_mm256_loadu_si256(update + c)));
      if (sum) _mm256_storeu_si256(sum + c, narrowed(y));
      _mm512_storeu_ps(row + 16 * c, y);
      total = _mm512_add_ps(total, y);
    }
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total) * share);
    for (int64_t c = 0; c < C / 16; ++c) {
      const __m512 y = _mm512_sub_ps(_mm512_loadu_ps(row + 16 * c), mean);
      squares = _mm512_fmadd_ps(y, y, squares);
    }
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) * share + p.epsilon));
    for (int64_t c = 0; c < C / 16; ++c) {
      const __m512 y = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(row + 16 * c), mean), scale);
      const __m512 weight = _mm512_loadu_ps(p.weight + 16 * c), bias = _mm512_loadu_ps(p.bias + 16 * c);
      _mm256_storeu_si256(out + c, narrowed(_mm512_fmadd_ps(y, weight, bias)));
    }
  }
}
bool in_sixteens(const Rows& p) { return p.C % 16 == 0 && multiplies_bfloat16(); }
#else
void norm_task_bf16(const Rows&, int64_t, int64_t, float*) {}
bool in_sixteens(const Rows&) { return false; }
#endif

template <typename T>
void layer_norm(const Rows& p, int64_t threads) {
  if (static_cast<double>(p.M) * p.C < kFewValues) threads = 1;
  const bool wide = sizeof(T) == 2 && in_sixteens(p);
  parallel((p.M + kRowsOfATask - 1) / kRowsOfATask, threads, [&](int64_t i) {
    std::vector<float> row(p.C);
    const int64_t first = i * kRowsOfATask, last = std::min(first + kRowsOfATask, p.M);
    wide ? norm_task_bf16(p, first, last, row.data())
         : norm_task(p, first, last, row.data(), static_cast<const T*>(p.x));
  });
}

}  // namespace

extern "C" void msda_layer_norm(const void* x, const void* update, const float* weight, const float* bias,
                                const int64_t* sizes, double epsilon, int64_t bfloat16, int64_t threads, void* sum,
                                void* out) {
  const Rows p{x, update, weight, bias, sizes[0], sizes[1], static_cast<float>(epsilon), sum, out};
  bfloat16 ? layer_norm<uint16_t>(p, threads) : layer_norm<float>(p, threads);
}
