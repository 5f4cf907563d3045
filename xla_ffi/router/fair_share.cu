// A block per group, with a code of every entry in shared memory: XLA would sort all entries.
#include "cuda/kernel_launch.h"
#include "router/fair_share.h"

namespace jax_deepep {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kCodeBits = 15;  // what 16 bits of a weight have without its sign
constexpr uint32_t kNotInGroup = 0xffff;
constexpr int kPerWord = 2;    // codes
constexpr int kPerThread = 8;  // codes of a load

// The higher the weight, the lower its code.
__device__ uint32_t CodeOf(float weight) {
  return (1u << kCodeBits) - 1 - ((__float_as_uint(weight) & 0x7fffffffu) >> 16);
}

struct alignas(16) Codes {
  uint32_t words[kPerThread / kPerWord];

  __device__ uint32_t operator[](int i) const {
    return words[i / kPerWord] >> i % kPerWord * 16 & 0xffff;
  }
};

// What every thread of the block knows.
class Block {
 public:
  __device__ Block(const FairShare& op, Codes* codes, int* sums)
      : op_(op), codes_(codes), sums_(sums) {}

  // Fill the codes of this group; return how many entries it has.
  __device__ int Load(int group) {
    int count = 0;
    for (int load = threadIdx.x; load < num_loads(); load += kThreads) {
      int32_t experts[kPerThread];
      float weights[kPerThread];
      LoadEntries(load, op_.topk_idx, -1, experts);
      LoadEntries(load, op_.weights, 0.0f, weights);
      Codes codes = {};
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const bool inside = experts[i] >= 0 && experts[i] / op_.experts_per_group == group;
        const uint32_t code = inside ? CodeOf(weights[i]) : kNotInGroup;
        codes.words[i / kPerWord] |= code << i % kPerWord * 16;
        count += inside;
      }
      codes_[load] = codes;
    }
    return Sum(count);
  }

  // How many codes are less than `bound`.
  __device__ int CountBelow(uint32_t bound) {
    int count = 0;
    for (int load = threadIdx.x; load < num_loads(); load += kThreads) {
      const Codes codes = At(load);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) count += codes[i] < bound;
    }
    return Sum(count);
  }

  // Omit the entries of this group whose codes are above `last`, and of those with this code all
  // but the first `num_last`.
  __device__ void Omit(uint32_t last, int num_last) {
    int num_before = 0;  // with this code, in earlier rounds
    for (int first = 0; first < num_loads(); first += kThreads) {
      const int load = first + static_cast<int>(threadIdx.x);
      const bool inside = load < num_loads();
      Codes codes;
      int count = 0;
      if (inside) codes = At(load);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) count += inside && codes[i] == last;
      int total;
      int nth = num_before + SumOfEarlier(count, &total);
      num_before += total;
      if (!inside) continue;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const bool omitted = codes[i] == last ? nth++ >= num_last : codes[i] > last;
        if (omitted && codes[i] != kNotInGroup) op_.topk_idx[load * kPerThread + i] = -1;
      }
    }
  }

 private:
  __device__ int num_loads() const { return (op_.num_entries + kPerThread - 1) / kPerThread; }
  __device__ Codes At(int load) const { return codes_[load]; }

  template <typename T>
  __device__ void LoadEntries(int load, const T* from, T otherwise, T (&values)[kPerThread]) const {
    const int first = load * kPerThread;
    struct alignas(16) Four {
      T values[4];
    };
    if (first + kPerThread <= op_.num_entries && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kPerThread; i += 4) {
        const Four four = *reinterpret_cast<const Four*>(from + first + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) values[i + j] = four.values[j];
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      values[i] = first + i < op_.num_entries ? from[first + i] : otherwise;
    }
  }

  __device__ int Sum(int value) {
    int total;
    SumOfEarlier(value, &total);
    return total;
  }

  // The sum of the values of threads before this one, and of all.
  __device__ int SumOfEarlier(int value, int* total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int of_warp = Inclusive(value, lane);
    __syncthreads();  // the sums of the last call were read
    if (lane == 31) sums_[warp] = of_warp;
    __syncthreads();
    const int of_warps = Inclusive(sums_[lane], lane);
    *total = __shfl_sync(~0u, of_warps, kWarps - 1);
    const int earlier = __shfl_sync(~0u, of_warps, warp == 0 ? 0 : warp - 1);
    return (warp == 0 ? 0 : earlier) + of_warp - value;
  }

  __device__ static int Inclusive(int value, int lane) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(~0u, value, distance);
      if (lane >= distance) value += other;
    }
    return value;
  }

  const FairShare& op_;
  Codes* codes_;
  int* sums_;
};

__global__ void __launch_bounds__(kThreads, 1)
    FairShareKernel(const __grid_constant__ FairShare op) {
  static_assert(kWarps == 32, "a lane for the sum of each warp");
  static_assert(kPerThread == 8 && kWarps * sizeof(int) <= kFairShareStaticBytes);
  extern __shared__ __align__(16) char memory[];
  __shared__ int sums[kWarps];
  Block block(op, reinterpret_cast<Codes*>(memory), sums);
  const auto group = static_cast<int>(blockIdx.x);
  const int share = op.share + ((group + *op.rank) % op.num_ranks < op.rest ? 1 : 0);
  if (block.Load(group) <= share) return;
  // The code of the last entry that stays: fewer than `share` codes are below it, and with it at
  // least as many.
  uint32_t last = 0;
  for (int bit = kCodeBits - 1; bit >= 0; --bit) {
    if (block.CountBelow(last | 1u << bit) < share) last |= 1u << bit;
  }
  block.Omit(last, share - block.CountBelow(last));
}

}  // namespace

const char* LoadFairShare(int shared_bytes) { return LoadKernel(FairShareKernel, shared_bytes); }

const char* LaunchFairShare(const FairShare& op, cudaStream_t stream) {
  if (op.num_entries == 0) return nullptr;
  FairShare copy = op;
  return LaunchIndependentBlocks(FairShareKernel, copy, op.num_groups, kThreads,
                                 SharedBytesOfEntries(op.num_entries), stream);
}

}  // namespace jax_deepep
