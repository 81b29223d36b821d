// 3 x 3 convolutions with 2.25 times fewer multiplications: Winograd's F(2 x 2, 3 x 3) (Lavin and Gray, "Fast
// Algorithms for Convolutional Neural Networks", CVPR 2016, section 4.1).
//
// Of every 4 x 4 patch of the input, two apart, and of every 3 x 3 weight 16 sums are made in float32, and rounded to
// bfloat16 where that is multiplied; 16 products of matrices and other sums of their results, in float32, give 2 x 2
// outputs. Some tiles and 32 output channels at a time, so that all of it stays in the second cache. The weight is
// transformed in every call, so that none can be stale.

#include "convolution_cpu.h"

#ifdef BF16_TARGET
namespace {

constexpr int64_t kPositions = 16, kTileRows = 12;
constexpr int64_t kCache = 245760;  // bytes of a task: a quarter of the second one

struct Weights;  // what memory is for
struct Patches;
struct Products;

template <typename T>
INLINE int64_t tiles_across(const Convolution<T>& p) {
  return (p.W + 1) / 2;
}
template <typename T>
INLINE int64_t tiles_of(const Convolution<T>& p) {  // an image
  return (p.H + 1) / 2 * tiles_across(p);
}

BF16_INLINE void transform_weight(const __m512 (&w)[9], __m512 (&to)[16]) {
  const __m512 half = _mm512_set1_ps(0.5f);
  __m512 rows[4][3];
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    const __m512 ends = _mm512_add_ps(w[j], w[6 + j]);
    rows[0][j] = w[j], rows[3][j] = w[6 + j];
    rows[1][j] = _mm512_mul_ps(half, _mm512_add_ps(ends, w[3 + j]));
    rows[2][j] = _mm512_mul_ps(half, _mm512_sub_ps(ends, w[3 + j]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 ends = _mm512_add_ps(rows[i][0], rows[i][2]);
    to[4 * i] = rows[i][0], to[4 * i + 3] = rows[i][2];
    to[4 * i + 1] = _mm512_mul_ps(half, _mm512_add_ps(ends, rows[i][1]));
    to[4 * i + 2] = _mm512_mul_ps(half, _mm512_sub_ps(ends, rows[i][1]));
  }
}

// Weights of output channels [32 * panel, 32 * panel + 32), in panels by position: 32 columns side by side of every
// input channel, in bfloat16 of every two.
BF16_TARGET void transform_weights(const Convolution<float>& p, int64_t panel, float* packed) {
  for (int64_t c = 0; c < p.C; ++c)
    for (int half = 0; half < 2; ++half) {
      __m512 w[9], whole[16];
      load_weights(p.weight + ((kColumns * panel + 16 * half) * p.C + c) * 9, p.C * 9, w);
      transform_weight(w, whole);
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k)
        _mm512_store_ps(packed + (k * p.panels + panel) * p.panel + kColumns * c + 16 * half, whole[k]);
    }
}
BF16_TARGET void transform_weights(const Convolution<uint16_t>& p, int64_t panel, uint16_t* packed) {
  for (int64_t c = 0; c < p.C; c += 2)
    for (int half = 0; half < 2; ++half) {
      const uint16_t* from = p.weight + ((kColumns * panel + 16 * half) * p.C + c) * 9;
      __m512 w[9], first[16], second[16];
      load_weights(from, p.C * 9, w);
      transform_weight(w, first);
      load_weights(from + 9, p.C * 9, w);
      transform_weight(w, second);
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) {
        const __m512i low = _mm512_cvtepu16_epi32(narrowed(first[k])), high = _mm512_cvtepu16_epi32(narrowed(second[k]));
        _mm512_store_si512(packed + (k * p.panels + panel) * p.panel + kColumns * c + 32 * half,
                           _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    }
}

// (kPositions, count, C) of the patches of tiles [first, first + count) of an image.
template <typename T>
BF16_TARGET void transform_patches(const Convolution<T>& p, int64_t b, int64_t first, int64_t count, T* to) {
  for (int64_t t = 0; t < count; ++t) {
    const int64_t top = (first + t) / tiles_across(p) * 2 - 1, left = (first + t) % tiles_across(p) * 2 - 1;
    for (int64_t c = 0; c < p.C; c += 16) {
      __m512 d[4][4], half[4][4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const int64_t y = top + i, x = left + j;
          const bool inside = y >= 0 && y < p.H && x >= 0 && x < p.W;
          const T* from = p.x + ((b * p.H + (inside ? y : 0)) * p.W + (inside ? x : 0)) * p.C + c;
          d[i][j] = load_channels(static_cast<__mmask16>(inside ? 0xffff : 0), from);
        }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        half[0][j] = _mm512_sub_ps(d[0][j], d[2][j]), half[1][j] = _mm512_add_ps(d[1][j], d[2][j]);
        half[2][j] = _mm512_sub_ps(d[2][j], d[1][j]), half[3][j] = _mm512_sub_ps(d[1][j], d[3][j]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512 whole[4] = {_mm512_sub_ps(half[i][0], half[i][2]), _mm512_add_ps(half[i][1], half[i][2]),
                                 _mm512_sub_ps(half[i][2], half[i][1]), _mm512_sub_ps(half[i][1], half[i][3])};
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) store_channels(to + ((4 * i + j) * count + t) * p.C + c, whole[j]);
      }
    }
  }
}

template <int R>
BF16_INLINE void sum_products(const uint16_t* const* rows, const uint16_t* weights, int64_t C, __m512 (&sums)[R][2]) {
  accumulate<R, 2>(rows, weights, kColumns, C / 2, sums);
}
template <int R>
BF16_INLINE void sum_products(const float* const* rows, const float* weights, int64_t C, __m512 (&sums)[R][2]) {
  for (int64_t c = 0; c < C; ++c, weights += kColumns) {
    const __m512 panel[2] = {_mm512_load_ps(weights), _mm512_load_ps(weights + 16)};
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512 x = _mm512_set1_ps(rows[r][c]);
      sums[r][0] = _mm512_fmadd_ps(x, panel[0], sums[r][0]), sums[r][1] = _mm512_fmadd_ps(x, panel[1], sums[r][1]);
    }
  }
}

template <int R, typename T>
BF16_INLINE void multiply_tiles(const T* patches, const T* weights, int64_t C, float* to) {
  const T* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = patches + r * C;
  __m512 sums[R][2] = {};
  sum_products<R>(rows, weights, C, sums);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    _mm512_store_ps(to + kColumns * r, sums[r][0]), _mm512_store_ps(to + kColumns * r + 16, sums[r][1]);
}

// The 2 x 2 outputs of a tile of 16 channels, of (kPositions, count, 32) products.
template <typename T>
BF16_INLINE void write_outputs(const Convolution<T>& p, int64_t b, int64_t tile, const Columns& columns,
                               const float* products, int64_t count) {
  __m512 half[2][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    __m512 m[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) m[i] = _mm512_load_ps(products + (4 * i + j) * count * kColumns);
    half[0][j] = _mm512_add_ps(_mm512_add_ps(m[0], m[1]), m[2]);
    half[1][j] = _mm512_sub_ps(_mm512_sub_ps(m[1], m[2]), m[3]);
  }
  const int64_t y = tile / tiles_across(p) * 2, x = tile % tiles_across(p) * 2;
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512* m = half[i];
    const __m512 sums[2] = {_mm512_add_ps(_mm512_add_ps(m[0], m[1]), m[2]),
                            _mm512_sub_ps(_mm512_sub_ps(m[1], m[2]), m[3])};
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j)
      if (y + i < p.H && x + j < p.W) write_sums(p, (b * p.H + y + i) * p.W + x + j, columns, sums[j]);
  }
}

template <typename T>
BF16_TARGET void convolve_tiles(const Convolution<T>& p, int64_t b, int64_t first, int64_t count, const T* packed,
                                T* patches, float* products) {
  transform_patches(p, b, first, count, patches);
  for (int64_t panel = 0; panel < p.panels; ++panel) {
    for (int64_t k = 0; k < kPositions; ++k) {
      const T *weights = packed + (k * p.panels + panel) * p.panel, *own = patches + k * count * p.C;
      float* to = products + k * count * kColumns;
      int64_t t = 0;
      for (; t + kTileRows <= count; t += kTileRows)
        multiply_tiles<kTileRows>(own + t * p.C, weights, p.C, to + kColumns * t);
      for (; t + 4 <= count; t += 4) multiply_tiles<4>(own + t * p.C, weights, p.C, to + kColumns * t);
      for (; t < count; ++t) multiply_tiles<1>(own + t * p.C, weights, p.C, to + kColumns * t);
    }
    const Columns columns[2] = {columns_from(p, kColumns * panel), columns_from(p, kColumns * panel + 16)};
    for (int64_t t = 0; t < count; ++t)
      for (int v = 0; v < 2; ++v)
        write_outputs(p, b, first + t, columns[v], products + kColumns * t + 16 * v, count);
  }
}

// Tiles of a task: what fits in the cache, as many as others have.
template <typename T>
int64_t tiles_at_once(const Convolution<T>& p, int64_t threads) {
  const int64_t bytes = kPositions * (p.C * sizeof(T) + kColumns * sizeof(float));
  const int64_t most = std::max<int64_t>(2, kCache / bytes / kTileRows) * kTileRows;
  const int64_t rounds = (p.B * tiles_of(p) + threads * most - 1) / (threads * most);
  const int64_t even = (p.B * tiles_of(p) + threads * rounds - 1) / (threads * rounds);
  return std::min(most, (even + kTileRows - 1) / kTileRows * kTileRows);
}

template <typename T>
void convolve(const Convolution<T>& p, int64_t threads) {
  const Kept<Weights, T> packed(kPositions * p.panels * p.panel);
  parallel(p.panels, threads, [&](int64_t i) { transform_weights(p, i, packed.get()); });
  const int64_t most = tiles_at_once(p, threads), chunks = (tiles_of(p) + most - 1) / most;
  std::atomic<int64_t> next{0};
  parallel(std::min(threads, p.B * chunks), threads, [&](int64_t) {  // as many as there are threads, with memory each
    const Kept<Patches, T> patches(kPositions * most * p.C);
    const Kept<Products, float> products(kPositions * most * kColumns);
    for (int64_t i = next++; i < p.B * chunks; i = next++) {
      const int64_t first = i % chunks * most, count = std::min(most, tiles_of(p) - first);
      convolve_tiles(p, i / chunks, first, count, packed.get(), patches.get(), products.get());
    }
  });
}

}  // namespace
#endif

extern "C" {

#ifdef BF16_TARGET
void msda_convolution(const void* x, const void* weight, const float* scale, const float* bias, const int64_t* sizes,
                      int64_t rectify, int64_t bfloat16, int64_t threads, void* out) {
  if (bfloat16) {
    const auto *own = static_cast<const uint16_t*>(x), *factors = static_cast<const uint16_t*>(weight);
    const Convolution<uint16_t> p{own, factors, scale, bias, sizes, rectify != 0, static_cast<uint16_t*>(out)};
    has_tiles() && p.C % kAmxDepth == 0 ? convolve_by_tiles(p, threads) : convolve(p, threads);
  } else {
    const auto *own = static_cast<const float*>(x), *factors = static_cast<const float*>(weight);
    convolve(Convolution<float>{own, factors, scale, bias, sizes, rectify != 0, static_cast<float*>(out)}, threads);
  }
}
#else
void msda_convolution(const void*, const void*, const float*, const float*, const int64_t*, int64_t, int64_t, int64_t,
                      void*) {}
#endif
}
