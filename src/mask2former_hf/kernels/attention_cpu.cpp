// Attention in bfloat16 of some queries over many keys on CPUs, masked or not, by AVX-512 BF16 or AMX.
//
// Scores, their softmax and all sums are float32; its weights are rounded to bfloat16 before they are multiplied with
// the values, as in torch's. A head has 32 channels. Where a mask leaves a tile of queries none of 64 keys, nothing of
// it is computed.

#include "attention_cpu.h"

#ifdef BF16_TARGET

namespace {

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

#ifdef AMX_TARGET

// Keys of a block: with 128 it stays in the first cache (with 256 up to a quarter slower). A mask is looked at by 64.
constexpr int64_t kBlock = 128, kChunks = kBlock / 64;

// What 16 queries have seen so far: sums of values and weights, and the largest scores before they are scaled.
struct SeenTile {
  alignas(64) float sums[kSide * kSums], most[kSide];
};

struct BlockScratch {
  alignas(64) uint16_t keys[kBlock * kHeadDim], values[kBlock * kHeadDim];
  alignas(64) float scores[kSide * kBlock];
  alignas(64) uint16_t weights[kSide * kBlock];
  alignas(64) float largest[kTile] = {}, shifts[kSide], factors[kSide];
  uint64_t allowed[kChunks][kSide];
  int64_t chunks[kChunks];  // that any query may see
};

// Which of a block's `count` keys each of 16 queries may see, and the number of chunks that any may.
BF16_INLINE int64_t read_mask(const Attended& p, int64_t b, int64_t first, int64_t block, int64_t count, BlockScratch& s) {
  const int64_t queries = std::min(kSide, p.Q - first);
  int64_t some = 0;
  for (int64_t c = 0; 64 * c < count; ++c) {
    const __mmask64 present = count - 64 * c < 64 ? (1ull << (count - 64 * c)) - 1 : ~0ull;
    uint64_t any = 0;
    for (int64_t r = 0; r < kSide; ++r) {
      uint64_t own = r < queries ? present : 0;
      if (p.allowed && r < queries) {
        const uint8_t* const from = p.allowed + (b * p.Q + first + r) * p.S + block + 64 * c;
        const __m512i bytes = _mm512_maskz_loadu_epi8(present, from);
        own = _mm512_test_epi8_mask(bytes, bytes);
      }
      s.allowed[c][r] = own;
      any |= own;
    }
    if (any) s.chunks[some++] = c;
  }
  return some;
}

// Takes the largest scores up into `seen`, whose sums are scaled to them.
BF16_INLINE void find_largest(int64_t some, __m512 scale, BlockScratch& s, SeenTile& seen) {
  for (int64_t r = 0; r < kSide; ++r) {
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (int64_t i = 0; i < some; ++i) {
      const float* const scores = s.scores + 4 * s.chunks[i] * kTile + 16 * r;
      const uint64_t own = s.allowed[s.chunks[i]][r];
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t)
        most = _mm512_mask_max_ps(most, static_cast<__mmask16>(own >> (16 * t)), most, _mm512_load_ps(scores + t * kTile));
    }
    _mm512_store_ps(s.largest + 16 * r, most);
  }
  const __m512 before = _mm512_load_ps(seen.most), least = _mm512_set1_ps(-INFINITY);
  const __m512 most = _mm512_max_ps(before, largest_of_each(s.largest));
  const __mmask16 any = _mm512_cmp_ps_mask(most, least, _CMP_NEQ_UQ);
  const __m512 shift = _mm512_maskz_mul_ps(any, most, scale);
  _mm512_store_ps(s.shifts, shift);
  const __mmask16 more = _mm512_cmp_ps_mask(most, before, _CMP_NEQ_UQ);
  if (!more) return;
  _mm512_store_ps(seen.most, most);
  _mm512_store_ps(s.factors, power_of_two(0xffff, _mm512_fmsub_ps(before, scale, shift)));
  for (int64_t r = 0; r < kSide; ++r) {
    if (!(more >> r & 1)) continue;
    const __m512 factor = _mm512_set1_ps(s.factors[r]);
    for (int64_t v = 0; v < kSums; v += 16)
      _mm512_store_ps(seen.sums + r * kSums + v, _mm512_mul_ps(_mm512_load_ps(seen.sums + r * kSums + v), factor));
  }
}

// Softmax weights, not divided by their sums. Passing over 64 keys that a query may not see saves a tenth.
BF16_INLINE void weigh_block(int64_t some, __m512 scale, BlockScratch& s) {
  for (int64_t i = 0; i < some; ++i)
    for (int64_t r = 0; r < kSide; ++r) {
      const uint64_t own = s.allowed[s.chunks[i]][r];
      const float* const scores = s.scores + 4 * s.chunks[i] * kTile + 16 * r;
      uint16_t* const weights = s.weights + 2 * s.chunks[i] * kWeights + 32 * r;
      if (!own) {
        _mm512_store_si512(weights, _mm512_setzero_si512());
        _mm512_store_si512(weights + kWeights, _mm512_setzero_si512());
        continue;
      }
      const __m512 shift = _mm512_set1_ps(s.shifts[r]);
      __m512 e[4];
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t)
        e[t] = power_of_two(static_cast<__mmask16>(own >> (16 * t)),
                            _mm512_fmsub_ps(_mm512_load_ps(scores + t * kTile), scale, shift));
      _mm512_store_si512(weights, as<__m512i>(_mm512_cvtne2ps_pbh(e[1], e[0])));
      _mm512_store_si512(weights + kWeights, as<__m512i>(_mm512_cvtne2ps_pbh(e[3], e[2])));
    }
}

AMX_INLINE void see_block_of_tiles(const uint16_t* queries, int64_t some, BlockScratch& s, SeenTile& seen) {
  const __m512 scale = _mm512_set1_ps(0.17677669529f * kLog2E);  // 1 / sqrt 32
  for (int64_t i = 0; i < some; ++i)
    multiply_keys(queries, s.keys + 64 * s.chunks[i] * kHeadDim, 4, s.scores + 4 * s.chunks[i] * kTile);
  find_largest(some, scale, s, seen);
  weigh_block(some, scale, s);
  asm volatile("" ::: "memory");  // see multiply_block
  _tile_loadd(0, seen.sums, 4 * kSums);
  _tile_loadd(1, seen.sums + 16, 4 * kSums);
  _tile_loadd(2, seen.sums + 32, 4 * kSums);
  for (int64_t i = 0; i < some; ++i) {
    add_values(s.weights + 2 * s.chunks[i] * kWeights, s.values + 64 * s.chunks[i] * kHeadDim);
    add_values(s.weights + (2 * s.chunks[i] + 1) * kWeights, s.values + (64 * s.chunks[i] + 32) * kHeadDim);
  }
  store_sums(seen.sums);
}

// Keys and values [from, from + count) of a head, zero behind them up to whole chunks.
BF16_TARGET void pack_block(const Attended& p, int64_t b, int64_t head, int64_t from, int64_t count, BlockScratch& s) {
  const uint16_t *keys[kBlock], *values[kBlock];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = ((b * p.S + from + i) * p.h + head) * kHeadDim;
    keys[i] = p.key + at, values[i] = p.value + at;
  }
  const int64_t whole = (count + 63) / 64 * 64, pairs = (count + 1) / 2;
  for (int64_t i = 0; i < whole; i += kSide)
    pack_columns(keys + i, std::max<int64_t>(0, std::min(kSide, count - i)), kHeadWords, s.keys + i * kHeadDim, kSide);
  pack_pairs(values, count, s.values);
  std::memset(s.values + pairs * 64, 0, sizeof(uint16_t) * 64 * (whole / 2 - pairs));
}

struct QueryTiles;  // what memory is for

AMX_TARGET void attend_of_tiles(const Attended& p, int64_t b, int64_t head) {
  const Tiles tiles;
  load_ones();
  const int64_t count = (p.Q + kSide - 1) / kSide;
  const Kept<Seen, SeenTile> kept(count);
  const Kept<QueryTiles, uint16_t> queries(count * kWeights);
  SeenTile* const seen = kept.get();
  std::memset(queries.get(), 0, sizeof(uint16_t) * count * kWeights);
  for (int64_t q = 0; q < p.Q; ++q)
    std::memcpy(queries.get() + q * kHeadDim, p.query + ((b * p.Q + q) * p.h + head) * kHeadDim, 2 * kHeadDim);
  for (int64_t t = 0; t < count; ++t) {
    std::fill_n(seen[t].sums, kSide * kSums, 0.0f);
    std::fill_n(seen[t].most, kSide, -INFINITY);
  }
  BlockScratch scratch;
  for (int64_t block = 0; block < p.S; block += kBlock) {
    const int64_t keys = std::min(kBlock, p.S - block);
    pack_block(p, b, head, block, keys, scratch);
    for (int64_t t = 0; t < count; ++t)
      if (const int64_t some = read_mask(p, b, t * kSide, block, keys, scratch))
        see_block_of_tiles(queries.get() + t * kWeights, some, scratch, seen[t]);
  }
  for (int64_t q = 0; q < p.Q; ++q)
    write_mean(seen[q / kSide].sums + q % kSide * kSums, p.out + ((b * p.Q + q) * p.h + head) * kHeadDim);
}

#endif

void attend_all(const Attended& p, int64_t threads) {
  parallel(p.B * p.h, threads, [&](int64_t i) {
    const int64_t b = i / p.h, head = i % p.h;
#ifdef AMX_TARGET
    if (has_tiles()) return attend_of_tiles(p, b, head);
#endif
    const Kept<Seen, Seen> seen(p.Q);
    see_keys(p, b, head, 0, p.S, seen.get());
    write_seen(p, b, head, seen.get());
  });
}

}  // namespace
#endif

extern "C" {

#ifdef BF16_TARGET
void msda_attention(const uint16_t* query, const uint16_t* key, const uint16_t* value, const uint8_t* allowed,
                    const int64_t* sizes, int64_t threads, uint16_t* out) {
  attend_all(Attended{query, key, value, allowed, sizes, out}, threads);
}
#else
void msda_attention(const uint16_t*, const uint16_t*, const uint16_t*, const uint8_t*, const int64_t*, int64_t,
                    uint16_t*) {}
#endif
}
