// Numbers of wire formats that kernels compute by instructions of their own, compared with the
// arithmetic that all platforms share.
#ifndef JAX_DEEPEP_TESTS_GPU_RANK_NUMBERS_CUH_
#define JAX_DEEPEP_TESTS_GPU_RANK_NUMBERS_CUH_

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "cuda/e2m1_groups.cuh"
#include "cuda/kernel_launch.h"
#include "cuda/wire_rows.cuh"
#include "interface/number_formats.h"
#include "rank_arrays.cuh"

namespace jax_deepep {
namespace {

struct Numbers {
  int count;  // of groups
  const float* values;
  const uint32_t* codes;
  const uint8_t* scales;
  uint32_t* encoded;
  float* decoded;
};

__global__ void NumbersKernel(const __grid_constant__ Numbers op) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < op.count; i += gridDim.x * blockDim.x) {
    op.encoded[i] = E2m1GroupOf(op.values + int64_t{i} * kGroup);
    const uint32_t scale = op.scales[i];
    ScaleE2m1Group(op.codes[i], HalvesOfE4m3Pair(scale | scale << 8),
                   op.decoded + int64_t{i} * kGroup);
  }
}

// float4_e2m1fn: values that end in any upper half and in lower halves around ties, and all codes
// with all scales.
void CheckE2m1() {
  std::vector<float> values;
  for (uint32_t upper = 0; upper < 0x4180; ++upper) {  // below 16
    for (const uint32_t lower : {0x0u, 0x1u, 0x7fffu, 0x8000u, 0xffffu}) {
      for (const uint32_t sign : {0u, kSignBit}) {
        values.push_back(FloatOf(upper << 16 | lower | sign));
      }
    }
  }
  const int count = static_cast<int>(values.size()) / kGroup;
  Array given(values.size() * sizeof(float)), codes(count * 4), scales(count);
  Array encoded(count * 4), decoded(count * kGroup * sizeof(float));
  std::memcpy(given.host<float>(), values.data(), values.size() * sizeof(float));
  for (int i = 0; i < count; ++i) {
    codes.host<uint32_t>()[i] = i % 2 == 0 ? 0x76543210u : 0xfedcba98u;
    scales.host<uint8_t>()[i] = static_cast<uint8_t>(i / 2);
  }
  for (Array* array : {&given, &codes, &scales}) array->ToDevice();
  Numbers op = {count,
                given.device<float>(),
                codes.device<uint32_t>(),
                scales.device<uint8_t>(),
                encoded.device<uint32_t>(),
                decoded.device<float>()};
  const char* error = LaunchKernel(NumbersKernel, op, 8, 128, 0, cudaStream_t{});
  Check(error == nullptr, "numbers: launched");
  CheckCuda(cudaDeviceSynchronize(), "numbers");
  const std::vector<char> encoded_bytes = encoded.FromDevice(),
                          decoded_bytes = decoded.FromDevice();
  const auto* of_values = reinterpret_cast<const uint32_t*>(encoded_bytes.data());
  const auto* of_codes = reinterpret_cast<const float*>(decoded_bytes.data());
  for (int i = 0; i < count; ++i) {
    for (int j = 0; j < kGroup; ++j) {
      const float value = values[i * kGroup + j];
      const uint32_t code = of_values[i] >> 4 * j & 0xfu;
      Check(code == E2m1Of(value), "numbers: the code of " + std::to_string(value));
      const float scale = FromE4m3(scales.host<uint8_t>()[i]);
      const float expected = FromE2m1(codes.host<uint32_t>()[i] >> 4 * j & 0xfu) * scale;
      const float scaled = of_codes[i * kGroup + j];
      Check(std::isnan(expected) ? std::isnan(scaled) : BitsOf(scaled) == BitsOf(expected),
            "numbers: " + std::to_string(expected));
    }
  }
}

struct SaturatedWords {
  int count;
  const float* values;
  uint32_t* words;  // [3, count]: of pairs as bfloat16 and as float16, of values as float32
};

__global__ void SaturatedKernel(const __grid_constant__ SaturatedWords op) {
  for (int i = threadIdx.x; i < op.count; i += blockDim.x) {
    const float pair[2] = {op.values[i], -op.values[i]};
    op.words[i] = BFloat16::SaturatedWord(pair);
    op.words[op.count + i] = Float16::SaturatedWord(pair);
    op.words[2 * op.count + i] = Float32::SaturatedWord(pair);
  }
}

void CheckSaturated() {
  struct Case {
    float value;
    uint32_t words[3];
  };
  const Case cases[] = {
      {1.0f, {0xbf803f80, 0xbc003c00, 0x3f800000}},
      {0.0f, {0x80000000, 0x80000000, 0x00000000}},
      {65504.0f, {0xc7804780, 0xfbff7bff, 0x477fe000}},
      {65519.9f, {0xc7804780, 0xfbff7bff, BitsOf(65519.9f)}},
      {65520.0f, {0xc7804780, 0xfbff7bff, BitsOf(65520.0f)}},
      {1e20f, {0xe0ad60ad, 0xfbff7bff, BitsOf(1e20f)}},
      {FloatOf(0x7f7f7fff), {0xff7f7f7f, 0xfbff7bff, 0x7f7f7fff}},
      {FloatOf(0x7f7f8000), {0xff7f7f7f, 0xfbff7bff, 0x7f7f8000}},
      {FloatOf(0x7f7fffff), {0xff7f7f7f, 0xfbff7bff, 0x7f7fffff}},
      {std::numeric_limits<float>::infinity(), {0xff7f7f7f, 0xfbff7bff, 0x7f7fffff}},
  };
  constexpr int kCases = sizeof(cases) / sizeof(Case), kCount = kCases + 1;
  Array values(kCount * 4), words(3 * kCount * 4);
  for (int i = 0; i < kCases; ++i) values.host<float>()[i] = cases[i].value;
  values.host<float>()[kCases] = FloatOf(kNanBits);
  values.ToDevice();
  SaturatedWords op = {kCount, values.device<float>(), words.device<uint32_t>()};
  const char* error = LaunchKernel(SaturatedKernel, op, 1, 32, 0, cudaStream_t{});
  Check(error == nullptr, "saturated: launched");
  CheckCuda(cudaDeviceSynchronize(), "saturated");
  const std::vector<char> bytes = words.FromDevice();
  for (int type = 0; type < 3; ++type) {
    const uint32_t* of_type = reinterpret_cast<const uint32_t*>(bytes.data()) + type * kCount;
    for (int i = 0; i < kCases; ++i) {
      Check(of_type[i] == cases[i].words[type],
            "saturated: type " + std::to_string(type) + ", " + std::to_string(cases[i].value));
    }
    const uint32_t infinity = type == 0 ? 0x7f80 : type == 1 ? 0x7c00 : kInfinityBits;
    const uint32_t nan = of_type[kCases] & (type == 2 ? ~kSignBit : 0x7fffu);
    Check(nan > infinity, "saturated: NaN stays, type " + std::to_string(type));
  }
}

void CheckNumbers() {
  CheckE2m1();
  CheckSaturated();
}

}  // namespace
}  // namespace jax_deepep

#endif  // JAX_DEEPEP_TESTS_GPU_RANK_NUMBERS_CUH_
