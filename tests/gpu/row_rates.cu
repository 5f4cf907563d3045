// How fast a GPU loads, stores, copies, encodes and decodes rows with few SMs: limits of the ops in
// formats. Prints us, and GB/s of what is read and written, per SM too; median of 9 runs, each
// after the second-level cache has been overwritten.
//
//     row_rates [SMS...]
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cuda/op_frame.h"
#include "cuda/row_copies.cuh"
#include "cuda/warp_items.cuh"
#include "rank_arrays.cuh"

namespace jax_deepep {
namespace {

constexpr int kRows = 4096, kHidden = 7168, kRowBytes = 2 * kHidden;
constexpr int kWords = kRowBytes / static_cast<int>(sizeof(uint4));
constexpr int kInFlight = 14;  // words of a lane
static_assert(kWords % (32 * kInFlight) == 0);

struct Rows {
  WireRow wire;
  const char* x;  // [kRows, kHidden], bfloat16
  char* encoded;
  char* out;  // as x
};

// Call use(word) for each part of every row: the lane has this word, and every 32nd after it.
template <typename Use>
__device__ void ForParts(Use use) {
  for (int row = FirstItem(); row < kRows; row += NumWarps()) {
    for (int base = threadIdx.x % 32; base < kWords; base += 32 * kInFlight) {
      use(row * kWords + base);
    }
  }
}

__device__ void LoadPart(const char* from, int at, uint4 (&words)[kInFlight]) {
#pragma unroll
  for (int i = 0; i < kInFlight; ++i)
    words[i] = LoadOnce(reinterpret_cast<const uint4*>(from) + at + 32 * i);
}

__global__ void __launch_bounds__(kThreads, 1) Load(const __grid_constant__ Rows rows) {
  ForParts([&](int at) {
    uint4 words[kInFlight];
    LoadPart(rows.x, at, words);
    uint32_t all = 0;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) all |= words[i].x & words[i].y & words[i].z & words[i].w;
    if (all == 0x12345678) rows.out[at] = 1;  // never: so that nothing is left out
  });
}

__global__ void __launch_bounds__(kThreads, 1) Store(const __grid_constant__ Rows rows) {
  ForParts([&](int at) {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) reinterpret_cast<uint4*>(rows.out)[at + 32 * i] = uint4{};
  });
}

__global__ void __launch_bounds__(kThreads, 1) Copy(const __grid_constant__ Rows rows) {
  ForParts([&](int at) {
    uint4 words[kInFlight];
    LoadPart(rows.x, at, words);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) reinterpret_cast<uint4*>(rows.out)[at + 32 * i] = words[i];
  });
}

template <WireFormat kFormat>
__global__ void __launch_bounds__(kThreads, 1) Encode(const __grid_constant__ Rows rows) {
  EncodeRows<BFloat16, true, kFormat>(rows.wire, rows.x, kRowBytes, kRows, rows.encoded,
                                      [](int) { return true; });
}

template <WireFormat kFormat>
__global__ void __launch_bounds__(kThreads, 1) Decode(const __grid_constant__ Rows rows) {
  const RowArray<true> out{rows.out, kRowBytes};
  for (int row = FirstItem(); row < kRows; row += NumWarps()) {
    const EncodedRow<BFloat16, true, kFormat> from(rows.encoded + row * rows.wire.bytes(),
                                                   rows.wire);
    CopyRowToLanes(from, out, [&] { return int64_t{threadIdx.x % 32 == 0 ? row : -1}; });
  }
}

void Time(const char* name, void (*kernel)(Rows), const Rows& rows, int sms, double bytes) {
  constexpr size_t kFlushed = size_t{200} << 20;
  static char* flushed = nullptr;
  if (flushed == nullptr) CheckCuda(cudaMalloc(&flushed, kFlushed), "cudaMalloc");
  cudaEvent_t begin, end;
  CheckCuda(cudaEventCreate(&begin), "event");
  CheckCuda(cudaEventCreate(&end), "event");
  std::vector<float> times;
  for (int run = 0; run < 9; ++run) {
    CheckCuda(cudaMemset(flushed, run, kFlushed), "cudaMemset");
    CheckCuda(cudaEventRecord(begin), "event");
    kernel<<<sms, kThreads>>>(rows);
    CheckCuda(cudaEventRecord(end), "event");
    CheckCuda(cudaEventSynchronize(end), name);
    CheckCuda(cudaEventElapsedTime(&times.emplace_back(), begin, end), "event");
  }
  std::sort(times.begin(), times.end());
  const double us = 1e3 * times[times.size() / 2], rate = bytes / us * 1e-3;
  std::printf("%-16s %3d SMs: %6.1f us %6.0f GB/s %5.1f per SM\n", name, sms, us, rate, rate / sms);
}

template <WireFormat kFormat>
void TimeFormat(Rows rows, int sms, const std::string& format) {
  rows.wire = WireRow{kFormat, kHidden};
  const double bytes = double{kRows} * (kRowBytes + static_cast<double>(rows.wire.bytes()));
  Time(("encode " + format).c_str(), Encode<kFormat>, rows, sms, bytes);
  Time(("decode " + format).c_str(), Decode<kFormat>, rows, sms, bytes);
}

}  // namespace
}  // namespace jax_deepep

int main(int argc, char** argv) {
  using namespace jax_deepep;
  std::vector<int> counts = {8, 24, 64, 132};
  if (argc > 1) counts.clear();
  for (int i = 1; i < argc; ++i) counts.push_back(std::atoi(argv[i]));
  std::mt19937 random(7);
  const size_t bytes = size_t{kRows} * kRowBytes;
  Array x(bytes), encoded(bytes), out(bytes);
  FillRandom(RowType::kBFloat16, x.host<void>(), size_t{kRows} * kHidden, random);
  x.ToDevice();
  const Rows rows{{}, x.device<char>(), encoded.device<char>(), out.device<char>()};
  std::printf("T = %d, H = %d, bfloat16\n", kRows, kHidden);
  for (const int sms : counts) {
    Time("load", Load, rows, sms, bytes);
    Time("store", Store, rows, sms, bytes);
    Time("copy", Copy, rows, sms, 2.0 * bytes);
    TimeFormat<WireFormat::kFp8>(rows, sms, "fp8");
    TimeFormat<WireFormat::kMxfp8>(rows, sms, "mxfp8");
    TimeFormat<WireFormat::kNvfp4>(rows, sms, "nvfp4");
  }
  return 0;
}
