// A warp per token, and as many values per lane as it takes: XLA would sort whole rows, several
// times where experts have groups.
#include "cuda/kernel_launch.h"
#include "router/expert_choice.h"

namespace jax_deepep {
namespace {

constexpr int kWarps = 4;                 // of a block
constexpr int64_t kMostBlocks = 1 << 20;  // warps take several tokens each beyond that
constexpr uint32_t kNoExpert = 0;

// Ordered as values are, and never kNoExpert.
__device__ uint32_t KeyOf(float value) {
  const uint32_t bits = __float_as_uint(value);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ float ValueOf(uint32_t key) {
  return __uint_as_float((key >> 31) != 0 ? key & 0x7fffffffu : ~key);
}

// The values of a token: lane l has those of the experts from l * kValues on.
template <int kValues>
struct Row {
  uint32_t keys[kValues];
  int lane;

  __device__ Row(const float* values, int num_experts, int lane) : lane(lane) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      keys[i] = ExpertOf(i) < num_experts ? KeyOf(values[ExpertOf(i)]) : kNoExpert;
    }
  }

  __device__ int ExpertOf(int i) const { return lane * kValues + i; }
};

// The best and the second best of a lane, or of a warp.
struct BestTwo {
  uint32_t first = kNoExpert;
  uint32_t second = kNoExpert;

  __device__ void Add(uint32_t key) {
    second = max(second, min(first, key));
    first = max(first, key);
  }
  __device__ void OfWarp(int lane) {
    const uint32_t best = __reduce_max_sync(~0u, first);
    const bool gave = lane == __ffs(static_cast<int>(__ballot_sync(~0u, first == best))) - 1;
    second = __reduce_max_sync(~0u, gave ? second : first);
    first = best;
  }
};

// A bit for each of the best groups.
template <int kValues>
__device__ uint32_t BestGroups(const ExpertChoice& op, const Row<kValues>& row) {
  const int size = op.num_experts / op.num_groups;
  float own = 0;  // of the group with the number of this lane
  for (int group = 0; group < op.num_groups; ++group) {
    BestTwo best;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int of_group = row.ExpertOf(i) - group * size;
      if (of_group >= 0 && of_group < size) best.Add(row.keys[i]);
    }
    best.OfWarp(row.lane);
    float value = ValueOf(best.first);
    if (op.best_of_group == 2 && size > 1) value = __fadd_rn(value, ValueOf(best.second));
    if (row.lane == group) own = value;
  }
  int num_better = 0;
  for (int group = 0; group < op.num_groups; ++group) {
    const float other = __shfl_sync(~0u, own, group);
    num_better += other > own || (other == own && group < row.lane);
  }
  return __ballot_sync(~0u, row.lane < op.num_groups && num_better < op.topk_groups);
}

template <int kValues>
__device__ void ChooseExperts(const ExpertChoice& op, int64_t token, int lane) {
  const int64_t at = token * op.num_experts;
  Row<kValues> row(op.ranking + at, op.num_experts, lane);
  if (op.topk_groups < op.num_groups) {
    const uint32_t groups =
        BestGroups(op, Row<kValues>(op.group_ranking + at, op.num_experts, lane));
    const int size = op.num_experts / op.num_groups;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if ((groups >> (row.ExpertOf(i) / size % 32) & 1) == 0) row.keys[i] = kNoExpert;
    }
  }
  uint32_t best = kNoExpert;
#pragma unroll
  for (int i = 0; i < kValues; ++i) best = max(best, row.keys[i]);
  for (int k = 0; k < op.num_topk; ++k) {
    const uint32_t of_all = __reduce_max_sync(~0u, best);
    // Lanes have rising experts: the first that has it has the lowest.
    if (lane != __ffs(static_cast<int>(__ballot_sync(~0u, best == of_all))) - 1) continue;
    int expert = 0;
    best = kNoExpert;
#pragma unroll
    for (int i = kValues - 1; i >= 0; --i) {
      if (row.keys[i] == of_all) expert = i;
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (i == expert) row.keys[i] = kNoExpert;
      best = max(best, row.keys[i]);
    }
    op.topk_idx[token * op.num_topk + k] = row.ExpertOf(expert);
  }
}

template <int kValues>
__global__ void ExpertChoiceKernel(const __grid_constant__ ExpertChoice op) {
  const int lane = threadIdx.x % 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  for (int64_t token = first; token < op.num_tokens; token += int64_t{gridDim.x} * kWarps) {
    ChooseExperts<kValues>(op, token, lane);
  }
}

template <int kValues>
const char* Launch(ExpertChoice op, cudaStream_t stream) {
  if constexpr (kValues * 32 < kMostRankedExperts) {
    if (op.num_experts > kValues * 32) return Launch<2 * kValues>(op, stream);
  }
  const int64_t blocks = (op.num_tokens + kWarps - 1) / kWarps;
  return LaunchIndependentBlocks(ExpertChoiceKernel<kValues>, op,
                                 static_cast<int>(blocks < kMostBlocks ? blocks : kMostBlocks),
                                 kWarps * 32, 0, stream);
}

template <int kValues>
const char* Load() {
  const char* error = LoadKernel(ExpertChoiceKernel<kValues>, 0);
  if constexpr (kValues * 32 < kMostRankedExperts) {
    if (error == nullptr) return Load<2 * kValues>();
  }
  return error;
}

}  // namespace

const char* LoadExpertChoice() { return Load<1>(); }

const char* LaunchExpertChoice(const ExpertChoice& choice, cudaStream_t stream) {
  if (choice.num_tokens == 0) return nullptr;
  return Launch<1>(choice, stream);
}

}  // namespace jax_deepep
