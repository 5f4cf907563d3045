#include "router/router_handlers.h"

#include <algorithm>
#include <cstdint>
#include <string>

#include "handlers/platform.h"
#include "router/expert_choice.h"
#include "router/fair_share.h"
#include "router/router_kernels.h"

namespace jax_deepep {
namespace {

ffi::Error ResultOf(const char* error) {
  if (error == nullptr) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_deepep router: ") + error);
}

ffi::Error Expected(const std::string& what) {
  return ffi::Error::InvalidArgument("jax_deepep router: expected " + what);
}

// Whether a value is in [least, most]; otherwise says so.
bool IsWithin(const char* name, int64_t value, int64_t least, int64_t most, std::string* wrong) {
  if (value >= least && value <= most) return true;
  *wrong = std::string(name) + " from " + std::to_string(least) + " to " + std::to_string(most) +
           ", got " + std::to_string(value);
  return false;
}

ffi::Error ChooseExperts(cudaStream_t stream, ffi::Buffer<ffi::F32> ranking,
                         ffi::Buffer<ffi::F32> group_ranking, ffi::ResultBuffer<ffi::S32> topk_idx,
                         int64_t num_experts_per_tok, int64_t num_groups, int64_t topk_groups,
                         int64_t best_of_group) {
  const auto operand = ranking.dimensions(), other = group_ranking.dimensions();
  if (operand.size() == 0 ||
      !std::equal(operand.begin(), operand.end(), other.begin(), other.end())) {
    return Expected("ranking and group_ranking of one shape [..., E]");
  }
  const int64_t num_experts = operand.back();
  std::string wrong;
  if (!IsWithin("num_experts", num_experts, 1, kMostRankedExperts, &wrong) ||
      !IsWithin("num_groups", num_groups, 1, kMostExpertGroups, &wrong) ||
      !IsWithin("topk_groups", topk_groups, 1, num_groups, &wrong) ||
      !IsWithin("best_of_group", best_of_group, 1, 2, &wrong) ||
      !IsWithin("num_experts_per_tok", num_experts_per_tok, 1,
                num_experts / num_groups * topk_groups, &wrong)) {
    return Expected(wrong);
  }
  const auto num_tokens = static_cast<int64_t>(topk_idx->element_count()) / num_experts_per_tok;
  if (num_experts % num_groups != 0 ||
      num_tokens * num_experts != static_cast<int64_t>(ranking.element_count())) {
    return Expected("groups of one size, and num_experts_per_tok results for each token");
  }
  ExpertChoice choice;
  choice.ranking = ranking.typed_data();
  choice.group_ranking = group_ranking.typed_data();
  choice.topk_idx = topk_idx->typed_data();
  choice.num_tokens = num_tokens;
  choice.num_experts = static_cast<int32_t>(num_experts);
  choice.num_topk = static_cast<int32_t>(num_experts_per_tok);
  choice.num_groups = static_cast<int32_t>(num_groups);
  choice.topk_groups = static_cast<int32_t>(topk_groups);
  choice.best_of_group = static_cast<int32_t>(best_of_group);
  const char* error = EnsureRouterKernels();
  return ResultOf(error != nullptr ? error : LaunchExpertChoice(choice, stream));
}

ffi::Error KeepShares(cudaStream_t stream, ffi::Buffer<ffi::S32> topk_idx,
                      ffi::Buffer<ffi::F32> weights, ffi::Buffer<ffi::S32> rank,
                      ffi::ResultBuffer<ffi::S32> kept, int64_t num_groups,
                      int64_t experts_per_group, int64_t share, int64_t rest, int64_t num_ranks) {
  const size_t count = topk_idx.element_count();
  if (weights.element_count() != count || kept->element_count() != count ||
      rank.element_count() != 1 || kept->typed_data() != topk_idx.typed_data()) {
    return Expected("topk_idx and topk_weights of one shape, a rank, and a result in place");
  }
  constexpr int64_t kMost = INT32_MAX;
  std::string wrong;
  if (!IsWithin("entries", static_cast<int64_t>(count), 0, kMostSharedEntries, &wrong) ||
      !IsWithin("num_groups", num_groups, 1, kMost, &wrong) ||
      !IsWithin("experts_per_group", experts_per_group, 1, kMost, &wrong) ||
      !IsWithin("share", share, 1, kMost - 1, &wrong) ||
      !IsWithin("num_ranks", num_ranks, 1, kMost, &wrong) ||
      !IsWithin("rest", rest, 0, num_ranks - 1, &wrong)) {
    return Expected(wrong);
  }
  FairShare op;
  op.topk_idx = kept->typed_data();
  op.weights = weights.typed_data();
  op.rank = rank.typed_data();
  op.num_entries = static_cast<int32_t>(count);
  op.num_groups = static_cast<int32_t>(num_groups);
  op.experts_per_group = static_cast<int32_t>(experts_per_group);
  op.share = static_cast<int32_t>(share);
  op.rest = static_cast<int32_t>(rest);
  op.num_ranks = static_cast<int32_t>(num_ranks);
  const char* error = EnsureRouterKernels();
  return ResultOf(error != nullptr ? error : LaunchFairShare(op, stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ExpertChoiceHandler, ChooseExperts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()  // ranking
                                  .Arg<ffi::Buffer<ffi::F32>>()  // group_ranking
                                  .Ret<ffi::Buffer<ffi::S32>>()  // topk_idx
                                  .Attr<int64_t>("num_experts_per_tok")
                                  .Attr<int64_t>("num_groups")
                                  .Attr<int64_t>("topk_groups")
                                  .Attr<int64_t>("best_of_group"),
                              kTraits);

XLA_FFI_DEFINE_HANDLER_SYMBOL(FairShareHandler, KeepShares,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()  // topk_idx
                                  .Arg<ffi::Buffer<ffi::F32>>()  // topk_weights
                                  .Arg<ffi::Buffer<ffi::S32>>()  // rank
                                  .Ret<ffi::Buffer<ffi::S32>>()  // topk_idx
                                  .Attr<int64_t>("num_groups")
                                  .Attr<int64_t>("experts_per_group")
                                  .Attr<int64_t>("share")
                                  .Attr<int64_t>("rest")
                                  .Attr<int64_t>("num_ranks"),
                              kTraits);

}  // namespace jax_deepep
