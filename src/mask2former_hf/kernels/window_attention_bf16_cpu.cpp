// Attention in bfloat16 of tokens within windows on CPUs, by AVX-512 BF16 or AMX (window_attention_cpu.cpp has the
// problem and every other case).
//
// Scores, their softmax and all sums are float32; its weights are rounded to bfloat16 before they are multiplied with
// the values, as in torch's. A head has 32 channels.

#include "attention_cpu.h"

#ifdef BF16_TARGET

namespace {

struct Windows {
  const uint16_t* projected;  // (N, 3, h, 32)
  const uint16_t* fill;       // (3, h, 32)
  const int64_t* places;      // (w, n)
  const float* bias;          // (h, n, n)
  const float* seam;          // (s, n, n)
  const int64_t* sizes;       // N, w, n, h, 32, s
  float scale;
  uint16_t* out;  // (N, h, 32)
  const int64_t N = sizes[0], w = sizes[1], n = sizes[2], h = sizes[3], s = sizes[5];
};

template <int V>
struct WindowScratch {
  alignas(64) uint16_t keys[kHeadWords * V * 32];
  alignas(64) uint16_t values[V * 8 * 64];
  alignas(64) uint16_t weights[V * 16 * V * 16];
  float inverse[V * 16];
};

// Softmax weights, not yet divided by their sums, of R rows of a window from row i on.
template <int R, int V>
BF16_INLINE void window_rows(const Windows& p, int64_t head, const float* seam, int64_t i,
                             const uint16_t* const* queries, WindowScratch<V>& scratch) {
  __m512 sums[R][V] = {};
  accumulate<R, V>(queries + i, scratch.keys, V * 16, kHeadWords, sums);
  const __m512 scale = _mm512_set1_ps(p.scale), none = _mm512_set1_ps(-INFINITY);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const float* bias = p.bias + (head * p.n + i + r) * p.n;
    __m512 most = none;
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const int64_t left = std::max<int64_t>(0, std::min<int64_t>(16, p.n - 16 * v));
      const __mmask16 present = static_cast<__mmask16>((1u << left) - 1);
      __m512 x = _mm512_mask_fmadd_ps(sums[r][v], present, scale, _mm512_maskz_loadu_ps(present, bias + 16 * v));
      if (seam) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(present, seam + (i + r) * p.n + 16 * v));
      sums[r][v] = _mm512_mask_mov_ps(none, present, x);
      most = _mm512_max_ps(most, sums[r][v]);
    }
    const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    __m512 total = _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const __m512 e = exponential(_mm512_sub_ps(sums[r][v], largest));
      total = _mm512_add_ps(total, e);
      _mm256_store_si256(reinterpret_cast<__m256i*>(scratch.weights + (i + r) * V * 16 + 16 * v), narrowed(e));
    }
    scratch.inverse[i + r] = 1 / _mm512_reduce_add_ps(total);
  }
}

template <int R, int V>
BF16_INLINE void window_results(const Windows& p, int64_t head, const int64_t* places, int64_t i,
                                const WindowScratch<V>& scratch) {
  const uint16_t* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = scratch.weights + (i + r) * V * 16;
  __m512 sums[R][2] = {};
  accumulate<R, 2>(rows, scratch.values, 32, (p.n + 1) / 2, sums);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if (places[i + r] >= p.N) continue;
    const __m512 scale = _mm512_set1_ps(scratch.inverse[i + r]);
    uint16_t* to = p.out + (places[i + r] * p.h + head) * kHeadDim;
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16 * v), narrowed(_mm512_mul_ps(sums[r][v], scale)));
  }
}

template <int V>
BF16_TARGET void window_heads(const Windows& p, int64_t window) {
  constexpr int kRows = V > 4 ? 2 : 6;
  WindowScratch<V> scratch;
  const int64_t *places = p.places + window * p.n, stride = 3 * p.h * kHeadDim;
  const float* seam = window < p.w - p.s ? nullptr : p.seam + (window - (p.w - p.s)) * p.n * p.n;
  const uint16_t *queries[V * 16], *keys[V * 16], *values[V * 16];
  for (int64_t head = 0; head < p.h; ++head) {
    for (int64_t i = 0; i < p.n; ++i) {
      queries[i] = (places[i] < p.N ? p.projected + places[i] * stride : p.fill) + head * kHeadDim;
      keys[i] = queries[i] + p.h * kHeadDim;
      values[i] = keys[i] + p.h * kHeadDim;
    }
    for (int64_t k = 0; k < V; ++k)
      pack_columns(keys + 16 * k, std::max<int64_t>(0, std::min<int64_t>(16, p.n - 16 * k)), kHeadWords,
                   scratch.keys + 32 * k, V * 16);
    pack_pairs(values, p.n, scratch.values);
    int64_t i = 0;
    for (; i + kRows <= p.n; i += kRows) window_rows<kRows, V>(p, head, seam, i, queries, scratch);
    for (; i < p.n; ++i) window_rows<1, V>(p, head, seam, i, queries, scratch);
    for (i = 0; i + 12 <= p.n; i += 12) window_results<12, V>(p, head, places, i, scratch);
    for (; i < p.n; ++i) window_results<1, V>(p, head, places, i, scratch);
  }
}

#ifdef AMX_TARGET

constexpr int64_t kMostTiles = 9;  // of 16 tokens

// A head of a window; zero where there is no token.
struct TileScratch {
  alignas(64) uint16_t queries[kMostTiles * kWeights] = {};
  alignas(64) uint16_t keys[kMostTiles * kWeights];
  alignas(64) uint16_t values[(kMostTiles + 1) / 2 * 2 * kWeights] = {};
  alignas(64) float scores[kMostTiles * kTile];
  alignas(64) uint16_t weights[(kMostTiles + 1) / 2 * kWeights] = {};
  alignas(64) float largest[kTile] = {}, shifts[kSide], sums[kSide * kSums];
};

BF16_INLINE void pack_head(const Windows& p, const int64_t* places, int64_t head, TileScratch& scratch) {
  const uint16_t *keys[kMostTiles * kSide], *values[kMostTiles * kSide];
  const int64_t width = p.h * kHeadDim;
  for (int64_t i = 0; i < p.n; ++i) {
    const uint16_t* const query = (places[i] < p.N ? p.projected + places[i] * 3 * width : p.fill) + head * kHeadDim;
    _mm512_store_si512(scratch.queries + i * kHeadDim, _mm512_loadu_si512(query));
    keys[i] = query + width;
    values[i] = query + 2 * width;
  }
  for (int64_t i = 0; i < p.n; i += kSide)
    pack_columns(keys + i, std::min(kSide, p.n - i), kHeadWords, scratch.keys + i * kHeadDim, kSide);
  pack_pairs(values, p.n, scratch.values);
}

// Softmax weights, not divided by their sums, of `count` queries over a window's tiles of keys; `bias` and `seam` are
// theirs. Loops over as many tiles as the compiler knows, TILES, are 5 % faster than over `some`.
template <int TILES>
AMX_INLINE void weigh_tile(const Windows& p, const float* bias, const float* seam, int64_t count, int64_t some,
                           TileScratch& scratch) {
  const int64_t tiles = TILES ? TILES : some, left = p.n - 16 * (tiles - 1);
  const __m512 scale = _mm512_set1_ps(p.scale), none = _mm512_set1_ps(-INFINITY), base = _mm512_set1_ps(kLog2E);
  const __mmask16 all = 0xffff, last = static_cast<__mmask16>((1u << left) - 1);
  for (int64_t r = 0; r < count; ++r) {
    __m512 most = none;
#pragma GCC unroll 9
    for (int64_t t = 0; t < tiles; ++t) {
      const __mmask16 present = t + 1 < tiles ? all : last;
      float* const score = scratch.scores + t * kTile + 16 * r;
      __m512 x = _mm512_mask_loadu_ps(none, present, bias + r * p.n + 16 * t);
      x = _mm512_fmadd_ps(_mm512_load_ps(score), scale, x);
      if (seam) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(present, seam + r * p.n + 16 * t));
      _mm512_store_ps(score, x);
      most = _mm512_max_ps(most, x);
    }
    _mm512_store_ps(scratch.largest + 16 * r, most);
  }
  _mm512_store_ps(scratch.shifts, _mm512_mul_ps(largest_of_each(scratch.largest), base));
  for (int64_t r = 0; r < count; ++r) {
    const __m512 shift = _mm512_set1_ps(scratch.shifts[r]);
#pragma GCC unroll 5
    for (int64_t t = 0; t < tiles; t += 2) {
      const float* const score = scratch.scores + t * kTile + 16 * r;
      const __m512 a = power_of_two(all, _mm512_fmsub_ps(_mm512_load_ps(score), base, shift));
      const __m512 b = t + 1 == tiles ? _mm512_setzero_ps()
                                      : power_of_two(all, _mm512_fmsub_ps(_mm512_load_ps(score + kTile), base, shift));
      _mm512_store_si512(scratch.weights + t / 2 * kWeights + 32 * r, as<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
    }
  }
}

// Tokens of the next head, far apart in memory: 5 to 20 % of the time of a call.
AMX_INLINE void ask_for_head(const Windows& p, const int64_t* places, int64_t head, int64_t count) {
  if (places + count > p.places + p.w * p.n) return;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t part = 0; part < 3; ++part)
      _mm_prefetch(p.projected + ((std::min(places[i], p.N - 1) * 3 + part) * p.h + head) * kHeadDim, _MM_HINT_T0);
}

template <int TILES>
AMX_TARGET void window_of_tiles(const Windows& p, int64_t window, int64_t some, TileScratch& scratch) {
  const int64_t *places = p.places + window * p.n, tiles = TILES ? TILES : some;
  const float* seam = window < p.w - p.s ? nullptr : p.seam + (window - (p.w - p.s)) * p.n * p.n;
  for (int64_t head = 0; head < p.h; ++head) {
    pack_head(p, places, head, scratch);
    for (int64_t first = 0; first < p.n; first += kSide) {
      const int64_t count = std::min(kSide, p.n - first);
      multiply_keys(scratch.queries + first * kHeadDim, scratch.keys, tiles, scratch.scores);
      weigh_tile<TILES>(p, p.bias + (head * p.n + first) * p.n, seam ? seam + first * p.n : nullptr, count, some, scratch);
      ask_for_head(p, places + first + (head + 1 < p.h ? 0 : p.n), (head + 1) % p.h, count);
      asm volatile("" ::: "memory");  // see multiply_block
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      for (int64_t t = 0; t < tiles; t += 2) add_values(scratch.weights + t / 2 * kWeights, scratch.values + t * kWeights);
      store_sums(scratch.sums);
      for (int64_t r = 0; r < count; ++r)
        if (places[first + r] < p.N)
          write_mean(scratch.sums + r * kSums, p.out + (places[first + r] * p.h + head) * kHeadDim);
    }
  }
}

template <int TILES>
AMX_TARGET void windows_of_tiles(const Windows& p, int64_t first, int64_t last, int64_t some) {
  const Tiles tiles;
  load_ones();
  TileScratch scratch;
  for (int64_t k = first; k < last; ++k) window_of_tiles<TILES>(p, k, some, scratch);
}

#endif

void some_windows(const Windows& p, int64_t first, int64_t last) {
#ifdef AMX_TARGET
  const int64_t tiles = (p.n + kSide - 1) / kSide;
  if (has_tiles())
    return tiles == 4   ? windows_of_tiles<4>(p, first, last, 4)
           : tiles == 9 ? windows_of_tiles<9>(p, first, last, 9)
                        : windows_of_tiles<0>(p, first, last, tiles);
#endif
  for (int64_t k = first; k < last; ++k) p.n <= 64 ? window_heads<4>(p, k) : window_heads<9>(p, k);
}

void all_windows(const Windows& p, int64_t threads) {
  const int64_t of_a_task = std::max<int64_t>(1, 64 / p.h), tasks = (p.w + of_a_task - 1) / of_a_task;
  parallel(tasks, threads, [&](int64_t i) { some_windows(p, i * of_a_task, std::min((i + 1) * of_a_task, p.w)); });
}

}  // namespace
#endif

extern "C" {

#ifdef BF16_TARGET
// As msda_window_attention; heads of 32 channels, n up to 144.
void msda_window_attention_bf16(const uint16_t* projected, const uint16_t* fill, const int64_t* places,
                                const float* bias, const float* seam, const int64_t* sizes, double scale,
                                int64_t threads, uint16_t* out) {
  all_windows(Windows{projected, fill, places, bias, seam, sizes, static_cast<float>(scale), out}, threads);
}
#else
void msda_window_attention_bf16(const uint16_t*, const uint16_t*, const int64_t*, const float*, const float*,
                                const int64_t*, double, int64_t, uint16_t*) {}
#endif
}
