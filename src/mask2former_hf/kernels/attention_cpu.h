// What attentions in bfloat16 on CPUs share: heads of 32 channels, a head's values as a factor, and softmax over AMX's
// tiles of 16 queries and 16 keys, each of which is one step of TDPBF16PS.
//
// A tile lies in 1 KB for itself: scores 16 x 16 float32, weights 16 x 32 bfloat16. With the products that fast softmax
// is most of the work: a tile of ones beside the values adds the weights up, so no row is summed by shuffles, and the
// largest scores of 16 rows are found at once.

#pragma once

#include "amx_cpu.h"

#ifdef BF16_TARGET
#include <cmath>

namespace {

constexpr int64_t kHeadWords = 16, kHeadDim = 32;

// Rows of values, two by two, as a panel of two vectors of columns; zero behind the last.
BF16_INLINE void pack_pairs(const uint16_t* const* rows, int64_t count, uint16_t* to) {
  alignas(64) uint16_t order[2][32];
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 16; ++k) {
      order[half][2 * k] = static_cast<uint16_t>(16 * half + k);
      order[half][2 * k + 1] = static_cast<uint16_t>(32 + 16 * half + k);
    }
  const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
  for (int64_t i = 0; i < count; i += 2, to += 64) {
    const __m512i a = _mm512_loadu_si512(rows[i]);
    const __m512i b = i + 1 < count ? _mm512_loadu_si512(rows[i + 1]) : _mm512_setzero_si512();
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
    _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(a, high, b));
  }
}

#ifdef AMX_TARGET

constexpr int64_t kSide = 16, kTile = 256;   // queries or keys of a tile, its scores
constexpr int64_t kWeights = 512;            // of a tile of 16 queries and 32 keys
constexpr int64_t kSums = 48;                // of a query: 32 channels and 16 times that of the weights

// Of 16 vectors the largest number of each.
BF16_INLINE __m512 largest_of_each(const float* rows) {
  __m512 x[16], y[8];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = _mm512_load_ps(rows + 16 * i);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    y[i] = _mm512_max_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)  // a quarter of a vector holds a number of each of four
    x[i] = _mm512_max_ps(_mm512_shuffle_ps(y[2 * i], y[2 * i + 1], 0x44), _mm512_shuffle_ps(y[2 * i], y[2 * i + 1], 0xee));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    y[i] = _mm512_max_ps(_mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0xdd));
  return _mm512_max_ps(_mm512_shuffle_f32x4(y[0], y[1], 0x88), _mm512_shuffle_f32x4(y[0], y[1], 0xdd));
}

// Scores of 16 queries and `count` tiles of keys, columns of a panel of 16.
AMX_INLINE void multiply_keys(const uint16_t* queries, const uint16_t* keys, int64_t count, float* scores) {
  asm volatile("" ::: "memory");  // see start_block
  _tile_loadd(4, queries, 64);
  for (int64_t t = 0; t < count; t += 2, keys += 1024, scores += 2 * kTile) {
    _tile_zero(0);
    _tile_loadd(5, keys, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_stored(0, scores, 64);
    if (t + 1 == count) break;
    _tile_zero(1);
    _tile_loadd(6, keys + 512, 64);
    _tile_dpbf16ps(1, 4, 6);
    _tile_stored(1, scores + kTile, 64);
  }
}

AMX_INLINE void load_ones() {
  alignas(64) static const uint32_t kOnes[16] = {
      0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80,
      0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
  _tile_loadd(7, kOnes, 0);
}

// Sums of 16 queries, tiles 0 to 2, over 32 keys; tile 7 holds ones.
AMX_INLINE void add_values(const uint16_t* weights, const uint16_t* values) {
  _tile_loadd(4, weights, 64);
  _tile_loadd(5, values, 128);
  _tile_dpbf16ps(0, 4, 5);
  _tile_loadd(6, values + 32, 128);
  _tile_dpbf16ps(1, 4, 6);
  _tile_dpbf16ps(2, 4, 7);
}

AMX_INLINE void store_sums(float* sums) {
  _tile_stored(0, sums, 4 * kSums);
  _tile_stored(1, sums + 16, 4 * kSums);
  _tile_stored(2, sums + 32, 4 * kSums);
}

// What a query has attended to; zero where its weights are.
BF16_INLINE void write_mean(const float* sums, uint16_t* to) {
  const __m512 total = _mm512_load_ps(sums + 32);
  const __mmask16 some = _mm512_cmp_ps_mask(total, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  const __m512 scale = _mm512_maskz_rcp14_ps(some, total);
  const __m512 low = _mm512_mul_ps(_mm512_load_ps(sums), scale), high = _mm512_mul_ps(_mm512_load_ps(sums + 16), scale);
  _mm512_storeu_si512(to, as<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}

#endif

}  // namespace
#endif
