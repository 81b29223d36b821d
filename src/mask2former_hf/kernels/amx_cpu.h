// Products of bfloat16 by AMX, Intel's unit for tiles: TDPBF16PS adds the products of 16 rows and 16 columns over 32
// neighbours to 16 x 16 float32 sums, eight times as fast as the same processor's VDPBF16PS.
//
// The factors lie as for bf16_cpu.h: rows as they are, columns in panels of the words of 32. Linux lends a process the
// tiles' memory when it asks, the compiler must know them, and a thread lays them out before it uses them.

#pragma once

#include "bf16_cpu.h"

namespace {
constexpr int64_t kAmxSide = 32, kAmxDepth = 32;  // of a block of sums, and neighbours of a step
}

#if defined(BF16_TARGET) && defined(__linux__) && !defined(MSDA_NO_AMX) && \
    (__has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>))
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AMX_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")))
#define AMX_INLINE static inline __attribute__((always_inline)) AMX_TARGET

namespace {

inline bool ask_for_tiles() {
  constexpr unsigned kTiles = 1u << 24 | 1u << 22;  // AMX-TILE and AMX-BF16
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  unsigned a, b, c, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) == kTiles &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

// Whether this process may use the tiles; asked once.
inline bool has_tiles() {
  static const bool found = multiplies_bfloat16() && ask_for_tiles();
  return found;
}

// All eight of 16 rows of 64 bytes.
struct alignas(64) TileLayout {
  uint8_t palette = 1, start = 0, none[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileLayout kTileLayout;  // static: GCC does not see that all of it is read

// Tiles of this thread, while it lives.
struct Tiles {
  AMX_TARGET Tiles() { _tile_loadconfig(&kTileLayout); }
  AMX_TARGET ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// (16 * R, 32) sums over `depth` neighbours, a multiple of 32, of rows `step` numbers apart and a panel.
template <int R>
AMX_INLINE void multiply_block(const uint16_t* rows, int64_t step, const uint16_t* panel, int64_t depth, float* sums) {
  asm volatile("" ::: "memory");  // of GCC's intrinsics only those that store know that memory matters
  _tile_zero(0);
  _tile_zero(1);
  if (R == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kAmxDepth) {
    _tile_loadd(6, panel + k * kAmxSide, 4 * kAmxSide);
    _tile_loadd(4, rows + k, 2 * step);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, panel + k * kAmxSide + 32, 4 * kAmxSide);
    _tile_dpbf16ps(1, 4, 7);
    if (R == 2) {
      _tile_loadd(5, rows + 16 * step + k, 2 * step);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 4 * kAmxSide);
  _tile_stored(1, sums + 16, 4 * kAmxSide);
  if (R == 2) {
    _tile_stored(2, sums + 16 * kAmxSide, 4 * kAmxSide);
    _tile_stored(3, sums + 16 * kAmxSide + 16, 4 * kAmxSide);
  }
}

}  // namespace
#else
namespace {
inline bool has_tiles() { return false; }
}  // namespace
#endif
