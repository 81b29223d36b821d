// Products of bfloat16 rows with a linear layer's weight, with all that follows them inside: a scale,
// bias, a summand, a ReLU or GELU. Layouts (row-major): x (M, K), weight (N, K), scale and bias (N), plus and out (M, N); K even.
//
// oneDNN reaches 350 of the 460 GFLOP/s of two Zen 4 cores at the model's sizes. The weight is laid out in panels in
// every call, which takes a hundredth of the time, so that no weight can be stale. AMX multiplies where there is one and
// K is a multiple of 32.

#include "amx_cpu.h"

#ifdef BF16_TARGET
#include <cmath>

namespace {

enum Then { kNothing, kRelu, kGelu };

struct Product {
  const uint16_t* x;
  const uint16_t* weight;
  const float* scale;    // (N) of the columns before anything is added, may be null
  const uint16_t* bias;  // may be null
  const uint16_t* plus;  // may be null
  const int64_t* sizes;  // the three below
  int64_t then;
  uint16_t* out;
  const int64_t M = sizes[0], N = sizes[1], K = sizes[2];
  const int64_t panels = (N + 31) / 32;
};

struct PackedWeight;  // what memory is for
struct SecondWeight;
struct Between;
struct LastRows;

constexpr int kTileRows = 12;                // with two vectors of columns 24 of 32 registers
constexpr int64_t kChunk = 1 << 17;          // numbers of x that a task reads: 256 KB, in the second cache
constexpr int64_t kMostRows = 480;           // whole tiles, of 12 rows and of 32
#ifdef MSDA_THREADS_ALWAYS  // for tests
constexpr double kSmallProduct = 1;
#else
constexpr double kSmallProduct = 1e7;  // multiplications of one thread in 0.1 ms
#endif

// x / 2 (1 + erf(x / sqrt 2)): Abramowitz and Stegun, 7.1.26, 1.5e-7 of erf, and 1e-4 of 1 - erf |x|.
BF16_INLINE __m512 gelu(__m512 x) {
  const __m512 none = _mm512_setzero_ps(), size = _mm512_min_ps(_mm512_abs_ps(x), _mm512_set1_ps(100));
  const __m512 t = _mm512_rcp14_ps(_mm512_fmadd_ps(size, _mm512_set1_ps(0.3275911f * 0.70710678f), _mm512_set1_ps(1)));
  __m512 p = _mm512_fmadd_ps(t, _mm512_set1_ps(1.061405429f), _mm512_set1_ps(-1.453152027f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
  const __m512 e = power_of_two(0xffff, _mm512_mul_ps(_mm512_mul_ps(size, size), _mm512_set1_ps(-0.5f * kLog2E)));
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, t), e);
  const __m512 small = _mm512_mul_ps(_mm512_mul_ps(size, _mm512_set1_ps(0.5f)), tail);  // |x| / 2 erfc(|x| / sqrt 2)
  const __m512 rectified = _mm512_mask_mov_ps(none, _mm512_cmp_ps_mask(x, none, _CMP_NLE_UQ), x);  // NaN stays
  return _mm512_sub_ps(rectified, small);
}

template <int THEN>
BF16_INLINE __m512 after(__m512 x) {
  if (THEN == kRelu) return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), _mm512_setzero_ps());
  return THEN == kGelu ? gelu(x) : x;
}

// 16 columns of the result, of which `present` exist, and what follows their sums.
struct Columns {
  int64_t first;
  __mmask16 present;
  __m512 scale, bias;
};

BF16_INLINE Columns columns_from(const Product& p, int64_t first) {
  const int64_t count = std::max<int64_t>(0, std::min<int64_t>(16, p.N - first));
  const __mmask16 present = static_cast<__mmask16>((1u << count) - 1);
  return {first, present, p.scale ? _mm512_maskz_loadu_ps(present, p.scale + first) : _mm512_set1_ps(1),
          p.bias ? widened(_mm256_maskz_loadu_epi16(present, p.bias + first)) : _mm512_setzero_ps()};
}

template <int THEN>
BF16_INLINE void write_sums(const Product& p, int64_t row, const Columns& columns, __m512 sums) {
  const int64_t at = row * p.N + columns.first;
  __m512 y = _mm512_fmadd_ps(sums, columns.scale, columns.bias);
  if (p.plus) y = _mm512_add_ps(y, widened(_mm256_maskz_loadu_epi16(columns.present, p.plus + at)));
  _mm256_mask_storeu_epi16(p.out + at, columns.present, narrowed(after<THEN>(y)));
}

template <int R, int THEN>
BF16_INLINE void product_tile(const Product& p, int64_t row, int64_t panel, const uint16_t* packed) {
  const uint16_t* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = p.x + (row + r) * p.K;
  __m512 sums[R][2] = {};
  accumulate<R, 2>(rows, packed + panel * p.K * 32, 32, p.K / 2, sums);
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    const Columns columns = columns_from(p, 32 * panel + 16 * v);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) write_sums<THEN>(p, row + r, columns, sums[r][v]);
  }
}

template <int THEN>
BF16_TARGET void product_task(const Product& p, int64_t first, int64_t last, int64_t first_panel, int64_t last_panel,
                              const uint16_t* packed) {
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    int64_t row = first;
    for (; row + kTileRows <= last; row += kTileRows) product_tile<kTileRows, THEN>(p, row, panel, packed);
    for (; row + 4 <= last; row += 4) product_tile<4, THEN>(p, row, panel, packed);
    for (; row < last; ++row) product_tile<1, THEN>(p, row, panel, packed);
  }
}

#ifdef AMX_TARGET
template <int THEN>
AMX_TARGET void product_task_of_tiles(const Product& p, int64_t first, int64_t last, int64_t first_panel,
                                      int64_t last_panel, const uint16_t* packed) {
  const Tiles tiles;
  alignas(64) float sums[kAmxSide * kAmxSide];
  const int64_t whole = (last - first) / kAmxSide * kAmxSide, left = last - first - whole;
  const Kept<LastRows, uint16_t> rest(kAmxSide * p.K);  // whose results behind the last are not read
  std::memcpy(rest.get(), p.x + (first + whole) * p.K, sizeof(uint16_t) * left * p.K);
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const Columns columns[2] = {columns_from(p, 32 * panel), columns_from(p, 32 * panel + 16)};
    for (int64_t row = first; row < last; row += kAmxSide) {
      const int64_t rows = std::min(kAmxSide, last - row);
      const uint16_t* x = rows < kAmxSide ? rest.get() : p.x + row * p.K;
      rows > 16 ? multiply_block<2>(x, p.K, packed + panel * p.K * 32, p.K, sums)
                : multiply_block<1>(x, p.K, packed + panel * p.K * 32, p.K, sums);
      for (int64_t r = 0; r < rows; ++r)
        for (int v = 0; v < 2; ++v) write_sums<THEN>(p, row + r, columns[v], _mm512_load_ps(sums + r * kAmxSide + 16 * v));
    }
  }
}
#endif

BF16_TARGET void pack_task(const Product& p, int64_t panel, uint16_t* packed) {
  const uint16_t* rows[16];
  for (int half = 0; half < 2; ++half) {
    const int64_t first = 32 * panel + 16 * half;
    for (int i = 0; i < 16; ++i) rows[i] = p.weight + std::min(first + i, p.N - 1) * p.K;
    pack_columns(rows, 16, p.K / 2, packed + panel * p.K * 32 + 32 * half, 32);
  }
}

// (panels, K, 32) of the weight, in `packed`.
void pack_weight(const Product& p, int64_t threads, uint16_t* packed) {
  const int64_t packs = std::min(p.panels, 4 * threads);
  parallel(packs, threads, [&](int64_t i) {
    for (int64_t k = i * p.panels / packs; k < (i + 1) * p.panels / packs; ++k) pack_task(p, k, packed);
  });
}

template <int THEN>
void multiply_rows_then(const Product& p, int64_t first, int64_t last, int64_t a, int64_t b, const uint16_t* packed) {
#ifdef AMX_TARGET
  if (p.K % kAmxDepth == 0 && has_tiles()) return product_task_of_tiles<THEN>(p, first, last, a, b, packed);
#endif
  product_task<THEN>(p, first, last, a, b, packed);
}

void multiply_rows(const Product& p, int64_t first, int64_t last, int64_t a, int64_t b, const uint16_t* packed) {
  p.then == kGelu   ? multiply_rows_then<kGelu>(p, first, last, a, b, packed)
  : p.then == kRelu ? multiply_rows_then<kRelu>(p, first, last, a, b, packed)
                    : multiply_rows_then<kNothing>(p, first, last, a, b, packed);
}

// As many rows as fit, whole tiles, and as many as other threads have.
int64_t rows_of_a_task(int64_t rows, int64_t fit, int64_t threads) {
  const int64_t unit = has_tiles() ? kAmxSide : kTileRows;
  const int64_t most = std::max<int64_t>(1, std::min(kMostRows, fit) / unit) * unit;
  return std::min(most, ((rows + threads - 1) / threads + unit - 1) / unit * unit);
}

void multiply_all(const Product& p, int64_t threads) {
  if (static_cast<double>(p.M) * p.N * p.K < kSmallProduct) threads = 1;
  const Kept<PackedWeight, uint16_t> packed(p.panels * p.K * 32);
  pack_weight(p, threads, packed.get());
  const int64_t rows = rows_of_a_task(p.M, kChunk / p.K, threads), chunks = (p.M + rows - 1) / rows;
  const int64_t groups = std::min(p.panels, std::max<int64_t>(1, 8 * threads / chunks));
  parallel(chunks * groups, threads, [&](int64_t i) {
    const int64_t chunk = i / groups, group = i % groups;
    const int64_t first = chunk * rows, last = std::min(first + rows, p.M);
    multiply_rows(p, first, last, group * p.panels / groups, (group + 1) * p.panels / groups, packed.get());
  });
}

// `second` of what `first` makes, which exists for the rows of a task only: 512 KB, in the second cache.
void feed_forward(const Product& first, const Product& second, int64_t threads) {
  if (2.0 * first.M * first.N * first.K < kSmallProduct) threads = 1;
  const Kept<PackedWeight, uint16_t> one(first.panels * first.K * 32);
  const Kept<SecondWeight, uint16_t> two(second.panels * second.K * 32);
  pack_weight(first, threads, one.get());
  pack_weight(second, threads, two.get());
  const int64_t rows = rows_of_a_task(first.M, 2 * kChunk / first.N, threads), chunks = (first.M + rows - 1) / rows;
  parallel(chunks, threads, [&](int64_t i) {
    const int64_t from = i * rows, some = std::min(rows, first.M - from);
    const Kept<Between, uint16_t> between(rows * first.N);
    const int64_t sizes[2][3] = {{some, first.N, first.K}, {some, second.N, second.K}};
    const uint16_t* x = first.x + from * first.K;
    const Product a{x, first.weight, nullptr, first.bias, nullptr, sizes[0], first.then, between.get()};
    const uint16_t* plus = second.plus ? second.plus + from * second.N : nullptr;
    uint16_t* const out = second.out + from * second.N;
    const Product b{between.get(), second.weight, nullptr, second.bias, plus, sizes[1], kNothing, out};
    multiply_rows(a, 0, some, 0, a.panels, one.get());
    multiply_rows(b, 0, some, 0, b.panels, two.get());
  });
}

}  // namespace
#endif

extern "C" {

#ifdef BF16_TARGET
// 0 not at all, 1 by AVX-512 BF16, 2 by AMX too.
int64_t msda_multiplies_bfloat16() { return multiplies_bfloat16() + has_tiles(); }

void msda_use_tiles(int64_t wanted) {
#ifdef AMX_TARGET
  msda_tiles = wanted != 0;
#else
  (void)wanted;
#endif
}

// `then`: 0 nothing, 1 a ReLU, 2 the exact GELU.
void msda_product(const uint16_t* x, const uint16_t* weight, const float* scale, const uint16_t* bias,
                  const uint16_t* plus, const int64_t* sizes, int64_t then, int64_t threads, uint16_t* out) {
  multiply_all(Product{x, weight, scale, bias, plus, sizes, then, out}, threads);
}

// Two products, `then` between them; `weights` are the first's, its bias, the second's, its bias; sizes M, W, C.
void msda_feed_forward(const uint16_t* x, const uint16_t* const* weights, const uint16_t* plus, const int64_t* sizes,
                       int64_t then, int64_t threads, uint16_t* out) {
  const int64_t first[3] = {sizes[0], sizes[1], sizes[2]}, second[3] = {sizes[0], sizes[2], sizes[1]};
  feed_forward(Product{x, weights[0], nullptr, weights[1], nullptr, first, then, nullptr},
               Product{nullptr, weights[2], nullptr, weights[3], plus, second, kNothing, out}, threads);
}
#else
int64_t msda_multiplies_bfloat16() { return 0; }
void msda_use_tiles(int64_t) {}
void msda_product(const uint16_t*, const uint16_t*, const float*, const uint16_t*, const uint16_t*, const int64_t*,
                  int64_t, int64_t, uint16_t*) {}
void msda_feed_forward(const uint16_t*, const uint16_t* const*, const uint16_t*, const int64_t*, int64_t, int64_t,
                       uint16_t*) {}
#endif
}
