// Attention in bfloat16 on CPUs by AVX-512 BF16: of tokens within windows (window_attention_cpu.cpp has the problem and
// every other case), and of some queries over many keys, masked or not.
//
// Scores, their softmax and all sums are float32; its weights are rounded to bfloat16 before they are multiplied with
// the values, as in torch's. A head has 32 channels. Where a mask leaves a tile of queries none of 64 keys, nothing of
// it is computed.

#include "bf16_cpu.h"

#ifdef BF16_TARGET
#include <cmath>
#include <vector>

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

// Windows.

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
BF16_TARGET void window_heads(const Windows& p, int64_t window, int64_t first_head, int64_t last_head) {
  constexpr int kRows = V > 4 ? 2 : 6;
  WindowScratch<V> scratch;
  const int64_t *places = p.places + window * p.n, stride = 3 * p.h * kHeadDim;
  const float* seam = window < p.w - p.s ? nullptr : p.seam + (window - (p.w - p.s)) * p.n * p.n;
  const uint16_t *queries[V * 16], *keys[V * 16], *values[V * 16];
  for (int64_t head = first_head; head < last_head; ++head) {
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

template <int V>
void all_windows(const Windows& p, int64_t threads) {
  const int64_t of_a_task = std::max<int64_t>(1, 64 / p.h), tasks = (p.w + of_a_task - 1) / of_a_task;
  parallel(tasks, threads, [&](int64_t i) {
    for (int64_t k = i * of_a_task; k < std::min((i + 1) * of_a_task, p.w); ++k) window_heads<V>(p, k, 0, p.h);
  });
}

// Queries over keys.

struct Attended {
  const uint16_t* query;   // (B, Q, h, 32)
  const uint16_t* key;     // (B, S, h, 32)
  const uint16_t* value;   // (B, S, h, 32)
  const uint8_t* allowed;  // (B, Q, S), 1 or 0; null for all
  const int64_t* sizes;    // the four below
  uint16_t* out;           // (B, Q, h, 32)
  const int64_t B = sizes[0], Q = sizes[1], S = sizes[2], h = sizes[3];
};

constexpr int64_t kKeys = 64;  // of a block
constexpr int kQueries = 6;    // of a tile: with four vectors of scores 24 of 32 registers

// What a query has seen so far: the largest score, the sum of exponentials and of values.
struct Seen {
  __m512 values[2];
  float most, total;
};

template <int R>
BF16_INLINE void see_block(const Attended& p, int64_t b, int64_t head, int64_t first, int64_t block, int64_t count,
                           const uint16_t* keys, const uint16_t* values, Seen* seen) {
  const __mmask16 none = 0;
  __mmask64 allowed[R];
  __mmask64 any = 0;
  const __mmask64 present = count < 64 ? (1ull << count) - 1 : ~0ull;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    allowed[r] = present;
    if (p.allowed) {
      const __m512i bytes = _mm512_maskz_loadu_epi8(present, p.allowed + (b * p.Q + first + r) * p.S + block);
      allowed[r] = _mm512_test_epi8_mask(bytes, bytes);
    }
    any |= allowed[r];
  }
  if (!any) return;
  const uint16_t* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = p.query + ((b * p.Q + first + r) * p.h + head) * kHeadDim;
  __m512 scores[R][4] = {};
  accumulate<R, 4>(rows, keys, kKeys, kHeadWords, scores);
  const __m512 scale = _mm512_set1_ps(0.17677669529f), least = _mm512_set1_ps(-INFINITY);  // 1 / sqrt 32
  alignas(64) uint16_t weights[R][kKeys];
  __m512 sums[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    Seen& own = seen[first + r];
    __m512 most = _mm512_set1_ps(own.most);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __mmask16 some = allowed[r] ? static_cast<__mmask16>(allowed[r] >> (16 * v)) : none;
      scores[r][v] = _mm512_mask_mul_ps(least, some, scores[r][v], scale);
      most = _mm512_max_ps(most, scores[r][v]);
    }
    const float largest = _mm512_reduce_max_ps(most), base = largest == -INFINITY ? 0 : largest;
    const __m512 shift = _mm512_set1_ps(base);
    __m512 total = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m512 e = exponential(_mm512_sub_ps(scores[r][v], shift));
      total = _mm512_add_ps(total, e);
      _mm256_store_si256(reinterpret_cast<__m256i*>(weights[r] + 16 * v), narrowed(e));
    }
    __m512 factor = _mm512_set1_ps(1);
    if (largest != own.most) factor = exponential(_mm512_set1_ps(own.most - base));
    own.total = own.total * _mm512_cvtss_f32(factor) + _mm512_reduce_add_ps(total);
    own.most = largest;
    sums[r][0] = _mm512_mul_ps(own.values[0], factor), sums[r][1] = _mm512_mul_ps(own.values[1], factor);
    rows[r] = weights[r];
  }
  accumulate<R, 2>(rows, values, 32, (count + 1) / 2, sums);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) seen[first + r].values[0] = sums[r][0], seen[first + r].values[1] = sums[r][1];
}

// One head of one image over keys [from, to).
BF16_TARGET void see_keys(const Attended& p, int64_t b, int64_t head, int64_t from, int64_t to, Seen* seen) {
  alignas(64) uint16_t keys[kHeadWords * kKeys * 2], values[kKeys / 2 * 64];
  for (int64_t q = 0; q < p.Q; ++q) seen[q] = {{_mm512_setzero_ps(), _mm512_setzero_ps()}, -INFINITY, 0};
  for (int64_t block = from; block < to; block += kKeys) {
    const int64_t count = std::min(kKeys, to - block);
    const uint16_t *key_rows[kKeys], *value_rows[kKeys];
    for (int64_t i = 0; i < count; ++i) {
      key_rows[i] = p.key + ((b * p.S + block + i) * p.h + head) * kHeadDim;
      value_rows[i] = p.value + ((b * p.S + block + i) * p.h + head) * kHeadDim;
    }
    for (int64_t k = 0; k < kKeys; k += 16)
      pack_columns(key_rows + k, std::max<int64_t>(0, std::min<int64_t>(16, count - k)), kHeadWords, keys + 2 * k, kKeys);
    pack_pairs(value_rows, count, values);
    int64_t q = 0;
    for (; q + kQueries <= p.Q; q += kQueries) see_block<kQueries>(p, b, head, q, block, count, keys, values, seen);
    for (; q < p.Q; ++q) see_block<1>(p, b, head, q, block, count, keys, values, seen);
  }
}

BF16_TARGET void write_seen(const Attended& p, int64_t b, int64_t head, const Seen* seen) {
  for (int64_t q = 0; q < p.Q; ++q) {
    const __m512 scale = _mm512_set1_ps(seen[q].total == 0 ? 0 : 1 / seen[q].total);
    uint16_t* to = p.out + ((b * p.Q + q) * p.h + head) * kHeadDim;
    for (int v = 0; v < 2; ++v)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16 * v), narrowed(_mm512_mul_ps(seen[q].values[v], scale)));
  }
}

void attend_all(const Attended& p, int64_t threads) {
  parallel(p.B * p.h, threads, [&](int64_t i) {
    const int64_t b = i / p.h, head = i % p.h;
    const Kept<Seen, Seen> seen(p.Q);
    see_keys(p, b, head, 0, p.S, seen.get());
    write_seen(p, b, head, seen.get());
  });
}

}  // namespace
#endif

extern "C" {

#ifdef BF16_TARGET
// As msda_window_attention; heads of 32 channels, n up to 144.
void msda_window_attention_bf16(const uint16_t* projected, const uint16_t* fill, const int64_t* places,
                                const float* bias, const float* seam, const int64_t* sizes, double scale,
                                int64_t threads, uint16_t* out) {
  const Windows p{projected, fill, places, bias, seam, sizes, static_cast<float>(scale), out};
  p.n <= 64 ? all_windows<4>(p, threads) : all_windows<9>(p, threads);
}

void msda_attention(const uint16_t* query, const uint16_t* key, const uint16_t* value, const uint8_t* allowed,
                    const int64_t* sizes, int64_t threads, uint16_t* out) {
  attend_all(Attended{query, key, value, allowed, sizes, out}, threads);
}
#else
void msda_window_attention_bf16(const uint16_t*, const uint16_t*, const int64_t*, const float*, const float*,
                                const int64_t*, double, int64_t, uint16_t*) {}
void msda_attention(const uint16_t*, const uint16_t*, const uint16_t*, const uint8_t*, const int64_t*, int64_t,
                    uint16_t*) {}
#endif
}
