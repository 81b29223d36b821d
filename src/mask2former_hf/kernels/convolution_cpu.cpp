// 3 x 3 convolutions in bfloat16 with 2.25 times fewer multiplications: Winograd's F(2 x 2, 3 x 3) (Lavin and Gray, "Fast
// Algorithms for Convolutional Neural Networks", CVPR 2016, section 4.1).
//
// Of every 4 x 4 patch of the input, two apart, and of every 3 x 3 weight 16 sums are made in float32 and rounded to
// bfloat16; 16 products of matrices and other sums of their results, in float32, give 2 x 2 outputs. Some tiles and 32
// output channels at a time, so that all of it stays in the second cache. Layouts (row-major): x (B, H, W, C), weight
// (O, C, 3, 3), bias (O), out (B, H, W, O); C a multiple of 16, O of 32; stride and padding 1.

#include "bf16_cpu.h"

#ifdef BF16_TARGET
#include <new>

namespace {

constexpr int64_t kTiles = 96, kPositions = 16;

struct Convolution {
  const uint16_t* x;
  const uint16_t* weight;
  const uint16_t* bias;  // may be null
  const int64_t* sizes;  // the five below
  uint16_t* out;
  const int64_t B = sizes[0], H = sizes[1], W = sizes[2], C = sizes[3], O = sizes[4];
  const int64_t across = (W + 1) / 2, tiles = (H + 1) / 2 * across;  // of an image
  const int64_t panel = C * 32;                                      // numbers of 32 output channels at one position
};

struct ReleaseCells {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};
template <typename T>
using Cells = std::unique_ptr<T, ReleaseCells>;
template <typename T>
Cells<T> cells(int64_t count) {
  return Cells<T>(static_cast<T*>(::operator new(sizeof(T) * count, std::align_val_t(64))));
}

// Weights of output channels [32 * panel, 32 * panel + 32), in panels by position.
BF16_TARGET void transform_weights(const Convolution& p, int64_t panel, uint16_t* packed) {
  const int64_t panels = p.O / 32;
  for (int64_t column = 0; column < 32; ++column)
    for (int64_t c = 0; c < p.C; ++c) {
      const uint16_t* weight = p.weight + ((32 * panel + column) * p.C + c) * 9;
      float half[4][3];
      for (int j = 0; j < 3; ++j) {
        const float a = load_one(weight + j), b = load_one(weight + 3 + j), d = load_one(weight + 6 + j);
        half[0][j] = a, half[1][j] = 0.5f * (a + b + d), half[2][j] = 0.5f * (a - b + d), half[3][j] = d;
      }
      uint16_t* to = packed + panel * p.panel + c / 2 * 64 + 2 * column + c % 2;
      for (int i = 0; i < 4; ++i) {
        const float a = half[i][0], b = half[i][1], d = half[i][2];
        const float whole[4] = {a, 0.5f * (a + b + d), 0.5f * (a - b + d), d};
        for (int j = 0; j < 4; ++j) store_one(to + (4 * i + j) * panels * p.panel, whole[j]);
      }
    }
}

// (kPositions, kTiles, C) of the patches of tiles [first, first + count) of an image.
BF16_TARGET void transform_patches(const Convolution& p, int64_t b, int64_t first, int64_t count, uint16_t* to) {
  for (int64_t t = 0; t < count; ++t) {
    const int64_t top = (first + t) / p.across * 2 - 1, left = (first + t) % p.across * 2 - 1;
    for (int64_t c = 0; c < p.C; c += 16) {
      __m512 d[4][4], half[4][4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const int64_t y = top + i, x = left + j;
          const bool inside = y >= 0 && y < p.H && x >= 0 && x < p.W;
          const uint16_t* from = p.x + ((b * p.H + (inside ? y : 0)) * p.W + (inside ? x : 0)) * p.C + c;
          d[i][j] = widened(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(inside ? 0xffff : 0), from));
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
        for (int j = 0; j < 4; ++j)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + ((4 * i + j) * kTiles + t) * p.C + c), narrowed(whole[j]));
      }
    }
  }
}

template <int R>
BF16_INLINE void multiply_tiles(const Convolution& p, const uint16_t* patches, const uint16_t* weights, float* to) {
  const uint16_t* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = patches + r * p.C;
  __m512 sums[R][2] = {};
  accumulate<R, 2>(rows, weights, 32, p.C / 2, sums);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) _mm512_store_ps(to + 32 * r, sums[r][0]), _mm512_store_ps(to + 32 * r + 16, sums[r][1]);
}

// The 2 x 2 outputs of a tile of 16 channels, of (kPositions, kTiles, 32) products.
BF16_INLINE void write_outputs(const Convolution& p, int64_t b, int64_t tile, int64_t channel, const float* products) {
  __m512 half[2][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    __m512 m[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) m[i] = _mm512_load_ps(products + (4 * i + j) * kTiles * 32);
    half[0][j] = _mm512_add_ps(_mm512_add_ps(m[0], m[1]), m[2]);
    half[1][j] = _mm512_sub_ps(_mm512_sub_ps(m[1], m[2]), m[3]);
  }
  const __m512 bias = p.bias ? widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p.bias + channel)))
                             : _mm512_setzero_ps();
  const int64_t y = tile / p.across * 2, x = tile % p.across * 2;
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512* m = half[i];
    const __m512 sums[2] = {_mm512_add_ps(_mm512_add_ps(m[0], m[1]), m[2]),
                            _mm512_sub_ps(_mm512_sub_ps(m[1], m[2]), m[3])};
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      if (y + i >= p.H || x + j >= p.W) continue;
      uint16_t* to = p.out + ((b * p.H + y + i) * p.W + x + j) * p.O + channel;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrowed(_mm512_add_ps(sums[j], bias)));
    }
  }
}

BF16_TARGET void convolve_tiles(const Convolution& p, int64_t b, int64_t first, int64_t count, const uint16_t* packed,
                                uint16_t* patches, float* products) {
  transform_patches(p, b, first, count, patches);
  const int64_t panels = p.O / 32;
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int64_t k = 0; k < kPositions; ++k) {
      const uint16_t *weights = packed + (k * panels + panel) * p.panel, *own = patches + k * kTiles * p.C;
      float* to = products + k * kTiles * 32;
      int64_t t = 0;
      for (; t + 12 <= count; t += 12) multiply_tiles<12>(p, own + t * p.C, weights, to + 32 * t);
      for (; t < count; ++t) multiply_tiles<1>(p, own + t * p.C, weights, to + 32 * t);
    }
    for (int64_t t = 0; t < count; ++t)
      for (int v = 0; v < 2; ++v) write_outputs(p, b, first + t, 32 * panel + 16 * v, products + 32 * t + 16 * v);
  }
}

void convolve(const Convolution& p, int64_t threads) {
  const int64_t panels = p.O / 32, chunks = (p.tiles + kTiles - 1) / kTiles;
  const Cells<uint16_t> packed = cells<uint16_t>(kPositions * panels * p.panel);
  parallel(panels, threads, [&](int64_t i) { transform_weights(p, i, packed.get()); });
  parallel(p.B * chunks, threads, [&](int64_t i) {
    const Cells<uint16_t> patches = cells<uint16_t>(kPositions * kTiles * p.C);
    const Cells<float> products = cells<float>(kPositions * kTiles * 32);
    const int64_t first = i % chunks * kTiles, count = std::min(kTiles, p.tiles - first);
    convolve_tiles(p, i / chunks, first, count, packed.get(), patches.get(), products.get());
  });
}

}  // namespace
#endif

extern "C" {

#ifdef BF16_TARGET
void msda_convolution(const uint16_t* x, const uint16_t* weight, const uint16_t* bias, const int64_t* sizes,
                      int64_t threads, uint16_t* out) {
  convolve(Convolution{x, weight, bias, sizes, out}, threads);
}
#else
void msda_convolution(const uint16_t*, const uint16_t*, const uint16_t*, const int64_t*, int64_t, uint16_t*) {}
#endif
}
