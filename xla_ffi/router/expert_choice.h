// Which experts tokens go to, by their scores.
#ifndef JAX_DEEPEP_ROUTER_EXPERT_CHOICE_H_
#define JAX_DEEPEP_ROUTER_EXPERT_CHOICE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_deepep {

inline constexpr int kMostRankedExperts = 1024;
inline constexpr int kMostExpertGroups = 32;

// Experts form groups of consecutive ones. Of each token, the num_topk experts that rank highest
// within its topk_groups best groups; a group is as good as the sum of its best_of_group best
// values. No value is NaN, -0 or -infinity; ties go to the lower index.
struct ExpertChoice {
  const float* ranking;        // [num_tokens, num_experts]
  const float* group_ranking;  // likewise
  int32_t* topk_idx;           // [num_tokens, num_topk], highest first
  int64_t num_tokens;
  int32_t num_experts;    // at most kMostRankedExperts
  int32_t num_topk;       // at most the experts of topk_groups groups
  int32_t num_groups;     // divides num_experts; at most kMostExpertGroups
  int32_t topk_groups;    // at most num_groups
  int32_t best_of_group;  // 1 or 2
};

// These return null, or what went wrong.
const char* LoadExpertChoice();
const char* LaunchExpertChoice(const ExpertChoice& choice, cudaStream_t stream);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_ROUTER_EXPERT_CHOICE_H_
