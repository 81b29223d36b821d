// The random points of the mask losses on CPUs (Kirillov et al., "PointRend", CVPR 2020, section 3.2).
//
// torch draws uniform numbers one after the other (Mersenne twister), samples the logits, sorts out the k smallest
// with their indices and gathers: five passes over 38 thousand candidates of each mask. Here numbers come from a counter,
// and a mask's candidates are sampled and sorted out while they are in the caches.
// Layouts (row-major): maps (R, H, W), candidates (R, P, 2) as (x, y) in [0, 1], weights (R, P), out (R, count, 2).

#include <vector>

#include "cpu_vectors.h"

namespace {

constexpr int64_t kBlock = 1 << 16;  // pairs of numbers of a task

// Pairs of 24 bits each of splitmix64 (Steele et al., "Fast splittable pseudorandom number generators", 2014).
CLONES void uniform_block(uint64_t seed, int64_t first, int64_t last, float* out) {
  for (int64_t i = first; i < last; ++i) {
    uint64_t z = seed + static_cast<uint64_t>(i + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    out[2 * i] = static_cast<float>(static_cast<int32_t>(z >> 40)) * 0x1p-24f;
    out[2 * i + 1] = static_cast<float>(static_cast<int32_t>(z >> 16 & 0xffffff)) * 0x1p-24f;
  }
}

struct Candidates {
  const float* maps;
  const float* points;
  const float* weights;  // 0 takes a candidate out; may be null
  const int64_t* sizes;  // the five below
  const int64_t R = sizes[0], H = sizes[1], W = sizes[2], P = sizes[3], count = sizes[4];
};

constexpr int64_t kTogether = 64;

// Of candidates that are looked at together the cells around each, and what they weigh: 0 outside the map.
struct Corners {
  int32_t cell[4][kTogether];
  float weight[4][kTogether];
};

INLINE void corners(const float* points, int64_t count, int64_t H, int64_t W, Corners& at) {
  const float width = static_cast<float>(W), height = static_cast<float>(H);
  const int32_t row = static_cast<int32_t>(W), last = static_cast<int32_t>(H);
  for (int64_t i = 0; i < count; ++i) {
    const float px = points[2 * i] * width - 0.5f, py = points[2 * i + 1] * height - 0.5f;
    const bool near = (px > -1) & (px < width) & (py > -1) & (py < height);  // false for NaN
    const float x = near ? px : 0, y = near ? py : 0, valid = near ? 1.0f : 0.0f;
    const int32_t left = static_cast<int32_t>(x + 1) - 1, top = static_cast<int32_t>(y + 1) - 1;
    const int32_t near_left = left < 0 ? 0 : left, near_right = left + 1 < row ? left + 1 : row - 1;
    const int32_t upper = (top < 0 ? 0 : top) * row, lower = (top + 1 < last ? top + 1 : last - 1) * row;
    const float fx = x - static_cast<float>(left), fy = y - static_cast<float>(top);
    const float on_left = left >= 0 ? valid - valid * fx : 0, on_right = left + 1 < row ? valid * fx : 0;
    const float above = top >= 0 ? 1 - fy : 0, below = top + 1 < last ? fy : 0;
    at.cell[0][i] = upper + near_left, at.cell[1][i] = upper + near_right;
    at.cell[2][i] = lower + near_left, at.cell[3][i] = lower + near_right;
    at.weight[0][i] = above * on_left, at.weight[1][i] = above * on_right;
    at.weight[2][i] = below * on_left, at.weight[3][i] = below * on_right;
  }
}

// |logit| of every candidate, as bits: they have the order of the numbers, and NaN is the largest.
CLONES void certainties(const float* map, const float* points, int64_t P, int64_t H, int64_t W, uint32_t* out) {
  Corners at;
  for (int64_t first = 0; first < P; first += kTogether) {
    const int64_t count = std::min(kTogether, P - first);
    corners(points + 2 * first, count, H, W, at);
    for (int64_t i = 0; i < count; ++i) {
      const float sample = at.weight[0][i] * map[at.cell[0][i]] + at.weight[1][i] * map[at.cell[1][i]] +
                           at.weight[2][i] * map[at.cell[2][i]] + at.weight[3][i] * map[at.cell[3][i]];
      out[first + i] = as<uint32_t>(sample) & 0x7fffffff;
    }
  }
}

// The `count`-th smallest of the numbers, ten or eleven bits at a time, and how many that are equal to it are among them.
uint32_t smallest(const uint32_t* numbers, int64_t size, int64_t count, int64_t* equal) {
  uint32_t found = 0;
  for (int shift = 20, bits = 11; shift >= 0; shift -= 10, bits = 10) {
    uint32_t histograms[4][1 << 11] = {};  // in turn: neighbours often fall into one bucket, and would wait
    const uint32_t mask = (1u << bits) - 1;
    for (int64_t i = 0; i < size; ++i)
      if (shift == 20 || numbers[i] >> (shift + 10) == found) ++histograms[i & 3][numbers[i] >> shift & mask];
    uint32_t bucket = 0;
    const auto held = [&] {
      return histograms[0][bucket] + histograms[1][bucket] + histograms[2][bucket] + histograms[3][bucket];
    };
    for (; bucket < mask && held() < count; ++bucket) count -= held();
    found = found << bits | bucket;
  }
  *equal = count;
  return found;
}

void choose(const Candidates& p, int64_t r, uint32_t* certain, float* out) {
  const float* points = p.points + 2 * r * p.P;
  certainties(p.maps + r * p.H * p.W, points, p.P, p.H, p.W, certain);
  for (int64_t i = 0; p.weights && i < p.P; ++i)
    if (p.weights[r * p.P + i] == 0) certain[i] = 0x7f800000;  // infinity
  int64_t equal = 0;
  const uint32_t last = smallest(certain, p.P, p.count, &equal);
  out += 2 * r * p.count;
  for (int64_t i = 0, at = 0; at < p.count && i < p.P; ++i) {  // no branch: which candidate is chosen cannot be foretold
    std::memcpy(out + 2 * at, points + 2 * i, 2 * sizeof(float));
    at += (certain[i] < last) | ((certain[i] == last) & (equal > 0));
    equal -= certain[i] == last;
  }
}

}  // namespace

extern "C" {

void msda_uniform(int64_t seed, int64_t pairs, int64_t threads, float* out) {
  parallel((pairs + kBlock - 1) / kBlock, threads, [&](int64_t i) {
    uniform_block(static_cast<uint64_t>(seed), i * kBlock, std::min((i + 1) * kBlock, pairs), out);
  });
}

void msda_uncertain_points(const float* maps, const float* points, const float* weights, const int64_t* sizes,
                           int64_t threads, float* out) {
  const Candidates p{maps, points, weights, sizes};
  const int64_t tasks = std::min<int64_t>(p.R, 16);  // each takes memory for a row once
  parallel(tasks, p.R * p.P < kBlock ? 1 : threads, [&](int64_t i) {
    std::vector<uint32_t> certain(p.P);
    for (int64_t r = i; r < p.R; r += tasks) choose(p, r, certain.data(), out);
  });
}
}
