"""The C++ kernel under the address and undefined-behaviour sanitizers, in a program without Python."""

import shutil
import subprocess
from pathlib import Path

import pytest

import mask2former_hf

COMPILER = shutil.which("g++")
SOURCE = Path(mask2former_hf.__file__).parent / "kernels" / "msda_cpu.cpp"
# Every buffer has exactly the size the interface promises, in memory of its own: one element too far is reported.
DRIVER = r"""
#include "SOURCE"
#include <cstdio>
#include <limits>
#include <memory>
#include <random>

std::mt19937 generator(0);

std::unique_ptr<float[]> random_floats(int64_t count, float low, float high) {
  std::unique_ptr<float[]> numbers(new float[count]);
  std::uniform_real_distribution<float> distribution(low, high);
  for (int64_t i = 0; i < count; ++i) numbers[i] = distribution(generator);
  return numbers;
}

void run(std::vector<int64_t> shapes, int64_t B, int64_t Q, int64_t h, int64_t D, int64_t P, bool fused, bool half,
         bool padded) {
  const int64_t L = shapes.size() / 2;
  int64_t S = 0;
  for (int64_t l = 0; l < L; ++l) S += shapes[2 * l] * shapes[2 * l + 1];
  const int64_t rows = B * S * h * D, samples = B * Q * h * L * P, outputs = B * Q * h * D;
  auto value = random_floats(rows, -1, 1);
  std::unique_ptr<uint16_t[]> half_value(new uint16_t[rows]);
  for (int64_t i = 0; i < rows; ++i) half_value[i] = round_to_bfloat16(value[i]);
  auto positions = random_floats(samples * 2, fused ? -9 : -0.5f, fused ? 9 : 1.5f);
  const float strange[] = {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN(), -1e30f,
                           3e9f, 0.0f, 1.0f};
  for (int64_t i = 0; i < samples * 2; i += 5) positions[i] = strange[i / 5 % 6];
  auto weights = random_floats(samples, -4, 4), reference = random_floats(Q * 2, 0, 1);
  std::unique_ptr<uint8_t[]> padding(new uint8_t[B * S]);
  for (int64_t i = 0; i < B * S; ++i) padding[i] = generator() % 2;
  const int64_t sizes[] = {B, S, Q, h, D, L, P};
  const void* in = half ? static_cast<const void*>(half_value.get()) : value.get();
  std::unique_ptr<float[]> out(new float[outputs]), positions_gradient(new float[samples * 2]),
      weights_gradient(new float[samples]), value_gradient(new float[rows]());
  std::unique_ptr<uint16_t[]> half_out(new uint16_t[outputs]);
  auto incoming = random_floats(outputs, -1, 1);
  msda_forward(in, positions.get(), weights.get(), fused ? reference.get() : nullptr, padded ? padding.get() : nullptr,
               shapes.data(), sizes, fused, half, 2, half ? static_cast<void*>(half_out.get()) : out.get());
  msda_backward(in, positions.get(), weights.get(), fused ? reference.get() : nullptr,
                padded ? padding.get() : nullptr, shapes.data(), sizes, fused, half, 2, incoming.get(),
                value_gradient.get(), positions_gradient.get(), weights_gradient.get());
}

int main() {
  for (bool fused : {false, true})
    for (bool half : {false, true})
      for (bool padded : {false, true}) {
        for (int64_t D : {1, 3, 8, 16, 24, 32, 40, 64}) run({3, 5, 1, 7, 6, 1}, 2, 5, 3, D, 3, fused, half, padded);
        run({1, 1}, 1, 1, 1, 8, 1, fused, half, padded);
        run({2, 3, 4, 4}, 1, 2, 1, 32, 32, fused, half, padded);  // 64 samples, the most there may be
        run({9, 11}, 1, 2100, 1, 8, 1, fused, half, padded);      // more than one tile of queries
        run({2, 2}, 0, 3, 2, 8, 1, fused, half, padded);
        run({2, 2}, 2, 0, 2, 8, 1, fused, half, padded);
      }
  std::puts("finished");
}
"""


@pytest.mark.skipif(COMPILER is None, reason="no g++")
def test_no_byte_outside_the_tensors_is_touched_and_nothing_undefined_is_computed(tmp_path):
    (tmp_path / "driver.cpp").write_text(DRIVER.replace("SOURCE", str(SOURCE)))
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0", "-g", "-std=c++17", "-pthread"]
    # One version of each function instead of one per kind of processor: a third of the compiler's time.
    command = [COMPILER, *flags, "-Wno-psabi", "-DMSDA_NO_CLONES", "driver.cpp", "-o", "driver"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    if done.returncode and "asan" in done.stderr:
        pytest.skip(f"the compiler has no sanitizers: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]
    done = subprocess.run([tmp_path / "driver"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == "finished", done.stderr[-5000:]
