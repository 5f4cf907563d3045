#include "router/router_handlers.h"

#include <algorithm>
#include <cstdint>
#include <string>

#include "handlers/platform.h"
#include "router/expert_choice.h"
#include "router/fair_share.h"

namespace jax_deepep {
namespace {

ffi::Error Wrong(const std::string& what) {
  return ffi::Error::InvalidArgument("jax_deepep router: " + what);
}

ffi::Error ResultOf(const char* error) {
  if (error == nullptr) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_deepep router: ") + error);
}

ffi::Error ChooseExperts(cudaStream_t stream, ffi::Buffer<ffi::F32> ranking,
                         ffi::Buffer<ffi::F32> group_ranking, ffi::ResultBuffer<ffi::S32> topk_idx,
                         int64_t num_experts_per_tok, int64_t num_groups, int64_t topk_groups,
                         int64_t best_of_group) {
  const auto operand = ranking.dimensions(), other = group_ranking.dimensions();
  if (operand.size() == 0 || num_experts_per_tok < 1 ||
      !std::equal(operand.begin(), operand.end(), other.begin(), other.end())) {
    return Wrong("expected ranking and group_ranking of one shape [..., E]");
  }
  const int64_t num_experts = operand.back();
  const auto num_tokens = static_cast<int64_t>(topk_idx->element_count()) / num_experts_per_tok;
  if (num_tokens * num_experts != static_cast<int64_t>(ranking.element_count())) {
    return Wrong("expected a result of num_experts_per_tok experts for each token");
  }
  if (num_experts > kMostRankedExperts || num_groups < 1 || num_groups > kMostExpertGroups ||
      num_experts % num_groups != 0 || topk_groups < 1 || topk_groups > num_groups ||
      num_experts_per_tok > num_experts / num_groups * topk_groups || best_of_group < 1 ||
      best_of_group > 2) {
    return Wrong("expected at most " + std::to_string(kMostRankedExperts) + " experts in at most " +
                 std::to_string(kMostExpertGroups) + " groups, and as many as are chosen");
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
  return ResultOf(LaunchExpertChoice(choice, stream));
}

ffi::Error KeepShares(cudaStream_t stream, ffi::Buffer<ffi::S32> topk_idx,
                      ffi::Buffer<ffi::F32> weights, ffi::Buffer<ffi::S32> rank,
                      ffi::ResultBuffer<ffi::S32> kept, int64_t num_groups,
                      int64_t experts_per_group, int64_t share, int64_t rest, int64_t num_ranks) {
  const size_t count = topk_idx.element_count();
  if (weights.element_count() != count || kept->element_count() != count ||
      rank.element_count() != 1 || kept->typed_data() != topk_idx.typed_data()) {
    return Wrong("expected topk_idx and topk_weights of one shape, a rank, and a result in place");
  }
  if (count > kMostSharedEntries || num_groups < 1 || experts_per_group < 1 || share < 0 ||
      share > INT32_MAX - 1 || rest < 0 || num_ranks < 1) {
    return Wrong("expected at most " + std::to_string(kMostSharedEntries) + " entries, and shares");
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
  return ResultOf(LaunchFairShare(op, stream));
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
