// Products of matrices in a training step on CPUs with AVX-512 BF16, in float32 and bfloat16: of rows with a weight, of
// gradients with a weight, and of gradients with rows, which is the weight's gradient.
//
// out = scale (a b + bias) + plus, a (M, K), b (K, N), plus and out (M, N), each factor in either layout: where its other
// index runs fastest, or K does. b is laid out in panels, and a where it does not lie well, in words of one float32 or of
// two neighbours of bfloat16, so that the innermost loop is the same for all: a block of a stays in the second cache, a
// panel of b in the first. Of two Zen 4 cores' 230 and 460 GFLOP/s, in float32 and bfloat16, it reaches 190 to 215 and
// 380 to 440 at a step's sizes; MKL 175 to 190 of weights' gradients in float32, oneDNN 340 to 415 in bfloat16.
// Sums over K are float32, of blocks of K and then of these in order, whatever the number of threads.

#include "bf16_cpu.h"

#ifdef BF16_TARGET
namespace {

struct Operand {
  const void* data;
  int64_t step;  // elements between two K if `by_k`, else between two of the other index
  bool by_k;
};

struct Matrices {
  Operand a, b;
  const void* bias;  // (N) in the factors' dtype, may be null
  const void* plus;  // in out's dtype, may be null or out
  void* out;
  float* sums;  // (M), to which scale times a's over K are added, may be null
  int64_t M, N, K;
  float scale;
  bool half_out, rectifies;
};

constexpr int64_t kRows = 12, kColumns = 32;  // of a tile: with two vectors of columns 24 of 32 registers
constexpr int64_t kWords = 256;               // of a block of K, where out holds float32
constexpr int64_t kWordsOfA = 1 << 17;        // that a task has at a time: 512 KB
constexpr int64_t kAhead = 32;                // words that are fetched before they are packed
constexpr int64_t kFewRows = 96;              // of a task, for which a panel of b is laid out
#ifdef MSDA_THREADS_ALWAYS  // for tests
constexpr double kSmallProduct = 1;
#else
constexpr double kSmallProduct = 1e7;  // multiplications of one thread in 0.1 ms
#endif

INLINE int64_t rounded_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }
INLINE uint32_t first_bits(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1; }

struct BlockAndPanel;  // what memory is for

template <typename T>
constexpr int64_t kOfAWord = 4 / sizeof(T);

// Up to 16 words of a row, of which `left` elements exist.
BF16_INLINE __m512i some_words(const float* p, int64_t left) {
  return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(first_bits(left)), p);
}
BF16_INLINE __m512i some_words(const uint16_t* p, int64_t left) {
  return _mm512_maskz_loadu_epi16(first_bits(left), p);
}

// The words of up to 16 columns at one place of K; of bfloat16 those of two places, of which `left` exist.
BF16_INLINE __m512i words_across(const float* p, int64_t, int64_t, __mmask16 present) {
  return _mm512_maskz_loadu_epi32(present, p);
}
BF16_INLINE __m512i words_across(const uint16_t* p, int64_t step, int64_t left, __mmask16 present) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, p));
  if (left < 2) return low;
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, p + step));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

BF16_INLINE __m512 sum_of_a_word(__m512i words, float) { return _mm512_castsi512_ps(words); }
BF16_INLINE __m512 sum_of_a_word(__m512i words, uint16_t) {
  const __m512i upper = _mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
  return _mm512_add_ps(_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)), _mm512_castsi512_ps(upper));
}

// Of up to 16 of a factor's columns (rows, for a) from `first` on the words of K from `k` on, `length` elements, to
// to[word * width + column], zero behind the last column.
template <typename T>
BF16_INLINE void pack(const Operand& f, int64_t first, int64_t count, int64_t k, int64_t length, uint32_t* to,
                      int64_t width, int64_t written, float* sums, float scale) {
  const T* data = static_cast<const T*>(f.data);
  const __mmask16 present = static_cast<__mmask16>(first_bits(count));
  const __mmask16 stored = static_cast<__mmask16>(first_bits(written));
  __m512 total = _mm512_setzero_ps();
  if (f.by_k) {
    const T* row = data + k * f.step + first;
    for (int64_t i = 0; i < length; i += kOfAWord<T>, row += kOfAWord<T> * f.step, to += width) {
      for (int64_t ahead = 0; ahead < kOfAWord<T>; ++ahead)  // the processor does not foresee so long steps
        _mm_prefetch(reinterpret_cast<const char*>(row + (kAhead * kOfAWord<T> + ahead) * f.step), _MM_HINT_T0);
      const __m512i words = words_across(row, f.step, length - i, present);
      if (sums) total = _mm512_add_ps(total, sum_of_a_word(words, T()));
      _mm512_mask_storeu_epi32(to, stored, words);
    }
  } else {
    for (int64_t i = 0; i < length; i += 16 * kOfAWord<T>) {
      __m512i x[16];
#pragma GCC unroll 16
      for (int c = 0; c < 16; ++c)
        x[c] = c < count ? some_words(data + (first + c) * f.step + k + i, length - i) : _mm512_setzero_si512();
      transpose_words(x);
      const int64_t words = std::min<int64_t>(16, (length - i + kOfAWord<T> - 1) / kOfAWord<T>);
      for (int64_t j = 0; j < words; ++j, to += width) {
        if (sums) total = _mm512_add_ps(total, sum_of_a_word(x[j], T()));
        _mm512_mask_storeu_epi32(to, stored, x[j]);
      }
    }
  }
  if (sums)
    _mm512_mask_storeu_ps(sums, present,
                          _mm512_fmadd_ps(total, _mm512_set1_ps(scale), _mm512_maskz_loadu_ps(present, sums)));
}

BF16_INLINE __m512 multiplied(__m512 sums, uint32_t word, __m512i others, float) {
  return _mm512_fmadd_ps(_mm512_set1_ps(as<float>(word)), _mm512_castsi512_ps(others), sums);
}
BF16_INLINE __m512 multiplied(__m512 sums, uint32_t word, __m512i others, uint16_t) {
  return dot(sums, _mm512_set1_epi32(static_cast<int>(word)), others);
}

BF16_INLINE __m512 some_floats(const float* p, __mmask16 present) { return _mm512_maskz_loadu_ps(present, p); }
BF16_INLINE __m512 some_floats(const uint16_t* p, __mmask16 present) {
  return widened(_mm256_maskz_loadu_epi16(present, p));
}
BF16_INLINE void store_some(float* p, __mmask16 present, __m512 x) { _mm512_mask_storeu_ps(p, present, x); }
BF16_INLINE void store_some(uint16_t* p, __mmask16 present, __m512 x) {
  _mm256_mask_storeu_epi16(p, present, narrowed(x));
}

// The words of R rows, one by one: as they lie, or packed.
template <int R>
struct InPlace {
  const word* rows[R];
  BF16_INLINE uint32_t at(const InPlace& a, int64_t k, int r) { return a.rows[r][k]; }
};
template <int R>
struct Packed {
  const uint32_t* words;
  BF16_INLINE uint32_t at(const Packed& a, int64_t k, int r) { return a.words[k * R + r]; }
};

// `rows` of R; `first` and `last` block of K.
template <typename T, typename O, int R, typename A>
BF16_INLINE void tile(const Matrices& p, const A& a, const uint32_t* b, int64_t words, int64_t row, int64_t rows,
                      int64_t column, bool first, bool last) {
  __m512 sums[R][2] = {};
  for (int64_t k = 0; k < words; ++k, b += kColumns) {
    const __m512i left = _mm512_loadu_si512(b), right = _mm512_loadu_si512(b + 16);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const uint32_t word = A::at(a, k, r);
      sums[r][0] = multiplied(sums[r][0], word, left, T());
      sums[r][1] = multiplied(sums[r][1], word, right, T());
    }
  }
  const T* bias = first && p.bias ? static_cast<const T*>(p.bias) + column : nullptr;
  const O* plus = static_cast<const O*>(first ? p.plus : p.out);
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    const __mmask16 present = static_cast<__mmask16>(first_bits(std::min<int64_t>(16, p.N - column - 16 * v)));
    const __m512 offset = bias ? some_floats(bias + 16 * v, present) : _mm512_setzero_ps();
    const int64_t at = row * p.N + column + 16 * v;
    O* out = static_cast<O*>(p.out) + at;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      if (r >= rows) break;
      __m512 y = _mm512_mul_ps(_mm512_add_ps(sums[r][v], offset), _mm512_set1_ps(p.scale));
      if (plus) y = _mm512_add_ps(y, some_floats(plus + at + r * p.N, present));
      if (last && p.rectifies)  // NaN stays
        y = _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_LT_OQ), _mm512_setzero_ps());
      store_some(out + r * p.N, present, y);
    }
  }
}

// Of a block of K, from `k` on; `packed` is null where a is read as it lies.
template <typename T, typename O, int R>
BF16_INLINE void tile_of_block(const Matrices& p, const uint32_t* packed, const uint32_t* panel, int64_t k,
                               int64_t length, int64_t row, int64_t rows, int64_t column) {
  const int64_t words = (length + kOfAWord<T> - 1) / kOfAWord<T>;
  const bool first = k == 0, last = k + length == p.K;
  if (packed) return tile<T, O, R>(p, Packed<R>{packed}, panel, words, row, rows, column, first, last);
  const T* data = static_cast<const T*>(p.a.data) + k;
  InPlace<R> a;
  for (int64_t r = 0; r < R; ++r)
    a.rows[r] = reinterpret_cast<const word*>(data + (row + std::min(r, rows - 1)) * p.a.step);
  tile<T, O, R>(p, a, panel, words, row, rows, column, first, last);
}

// Whether a need not be packed: its words are whole, nothing is summed up on the way, and a tile's rows do not all fall
// into one set of the first cache.
template <typename T>
bool lies_well(const Matrices& p) {
  return !p.a.by_k && !p.sums && p.K % kOfAWord<T> == 0 && p.a.step * static_cast<int64_t>(sizeof(T)) < 4096;
}

// Rows [from, to) and columns [left, right) of out; `left` a multiple of a panel's columns.
template <typename T, typename O>
BF16_TARGET void multiply_block(const Matrices& p, int64_t from, int64_t to, int64_t left, int64_t right,
                                int64_t length, uint32_t* packed, uint32_t* panel) {
  const bool packs = !lies_well<T>(p);
  for (int64_t k = 0; k < p.K; k += length) {
    const int64_t some = std::min(length, p.K - k), words = (some + kOfAWord<T> - 1) / kOfAWord<T>;
    for (int64_t row = from; packs && row < to; row += kRows) {
      const int64_t rows = std::min(kRows, to - row), width = rounded_up(rows, 4);
      float* sums = p.sums && left == 0 ? p.sums + row : nullptr;
      pack<T>(p.a, row, rows, k, some, packed + (row - from) * words, width, width, sums, p.scale);
    }
    for (int64_t column = left; column < right; column += kColumns) {
      for (int64_t v = 0; v < 2; ++v)
        pack<T>(p.b, column + 16 * v, std::min<int64_t>(16, right - column - 16 * v), k, some, panel + 16 * v, kColumns,
                16, nullptr, 1);
      for (int64_t row = from; row < to; row += kRows) {
        const int64_t rows = std::min(kRows, to - row);
        const uint32_t* a = packs ? packed + (row - from) * words : nullptr;
        rows > 8   ? tile_of_block<T, O, 12>(p, a, panel, k, some, row, rows, column)
        : rows > 4 ? tile_of_block<T, O, 8>(p, a, panel, k, some, row, rows, column)
                   : tile_of_block<T, O, 4>(p, a, panel, k, some, row, rows, column);
      }
    }
  }
}

template <typename T, typename O>
void multiply_matrices(const Matrices& p, int64_t threads) {
  if (static_cast<double>(p.M) * p.N * p.K < kSmallProduct) threads = 1;
  // Rounded to bfloat16 once: a block is all of K.
  const int64_t length = p.half_out ? p.K : std::min(p.K, kWords * kOfAWord<T>);
  const int64_t words = (length + kOfAWord<T> - 1) / kOfAWord<T>, panels = (p.N + kColumns - 1) / kColumns;
  const int64_t most = std::max(kRows, kWordsOfA / words / kRows * kRows);
  // A chunk of rows packs b's columns, and a group of columns a's rows, each for itself.
  const int64_t wanted = lies_well<T>(p) || p.N <= p.M ? threads : 1;
  const int64_t even = std::max((p.M + wanted - 1) / wanted, kFewRows), at_most = std::min(most, even);
  int64_t chunks = (p.M + at_most - 1) / at_most;
  if (chunks > 1) chunks = rounded_up(chunks, wanted);
  const int64_t rows = rounded_up((p.M + chunks - 1) / chunks, kRows);
  chunks = (p.M + rows - 1) / rows;
  const int64_t groups = std::min(panels, (threads + chunks - 1) / chunks);
  parallel(chunks * groups, threads, [&](int64_t i) {
    const int64_t from = i / groups * rows, group = i % groups;
    const Kept<BlockAndPanel, uint32_t> memory(words * (rows + kColumns));
    const int64_t left = group * panels / groups * kColumns, right = (group + 1) * panels / groups * kColumns;
    multiply_block<T, O>(p, from, std::min(from + rows, p.M), left, std::min(right, p.N), length, memory.get(),
                         memory.get() + words * rows);
  });
}

}  // namespace
#endif

extern "C" {

#ifdef BF16_TARGET
// factors: a, b and the bias. sizes: M, N, K, none 0, and of a and b each the step and whether K is the slower index.
// flags: whether factors are bfloat16, whether out and plus are (of float32 they are not), whether results are rectified.
void msda_matrix_product(const void* const* factors, const void* plus, const int64_t* sizes, const int64_t* flags,
                         double scale, int64_t threads, float* sums, void* out) {
  const Operand a{factors[0], sizes[3], sizes[4] != 0}, b{factors[1], sizes[5], sizes[6] != 0};
  const bool half = flags[0] != 0, half_out = flags[1] != 0, rectifies = flags[2] != 0;
  const Matrices p{a,        b,        factors[2], plus,     out,
                   sums,     sizes[0], sizes[1],   sizes[2], static_cast<float>(scale),
                   half_out, rectifies};
  !half      ? multiply_matrices<float, float>(p, threads)
  : half_out ? multiply_matrices<uint16_t, uint16_t>(p, threads)
             : multiply_matrices<uint16_t, float>(p, threads);
}
#else
void msda_matrix_product(const void* const*, const void*, const int64_t*, const int64_t*, double, int64_t, float*,
                         void*) {}
#endif
}
