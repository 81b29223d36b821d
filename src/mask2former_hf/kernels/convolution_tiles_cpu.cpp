// 3 x 3 convolutions in bfloat16 by AMX: as many multiplications as there are, which that does faster than others make
// Winograd's sums of patches.
//
// Some lines of the input lie in a thread's second cache between columns and lines of zeros. Then the inputs of one of
// the nine weights are the same rows for 32 neighbouring outputs, further on by what the weight is off the middle, and
// those in the two columns between lines are computed and left. Results are rounded once.

#include "convolution_cpu.h"

#ifdef AMX_TARGET
namespace {

struct Weights;  // what memory is for
struct Lines;

typedef Convolution<uint16_t> Problem;

constexpr int64_t kTaps = 9;
constexpr int64_t kCache = 1 << 20;  // bytes of a task's lines: half of the second one

// Of output channels [32 * panel, 32 * panel + 32): (9, C / 2, 32) words of two input channels.
BF16_TARGET void pack_weights(const Problem& p, int64_t panel, uint16_t* packed) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int64_t c = 0; c < p.C; c += 2)
    for (int half = 0; half < 2; ++half) {
      const uint16_t* from = p.weight + ((kColumns * panel + 16 * half) * p.C + c) * kTaps;
      __m512 first[kTaps], second[kTaps];
      load_weights(from, p.C * kTaps, first);
      load_weights(from + kTaps, p.C * kTaps, second);
      for (int tap = 0; tap < kTaps; ++tap) {
        const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first[tap]), 16);
        const __m512i words = _mm512_or_si512(low, _mm512_and_si512(_mm512_castps_si512(second[tap]), upper));
        _mm512_store_si512(packed + (panel * kTaps + tap) * p.panel + kColumns * c + 32 * half, words);
      }
    }
}

// Lines [first - 1, last + 1) of an image, each between two columns of zeros.
void copy_lines(const Problem& p, int64_t b, int64_t first, int64_t last, uint16_t* to) {
  const int64_t column = p.C, line = p.W * p.C;
  for (int64_t y = first - 1; y <= last; ++y, to += line + 2 * column) {
    if (y < 0 || y >= p.H) {
      std::memset(to, 0, sizeof(uint16_t) * (line + 2 * column));
      continue;
    }
    std::memset(to, 0, sizeof(uint16_t) * column);
    std::memcpy(to + column, p.x + (b * p.H + y) * line, sizeof(uint16_t) * line);
    std::memset(to + column + line, 0, sizeof(uint16_t) * column);
  }
}

// 16 * R sums of 32 channels, of outputs from one on whose own patch starts at `from`.
template <int R>
AMX_INLINE void sum_taps(const Problem& p, const uint16_t* from, const uint16_t* weights, float* sums) {
  start_block<R>();
  for (int64_t tap = 0; tap < kTaps; ++tap) {
    const int64_t further = (tap / 3 * (p.W + 2) + tap % 3) * p.C;
    add_to_block<R>(from + further, p.C, weights + tap * p.panel, p.C);
  }
  store_block<R>(sums);
}

// Lines [first, last) and panels [from, to) of an image's outputs.
AMX_TARGET void convolve_lines(const Problem& p, int64_t b, int64_t first, int64_t last, int64_t from, int64_t to,
                               const uint16_t* packed, const uint16_t* lines) {
  const Tiles tiles;
  alignas(64) float sums[kAmxSide * kColumns];
  const int64_t wide = p.W + 2, count = (last - first) * wide - 2;
  for (int64_t panel = from; panel < to; ++panel) {
    const Columns columns[2] = {columns_from(p, kColumns * panel), columns_from(p, kColumns * panel + 16)};
    const uint16_t* weights = packed + panel * kTaps * p.panel;
    for (int64_t at = 0; at < count; at += kAmxSide) {
      const int64_t some = std::min(kAmxSide, count - at);
      some > 16 ? sum_taps<2>(p, lines + at * p.C, weights, sums) : sum_taps<1>(p, lines + at * p.C, weights, sums);
      for (int64_t i = 0; i < some; ++i) {
        const int64_t y = (at + i) / wide, x = (at + i) % wide;
        if (x >= p.W) continue;
        for (int v = 0; v < 2; ++v)
          write_sums(p, (b * p.H + first + y) * p.W + x, columns[v], _mm512_load_ps(sums + i * kColumns + 16 * v));
      }
    }
  }
}

}  // namespace

void convolve_by_tiles(const Problem& p, int64_t threads) {
  const Kept<Weights, uint16_t> packed(p.panels * kTaps * p.panel);
  parallel(p.panels, threads, [&](int64_t i) { pack_weights(p, i, packed.get()); });
  const int64_t line = (p.W + 2) * p.C, fit = std::max<int64_t>(1, kCache / (2 * line) - 2);
  const int64_t wanted = std::max((p.H + fit - 1) / fit, std::min(p.H, (threads + p.B - 1) / p.B));
  const int64_t rows = (p.H + wanted - 1) / wanted, chunks = (p.H + rows - 1) / rows;
  const int64_t groups = std::min(p.panels, std::max<int64_t>(1, 4 * threads / (p.B * chunks)));
  parallel(p.B * chunks * groups, threads, [&](int64_t i) {
    const int64_t group = i % groups, b = i / groups / chunks, first = i / groups % chunks * rows;
    const int64_t last = std::min(first + rows, p.H);
    const Kept<Lines, uint16_t> lines((rows + 2) * line + kAmxSide * p.C);  // what is read behind them is not used
    copy_lines(p, b, first, last, lines.get());
    convolve_lines(p, b, first, last, group * p.panels / groups, (group + 1) * p.panels / groups, packed.get(),
                   lines.get());
  });
}
#elif defined(BF16_TARGET)
void convolve_by_tiles(const Convolution<uint16_t>&, int64_t) {}
#endif
