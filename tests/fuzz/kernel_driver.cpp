// The C++ kernels without Python, for the address and undefined-behaviour sanitizers: `driver SEED COUNT SECONDS`.
//
// Every buffer has exactly the size the interface promises, in memory of its own: one element too far is reported.
// First the sizes where code branches, then random ones; among the numbers are those that no computation likes.

#include SOURCE
#include NORM_SOURCE
#include WINDOW_SOURCE

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

std::mt19937_64 generator;

int64_t whole(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

std::unique_ptr<float[]> random_floats(int64_t count, float low, float high, int64_t strange_in_100) {
  const float strange[] = {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                           std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::max(),
                           std::numeric_limits<float>::lowest(), std::numeric_limits<float>::denorm_min(),
                           -1e30f, 3e9f, -2147483648.0f, 16777217.0f, -1.0f, 0.0f, -0.0f, 0.5f, 1.0f};
  std::unique_ptr<float[]> numbers(new float[count]);
  std::uniform_real_distribution<float> distribution(low, high);
  for (int64_t i = 0; i < count; ++i)
    numbers[i] = whole(0, 99) < strange_in_100 ? strange[whole(0, 14)] : distribution(generator);
  return numbers;
}

std::unique_ptr<uint16_t[]> rounded(const float* numbers, int64_t count) {
  std::unique_ptr<uint16_t[]> half(new uint16_t[count]);
  for (int64_t i = 0; i < count; ++i) half[i] = round_to_bfloat16(numbers[i]);
  return half;
}

void* either(bool half, const std::unique_ptr<uint16_t[]>& of_half, const std::unique_ptr<float[]>& of_float) {
  return half ? static_cast<void*>(of_half.get()) : static_cast<void*>(of_float.get());
}

void normalise(int64_t B, int64_t N, int64_t width, int64_t groups, bool half, bool adds, int64_t threads) {
  const int64_t C = width * groups, count = B * N * C;
  auto x = random_floats(count, -1, 1, 2), plus = random_floats(count, -1, 1, 2), weight = random_floats(C, -1, 1, 5);
  auto half_x = rounded(x.get(), count), half_plus = rounded(plus.get(), count);
  std::unique_ptr<int64_t[]> sizes(new int64_t[4]{B, N, C, groups});
  void* maps = half ? static_cast<void*>(half_x.get()) : x.get();
  const void* summand = half ? static_cast<const void*>(half_plus.get()) : plus.get();
  msda_group_norm(maps, adds ? summand : nullptr, weight.get(), weight.get(), sizes.get(), 1e-5, adds, half, threads);
}

void attend_windows(int64_t w, int64_t n, int64_t h, int64_t D, int64_t seams, bool half, int64_t threads) {
  const int64_t padding = whole(0, w * n), N = w * n - padding, width = h * D;
  std::unique_ptr<int64_t[]> sizes(new int64_t[6]{N, w, n, h, D, seams}), places(new int64_t[w * n]);
  for (int64_t i = 0; i < w * n; ++i) places[i] = std::min(i, N);
  std::shuffle(places.get(), places.get() + w * n, generator);
  auto projected = random_floats(N * 3 * width, -1, 1, 2), fill = random_floats(3 * width, -1, 1, 2);
  auto incoming = random_floats(N * width, -1, 1, 2), bias = random_floats(h * n * n, -1, 1, 2);
  auto seam = random_floats(seams * n * n, -100, 0, 2);
  auto half_projected = rounded(projected.get(), N * 3 * width), half_fill = rounded(fill.get(), 3 * width);
  auto half_incoming = rounded(incoming.get(), N * width);
  std::unique_ptr<float[]> out(new float[N * width]), gradient(new float[N * 3 * width]);
  std::unique_ptr<float[]> of_fill(new float[3 * width]()), of_bias(new float[h * n * n]());
  std::unique_ptr<uint16_t[]> half_out(new uint16_t[N * width]), half_gradient(new uint16_t[N * 3 * width]);
  void *in = either(half, half_projected, projected), *rest = either(half, half_fill, fill);
  msda_window_attention(in, rest, places.get(), bias.get(), seams ? seam.get() : nullptr, sizes.get(), 0.2, half,
                        threads, either(half, half_out, out));
  msda_window_attention_backward(in, rest, places.get(), bias.get(), seams ? seam.get() : nullptr, sizes.get(), 0.2,
                                 half, threads, either(half, half_incoming, incoming), either(half, half_gradient, gradient),
                                 of_fill.get(), of_bias.get());
}

void run(const std::vector<int64_t>& shapes, int64_t B, int64_t Q, int64_t h, int64_t D, int64_t P, bool fused,
         bool half, bool half_places, bool padded, int64_t threads) {
  const int64_t L = shapes.size() / 2;
  int64_t S = 0;
  for (int64_t l = 0; l < L; ++l) S += shapes[2 * l] * shapes[2 * l + 1];
  const int64_t rows = B * S * h * D, samples = B * Q * h * L * P, outputs = B * Q * h * D;
  auto value = random_floats(rows, -1, 1, 2);
  auto half_value = rounded(value.get(), rows);
  auto positions = random_floats(samples * 2, fused ? -9 : -0.5f, fused ? 9 : 1.5f, 20);
  auto weights = random_floats(samples, -4, 4, 5), reference = random_floats(Q * 2, 0, 1, 5);
  auto half_positions = rounded(positions.get(), samples * 2), half_weights = rounded(weights.get(), samples);
  std::unique_ptr<uint8_t[]> padding(new uint8_t[B * S]);
  for (int64_t i = 0; i < B * S; ++i) padding[i] = whole(0, 1);
  std::unique_ptr<int64_t[]> sizes(new int64_t[7]{B, S, Q, h, D, L, P}), sides(new int64_t[2 * L]);
  std::copy(shapes.begin(), shapes.end(), sides.get());
  const void* in = half ? static_cast<const void*>(half_value.get()) : value.get();
  std::unique_ptr<float[]> out(new float[outputs]), positions_gradient(new float[samples * 2]),
      weights_gradient(new float[samples]), value_gradient(new float[rows]), sums(new float[rows]());
  std::unique_ptr<uint16_t[]> half_out(new uint16_t[outputs]), half_positions_gradient(new uint16_t[samples * 2]),
      half_weights_gradient(new uint16_t[samples]), half_value_gradient(new uint16_t[rows]);
  auto incoming = random_floats(outputs, -1, 1, 2);
  auto half_incoming = rounded(incoming.get(), outputs);
  const void* places = half_places ? static_cast<const void*>(half_positions.get()) : positions.get();
  const void* shares = half_places ? static_cast<const void*>(half_weights.get()) : weights.get();
  const float* points = fused ? reference.get() : nullptr;
  const uint8_t* mask = padded ? padding.get() : nullptr;
  msda_forward(in, places, shares, points, mask, sides.get(), sizes.get(), fused, half, half_places, threads,
               half ? static_cast<void*>(half_out.get()) : out.get());
  msda_backward(in, places, shares, points, mask, sides.get(), sizes.get(), fused, half, half_places, threads,
                either(half, half_incoming, incoming), sums.get(), either(half, half_value_gradient, value_gradient),
                either(half_places, half_positions_gradient, positions_gradient),
                either(half_places, half_weights_gradient, weights_gradient));
}

void run_random() {
  std::vector<int64_t> shapes(2 * whole(1, 5));
  for (auto& side : shapes) side = whole(0, 3) ? whole(1, 6) : whole(1, 40);
  const int64_t common[] = {8, 16, 24, 32, 64}, D = whole(0, 1) ? common[whole(0, 4)] : whole(1, 70);
  const int64_t P = whole(1, kMaxSamples / (shapes.size() / 2));
  run(shapes, whole(0, 3), whole(0, 9) ? whole(0, 12) : 2048 + whole(0, 2), whole(1, 3), D, std::min<int64_t>(P, 12),
      whole(0, 1), whole(0, 1), whole(0, 1), whole(0, 1), whole(1, 5));
  normalise(whole(0, 2), whole(1, 1100), whole(1, 9), whole(1, 9), whole(0, 1), whole(0, 1), whole(1, 3));
  const int64_t w = whole(0, 20);
  attend_windows(w, whole(1, 50), whole(1, 3), 8 * whole(1, 5), whole(0, w), whole(0, 1), whole(1, 3));
}

int main(int, char** arguments) {
  generator.seed(std::atoll(arguments[1]));
  const int64_t count = std::atoll(arguments[2]);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::atof(arguments[3]));
  for (bool fused : {false, true})
    for (bool half : {false, true})
      for (bool padded : {false, true}) {
        for (int64_t D : {1, 3, 8, 16, 24, 32, 40, 64})
          run({3, 5, 1, 7, 6, 1}, 2, 5, 3, D, 3, fused, half, half, padded, 2);
        run({1, 1}, 1, 1, 1, 8, 1, fused, half, half, padded, 2);
        run({2, 3, 4, 4}, 1, 2, 1, 32, 32, fused, half, half, padded, 2);  // 64 samples, the most there may be
        run({9, 11}, 1, 2100, 1, 8, 1, fused, half, half, padded, 2);      // more than one tile of queries
        run({4, 4, 2, 2, 9, 1}, 1, 7, 2, 32, 4, fused, half, !half, padded, 2);  // the sizes of Mask2Former
        run({2, 2}, 0, 3, 2, 8, 1, fused, half, half, padded, 2);
        run({2, 2}, 2, 0, 2, 8, 1, fused, half, half, padded, 2);
      }
  int64_t done = 0;
  while (done != count && std::chrono::steady_clock::now() < end) run_random(), ++done;
  std::printf("%lld\n", static_cast<long long>(done));
}
