// What both algorithms for 3 x 3 convolutions share. Layouts (row-major): x (B, H, W, C), weight (O, C, 3, 3), scale and
// bias (O), out (B, H, W, O); C a multiple of 16, O of 32; stride and padding 1.

#pragma once

#include "amx_cpu.h"

#ifdef BF16_TARGET

constexpr int64_t kColumns = 32;  // output channels of a panel

template <typename T>
struct Convolution {
  const T* x;
  const T* weight;
  const float* scale;  // of what is summed, may be null
  const float* bias;   // may be null
  const int64_t* sizes;  // the five below
  bool rectify;
  T* out;
  const int64_t B = sizes[0], H = sizes[1], W = sizes[2], C = sizes[3], O = sizes[4];
  const int64_t panel = C * kColumns, panels = O / kColumns;  // numbers of 32 output channels at one position
};

// By AMX, where there is one and C is a multiple of 32: convolution_tiles_cpu.cpp.
__attribute__((visibility("hidden"))) void convolve_by_tiles(const Convolution<uint16_t>& p, int64_t threads);

namespace {

BF16_INLINE __m512 load_channels(__mmask16 present, const float* p) { return _mm512_maskz_loadu_ps(present, p); }
BF16_INLINE __m512 load_channels(__mmask16 present, const uint16_t* p) {
  return widened(_mm256_maskz_loadu_epi16(present, p));
}
BF16_INLINE void store_channels(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
BF16_INLINE void store_channels(uint16_t* p, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrowed(x));
}

// The nine weights of one input channel for 16 output channels that are `step` numbers apart.
BF16_INLINE void load_weights(const float* from, int64_t step, __m512 (&w)[9]) {
  const __m512i places = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                            _mm512_set1_epi32(static_cast<int>(step)));
#pragma GCC unroll 9
  for (int j = 0; j < 9; ++j) w[j] = _mm512_i32gather_ps(places, from + j, 4);
}
BF16_INLINE void load_weights(const uint16_t* from, int64_t step, __m512 (&w)[9]) {
  const __m512i places = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                            _mm512_set1_epi32(static_cast<int>(step)));
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
#pragma GCC unroll 4
  for (int j = 0; j < 8; j += 2) {  // two neighbours
    const __m512i words = _mm512_i32gather_epi32(places, from + j, 2);
    w[j] = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    w[j + 1] = _mm512_castsi512_ps(_mm512_and_si512(words, upper));
  }
  w[8] = _mm512_castsi512_ps(_mm512_and_si512(_mm512_i32gather_epi32(places, from + 7, 2), upper));
}

// 16 output channels, and what follows their sums.
struct Columns {
  int64_t first;
  __m512 scale, bias;
};

template <typename T>
BF16_INLINE Columns columns_from(const Convolution<T>& p, int64_t first) {
  return {first, p.scale ? _mm512_loadu_ps(p.scale + first) : _mm512_set1_ps(1),
          p.bias ? _mm512_loadu_ps(p.bias + first) : _mm512_setzero_ps()};
}

template <typename T>
BF16_INLINE void write_sums(const Convolution<T>& p, int64_t pixel, const Columns& columns, __m512 sums) {
  const __m512 none = _mm512_setzero_ps();
  __m512 y = _mm512_fmadd_ps(sums, columns.scale, columns.bias);
  if (p.rectify) y = _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(y, none, _CMP_LT_OQ), none);  // NaN stays
  store_channels(p.out + pixel * p.O + columns.first, y);
}

}  // namespace
#endif
