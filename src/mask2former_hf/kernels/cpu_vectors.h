// What the kernels for CPUs share: vectors of channels in float32 and bfloat16, a version for each processor, threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#ifdef __x86_64__
#include <xmmintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__linux__) && !defined(MSDA_NO_CLONES)
// One binary for every x86-64: the loader picks the version for the processor.
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

// OpenMP's entry to a pool of threads, GOMP_parallel, where the process has one: msda_use_pool().
typedef void (*PoolEntry)(void (*)(void*), void*, unsigned, unsigned);
__attribute__((visibility("hidden"))) inline PoolEntry msda_pool = nullptr;

namespace {

typedef float vec __attribute__((vector_size(32), aligned(4)));
// May alias: both read and write memory of uint16_t, and not only as that.
typedef uint16_t half_vec __attribute__((vector_size(16), aligned(2), may_alias));
typedef int32_t int_vec __attribute__((vector_size(32)));
typedef uint32_t bit_vec __attribute__((vector_size(32), aligned(2), may_alias));

template <typename To, typename From>
INLINE To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

INLINE vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
INLINE vec load(const uint16_t* p) {  // bfloat16 is the upper half of a float32
  return as<vec>(__builtin_convertvector(*reinterpret_cast<const half_vec*>(p), bit_vec) << 16);
}
INLINE void store(float* p, vec x) { *reinterpret_cast<vec*>(p) = x; }
INLINE float load_one(const float* p) { return *p; }
INLINE float load_one(const uint16_t* p) { return as<float>(static_cast<uint32_t>(*p) << 16); }

INLINE uint16_t round_to_bfloat16(float x) {
  const uint32_t bits = as<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 64);  // keeps NaN a NaN
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
INLINE bit_vec rounded_to_bfloat16(vec x) {  // in the upper halves
  const bit_vec bits = as<bit_vec>(x);
  const bit_vec nan = as<bit_vec>((bits & 0x7fffffff) > 0x7f800000);
  return ((bits + 0x7fff + ((bits >> 16) & 1)) & ~nan) | ((bits | 0x400000) & nan);
}
INLINE void store(uint16_t* p, vec x) {
  *reinterpret_cast<half_vec*>(p) = __builtin_convertvector(rounded_to_bfloat16(x) >> 16, half_vec);
}
INLINE void store_one(float* p, float x) { *p = x; }
INLINE void store_one(uint16_t* p, float x) { *p = round_to_bfloat16(x); }

// 16 channels in two vectors: of float32 the first and the last eight, of bfloat16 those of even and of odd number,
// which the upper and lower halves of eight words are: no lane has to move. What has the one order must be stored in it.
struct Pair {
  vec a, b;
};
INLINE Pair load_pair(const float* p) { return {load(p), load(p + 8)}; }
INLINE Pair load_pair(const uint16_t* p) {
  const bit_vec words = *reinterpret_cast<const bit_vec*>(p);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  return {as<vec>(words << 16), as<vec>(words & 0xffff0000)};
#else
  return {as<vec>(words & 0xffff0000), as<vec>(words << 16)};
#endif
}
INLINE void store_pair(float* p, const Pair& x) {
  *reinterpret_cast<vec*>(p) = x.a;
  *reinterpret_cast<vec*>(p + 8) = x.b;
}
INLINE void store_pair(uint16_t* p, const Pair& x) {
  const bit_vec a = rounded_to_bfloat16(x.a), b = rounded_to_bfloat16(x.b);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  *reinterpret_cast<bit_vec*>(p) = (a >> 16) | (b & 0xffff0000);
#else
  *reinterpret_cast<bit_vec*>(p) = (b >> 16) | (a & 0xffff0000);
#endif
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, int_vec{__VA_ARGS__})
#endif

// Sums of four vectors in the first four lanes: six shuffles, where four sums one by one take a step for every lane.
INLINE vec four_sums(vec a, vec b, vec c, vec d) {
  const vec x = SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
  const vec y = SHUFFLE(c, d, 0, 8, 1, 9, 4, 12, 5, 13) + SHUFFLE(c, d, 2, 10, 3, 11, 6, 14, 7, 15);
  const vec z = SHUFFLE(x, y, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(x, y, 2, 3, 10, 11, 6, 7, 14, 15);
  return z + SHUFFLE(z, z, 4, 5, 6, 7, 0, 1, 2, 3);
}

INLINE float sum(vec x) { return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7])); }

INLINE float largest_of(vec x) {
  float eight[8];
  for (int k = 0; k < 8; ++k) eight[k] = x[k];
  for (int half = 4; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) eight[k] = eight[k] > eight[k + half] ? eight[k] : eight[k + half];
  return eight[0];
}

// exp(x) of x near n ln 2, and `power` = 2^n: Cephes' polynomial.
template <typename F>
INLINE F scaled_exp(F x, F n, F power) {
  const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F e = r * 1.9875691500e-4f + 1.3981999507e-3f;
  e = e * r + 8.3334519073e-3f;
  e = e * r + 4.1665795894e-2f;
  e = e * r + 1.6666665459e-1f;
  e = e * r + 5.0000001201e-1f;
  return power * (e * r * r + r + 1.0f);
}

// exp for x <= 0 to 2 units in the last place, without a call, so that loops over it become vector code.
INLINE float exp_of_negative(float x) {
  x = x < -87.0f ? -87.0f : x;  // so that NaN stays NaN
  // For the exponent, an integer: there is none for NaN, nor for the infinity that may stand beside it.
  const float finite = x > -87.0f ? (x < 0.0f ? x : 0.0f) : -87.0f;
  const int32_t exponent = static_cast<int32_t>(finite * 1.44269504f - 0.5f);  // nearest, as x <= 0
  return scaled_exp(x, static_cast<float>(exponent), as<float>(static_cast<uint32_t>(exponent + 127) << 23));
}
INLINE vec exp_of_negative(vec x) {
  const vec none = {}, least = none - 87.0f;
  x = x < least ? least : x;
  const vec finite = x > least ? (x < none ? x : none) : least;
  const int_vec exponent = __builtin_convertvector(finite * 1.44269504f - 0.5f, int_vec);
  return scaled_exp(x, __builtin_convertvector(exponent, vec), as<vec>((exponent + 127) << 23));
}

// Numbers below float32's normal ones are zero while this lives: Intel's processors take some hundred cycles where one
// arises, and exp(-100), with which Swin hides neighbours from each other, is one, as is GELU's exp(-x^2 / 2) of 14. By
// AVX-512 BF16 attention with a mask took 3.3 times as long without, windows 1.7 times, a GELU of numbers with a
// deviation of 10 ten times (Emerald Rapids).
class SmallAreZero {
#ifdef __x86_64__
 public:
  SmallAreZero() { _mm_setcsr(before_ | 0x8000); }
  ~SmallAreZero() { _mm_setcsr(before_); }
  SmallAreZero(const SmallAreZero&) = delete;
  SmallAreZero& operator=(const SmallAreZero&) = delete;

 private:
  const unsigned before_ = _mm_getcsr();
#else
 public:
  ~SmallAreZero() {}  // so that it counts as used
#endif
};

struct Progress {
  std::atomic<int64_t> next{0};  // task to take
  int64_t finished = 0;
  std::mutex mutex;
  std::condition_variable all_finished;
};

template <typename Task>
struct Shared {
  const Task* task;
  int64_t count;
  std::atomic<int64_t> next{0};
  static void work(void* data) {
    auto& own = *static_cast<Shared*>(data);
    const SmallAreZero zero;
    for (int64_t i = own.next++; i < own.count; i = own.next++) (*own.task)(i);
  }
};

// Tasks 0 .. count - 1 on up to `threads` threads. In torch's pool where there is one: its idle threads wait by
// spinning, so beside them a thread of our own would share a core (a window attention took 60 instead of 52 ms). It is
// asked for all threads, also for fewer tasks: one that is made smaller ends threads, and torch starts them again.
// Elsewhere, and in a fork, whose pool has no threads, they are started for the call: that costs about 20 us and leaves
// nothing behind that a fork or a second Python thread could trip over, as a pool (OpenMP's included) would. Waiting is
// sleeping, and only for tasks that somebody has begun: on a busy machine a new thread may get a core long after the
// others have done its share (10 ms, measured), so threads are detached, and a late one finds no task and ends.
template <typename Task>
void parallel(int64_t count, int64_t threads, const Task& task) {
  if (std::min(threads, count) < 2) {
    const SmallAreZero zero;
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  if (msda_pool) {
    Shared<Task> shared{&task, count};
    msda_pool(Shared<Task>::work, &shared, static_cast<unsigned>(threads), 0);
    return;
  }
  threads = std::min(threads, count);
  const auto progress = std::make_shared<Progress>();
  const auto work = [progress, count, &task] {  // `task` lives as long as there are tasks
    const SmallAreZero zero;
    int64_t own = 0;
    for (int64_t i = progress->next++; i < count; i = progress->next++, ++own) task(i);
    std::lock_guard<std::mutex> lock(progress->mutex);
    progress->finished += own;
    if (progress->finished == count) progress->all_finished.notify_one();
  };
  try {
    for (int64_t i = 1; i < threads; ++i) std::thread(work).detach();
  } catch (const std::exception&) {  // no memory or no right to another thread: the ones at hand do the work
  }
  work();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->all_finished.wait(lock, [&] { return progress->finished == count; });
}

}  // namespace
