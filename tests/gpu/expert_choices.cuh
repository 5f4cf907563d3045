// The router's choice of experts, compared with a choice by sorting.
#ifndef JAX_DEEPEP_TESTS_GPU_EXPERT_CHOICES_CUH_
#define JAX_DEEPEP_TESTS_GPU_EXPERT_CHOICES_CUH_

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "rank_arrays.cuh"
#include "router/expert_choice.h"

namespace jax_deepep {
namespace {

// The indices of the highest values, the lower index first among equals.
std::vector<int> BestOf(const std::vector<float>& values, const std::vector<int>& among,
                        int count) {
  std::vector<int> sorted = among;
  std::stable_sort(sorted.begin(), sorted.end(),
                   [&](int a, int b) { return values[a] > values[b]; });
  sorted.resize(count);
  return sorted;
}

std::vector<int> Range(int first, int count) {
  std::vector<int> range(count);
  std::iota(range.begin(), range.end(), first);
  return range;
}

std::vector<int> ExpectedChoice(const ExpertChoice& choice, const std::vector<float>& ranking,
                                const std::vector<float>& group_ranking) {
  const int size = choice.num_experts / choice.num_groups;
  std::vector<float> of_groups;
  for (int group = 0; group < choice.num_groups; ++group) {
    float sum = 0;
    for (const int expert :
         BestOf(group_ranking, Range(group * size, size), std::min(size, choice.best_of_group))) {
      sum += group_ranking[expert];
    }
    of_groups.push_back(sum);
  }
  std::vector<int> allowed;
  for (const int group : BestOf(of_groups, Range(0, choice.num_groups), choice.topk_groups)) {
    for (const int expert : Range(group * size, size)) allowed.push_back(expert);
  }
  std::sort(allowed.begin(), allowed.end());
  return BestOf(ranking, allowed, choice.num_topk);
}

void CheckExpertChoice(ExpertChoice choice, bool has_ties) {
  const int num_experts = choice.num_experts, num_topk = choice.num_topk;
  const auto num_tokens = static_cast<int>(choice.num_tokens);
  std::mt19937 random(num_experts * 64 + choice.num_groups);
  Array ranking(num_tokens * num_experts * sizeof(float));
  Array group_ranking(num_tokens * num_experts * sizeof(float));
  Array topk_idx(num_tokens * num_topk * sizeof(int32_t));
  for (Array* array : {&ranking, &group_ranking}) {
    for (int i = 0; i < num_tokens * num_experts; ++i) {
      const float value = std::normal_distribution<float>()(random);
      array->host<float>()[i] = has_ties ? static_cast<float>(static_cast<int>(value)) : value;
    }
    array->ToDevice();
  }
  choice.ranking = ranking.device<float>();
  choice.group_ranking = group_ranking.device<float>();
  choice.topk_idx = topk_idx.device<int32_t>();
  Check(LaunchExpertChoice(choice, cudaStream_t{}) == nullptr, "router: launched");
  CheckCuda(cudaDeviceSynchronize(), "router");
  const std::vector<char> bytes = topk_idx.FromDevice();
  const auto* chosen = reinterpret_cast<const int32_t*>(bytes.data());
  for (int token = 0; token < num_tokens; ++token) {
    const auto row = [&](Array& array) {
      const float* first = array.host<float>() + token * num_experts;
      return std::vector<float>(first, first + num_experts);
    };
    const std::vector<int> expected = ExpectedChoice(choice, row(ranking), row(group_ranking));
    Check(std::equal(expected.begin(), expected.end(), chosen + token * num_topk),
          "router: token " + std::to_string(token) + " of " + std::to_string(num_experts) +
              " experts in " + std::to_string(choice.num_groups) + " groups");
  }
}

void CheckExpertChoices() {
  struct Case {
    int num_tokens, num_experts, num_topk, num_groups, topk_groups, best_of_group;
  };
  const Case cases[] = {
      {9, 1, 1, 1, 1, 1},     {9, 8, 2, 1, 1, 1},      {5, 31, 31, 1, 1, 2}, {9, 64, 8, 1, 1, 1},
      {9, 64, 6, 8, 3, 1},    {9, 128, 8, 1, 1, 1},    {9, 256, 8, 8, 4, 2}, {9, 256, 32, 32, 4, 2},
      {9, 96, 7, 3, 2, 2},    {9, 160, 6, 8, 3, 1},    {9, 24, 4, 24, 5, 2}, {3, 384, 8, 1, 1, 1},
      {3, 1000, 10, 4, 2, 2}, {3, 1024, 16, 32, 8, 2},
  };
  for (const Case& given : cases) {
    ExpertChoice choice{};
    choice.num_tokens = given.num_tokens;
    choice.num_experts = given.num_experts;
    choice.num_topk = given.num_topk;
    choice.num_groups = given.num_groups;
    choice.topk_groups = given.topk_groups;
    choice.best_of_group = given.best_of_group;
    for (const bool has_ties : {false, true}) CheckExpertChoice(choice, has_ties);
  }
}

}  // namespace
}  // namespace jax_deepep

#endif  // JAX_DEEPEP_TESTS_GPU_EXPERT_CHOICES_CUH_
