// Which entries the router's shares keep, compared with a sort.
#ifndef JAX_DEEPEP_TESTS_GPU_FAIR_SHARES_CUH_
#define JAX_DEEPEP_TESTS_GPU_FAIR_SHARES_CUH_

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "interface/number_formats.h"
#include "rank_arrays.cuh"
#include "router/fair_share.h"

namespace jax_deepep {
namespace {

// `num_weights` is 0 for weights that hardly ever are equal; with `skewed`, half of the entries
// name expert 0.
void CheckFairShare(FairShare op, int num_weights, bool skewed) {
  std::mt19937 random(op.num_entries * 7 + op.num_groups);
  const int count = op.num_entries, num_experts = op.num_groups * op.experts_per_group, rank = 1;
  Array topk_idx(count * sizeof(int32_t)), weights(count * sizeof(float)), own(sizeof(int32_t));
  auto* entries = topk_idx.host<int32_t>();
  for (int i = 0; i < count; ++i) {
    entries[i] = static_cast<int>(random() % (num_experts + 3)) - 1;
    if (skewed && random() % 2 == 0) entries[i] = 0;
    const float weight = std::uniform_real_distribution<float>(-1, 1)(random);
    weights.host<float>()[i] =
        num_weights > 0 ? static_cast<float>(static_cast<int>(weight * num_weights)) : weight;
  }
  *own.host<int32_t>() = rank;
  for (Array* array : {&topk_idx, &weights, &own}) array->ToDevice();
  op.topk_idx = topk_idx.device<int32_t>();
  op.weights = weights.device<float>();
  op.rank = own.device<int32_t>();

  std::vector<int32_t> expected(entries, entries + count);
  for (int group = 0; group < op.num_groups; ++group) {
    std::vector<int> of_group;
    for (int i = 0; i < count; ++i) {
      if (entries[i] >= 0 && entries[i] / op.experts_per_group == group) of_group.push_back(i);
    }
    const auto compared = [&](int entry) {
      return (BitsOf(weights.host<float>()[entry]) & ~kSignBit) >> 16;
    };
    std::stable_sort(of_group.begin(), of_group.end(),
                     [&](int a, int b) { return compared(a) > compared(b); });
    const size_t share = op.share + ((group + rank) % op.num_ranks < op.rest ? 1 : 0);
    for (size_t i = share; i < of_group.size(); ++i) expected[of_group[i]] = -1;
  }
  Check(LaunchFairShare(op, cudaStream_t{}) == nullptr, "router: launched");
  CheckCuda(cudaDeviceSynchronize(), "router");
  const std::vector<char> bytes = topk_idx.FromDevice();
  Check(
      std::equal(expected.begin(), expected.end(), reinterpret_cast<const int32_t*>(bytes.data())),
      "router: the shares of " + std::to_string(op.num_groups) + " groups of " +
          std::to_string(count) + " entries");
}

void CheckFairShares() {
  Check(LoadFairShare(SharedBytesOfEntries(kMostSharedEntries)) == nullptr, "router: loaded");
  FairShare op{};
  op.experts_per_group = 4;
  op.num_ranks = 3;
  op.rest = 2;
  for (const int num_entries : {1, 8, 100, 8200}) {
    for (const int num_groups : {1, 2, 8}) {
      op.num_entries = num_entries;
      op.num_groups = num_groups;
      for (const int share : {1, num_entries / num_groups / 2, num_entries / num_groups}) {
        op.share = std::max(share, 1);
        for (const bool skewed : {false, true}) CheckFairShare(op, skewed ? 3 : 0, skewed);
      }
    }
  }
  op.num_entries = kMostSharedEntries;
  op.share = op.num_entries / op.num_groups / 2;
  CheckFairShare(op, 3, true);
}

}  // namespace
}  // namespace jax_deepep

#endif  // JAX_DEEPEP_TESTS_GPU_FAIR_SHARES_CUH_
