// Products of bfloat16 by AVX-512 BF16: VDPBF16PS adds the products of two neighbours to each of 16 float32 sums.
//
// One factor is read as it lies, a word of two neighbours at a time; the other lies in panels, the words of 16 columns
// side by side. Compiled where the compiler can, run where the processor can: msda_multiplies_bfloat16().

#pragma once

#include "cpu_vectors.h"

#if defined(__x86_64__) && !defined(MSDA_NO_BF16)
#include <immintrin.h>

#include <new>

#define BF16_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")))
#define BF16_INLINE static inline __attribute__((always_inline)) BF16_TARGET

namespace {

typedef uint32_t word __attribute__((aligned(2), may_alias));  // two neighbours

// Memory by cache lines.
struct ReleaseAligned {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};
template <typename T>
using Aligned = std::unique_ptr<T, ReleaseAligned>;
template <typename T>
Aligned<T> aligned(int64_t count) {
  return Aligned<T>(static_cast<T*>(::operator new(sizeof(T) * count, std::align_val_t(64))));
}

constexpr int64_t kMostKept = 32 << 20;  // bytes

// Memory of this thread for a purpose, one at a time. Up to 32 MB the thread keeps it: what it gave back would be fresh
// pages the next time.
template <typename Purpose, typename T>
class Kept {
 public:
  explicit Kept(int64_t count) {
    static thread_local Aligned<T> kept;
    static thread_local int64_t held = 0;
    if (static_cast<int64_t>(sizeof(T)) * count > kMostKept) {
      own_ = aligned<T>(count);
    } else if (held < count) {
      held = 0;
      kept.reset();
      kept = aligned<T>(count);
      held = count;
    }
    data_ = own_ ? own_.get() : kept.get();
  }
  T* get() const { return data_; }

 private:
  Aligned<T> own_;
  T* data_;
};

BF16_INLINE __m512 dot(__m512 sums, __m512i pairs, __m512i others) {
  return _mm512_dpbf16_ps(sums, as<__m512bh>(pairs), as<__m512bh>(others));
}

// Sums of R rows and 16 * V columns over `words` words; rows from `a` on, panels `b_stride` words a step.
template <int R, int V>
BF16_INLINE void accumulate(const uint16_t* const* rows, const uint16_t* b, int64_t b_stride, int64_t words,
                            __m512 (&sums)[R][V]) {
  const word* a[R];
  for (int r = 0; r < R; ++r) a[r] = reinterpret_cast<const word*>(rows[r]);
  for (int64_t k = 0; k < words; ++k, b += 2 * b_stride) {
    __m512i panel[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) panel[v] = _mm512_loadu_si512(b + 32 * v);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512i pair = _mm512_set1_epi32(static_cast<int>(a[r][k]));
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sums[r][v] = dot(sums[r][v], pair, panel[v]);
    }
  }
}

// 16 rows of 16 words to their transpose: word j of row i becomes word i of row j.
BF16_INLINE void transpose_words(__m512i (&x)[16]) {
  __m512i y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // now x[i + j] holds words j, j + 4, j + 8, j + 12 of rows i to i + 3
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i low = _mm512_shuffle_i32x4(x[j], x[j + 4], 0x88), high = _mm512_shuffle_i32x4(x[j], x[j + 4], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(x[j + 8], x[j + 12], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(x[j + 8], x[j + 12], 0xdd);
    y[j] = _mm512_shuffle_i32x4(low, low2, 0x88);
    y[j + 8] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    y[j + 4] = _mm512_shuffle_i32x4(high, high2, 0x88);
    y[j + 12] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}

// Of `count` rows of `words` words one block of 16 columns of a panel, zero behind the last row; `step` words a step.
BF16_INLINE void pack_columns(const uint16_t* const* rows, int64_t count, int64_t words, uint16_t* to, int64_t step) {
  for (int64_t k = 0; k < words; k += 16) {
    const __mmask16 present = static_cast<__mmask16>((1u << std::min<int64_t>(16, words - k)) - 1);
    __m512i x[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      x[i] = i < count ? _mm512_maskz_loadu_epi32(present, rows[i] + 2 * k) : _mm512_setzero_si512();
    transpose_words(x);
    const int64_t last = std::min<int64_t>(16, words - k);
    for (int64_t j = 0; j < last; ++j) _mm512_storeu_si512(to + 2 * (k + j) * step, x[j]);
  }
}

// exp(x) of x <= 0, to 3e-6 of the value; zero far below.
BF16_INLINE __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104), x);  // in this order NaN stays NaN
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 e = _mm512_fmadd_ps(r, _mm512_set1_ps(8.3334519073e-3f), _mm512_set1_ps(4.1665795894e-2f));
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.6666665459e-1f));
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(5.0000001201e-1f));
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f));
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(e, n);
}

constexpr float kLog2E = 1.44269504f;

// 2^x of x <= 0, to 1e-4 of the value, for what is rounded to 2e-3: 2^(x - floor x) by a minimax polynomial. Zero where
// `some` is not set.
BF16_INLINE __m512 power_of_two(__mmask16 some, __m512 x) {
  const __m512 f = _mm512_reduce_ps(x, 9);  // 0 for infinities
  __m512 e = _mm512_fmadd_ps(f, _mm512_set1_ps(0.0780230066f), _mm512_set1_ps(0.226069391f));
  e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(0.695832847f));
  e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(0.999925245f));
  return _mm512_maskz_scalef_ps(some, e, x);
}

BF16_INLINE __m512 widened(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

BF16_INLINE __m256i narrowed(__m512 x) { return as<__m256i>(_mm512_cvtneps_pbh(x)); }

inline bool multiplies_bfloat16() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

}  // namespace
#endif
