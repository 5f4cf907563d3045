// The kernels of the router as custom calls: decode, check, launch. Attributes are int64.
#ifndef JAX_DEEPEP_ROUTER_ROUTER_HANDLERS_H_
#define JAX_DEEPEP_ROUTER_ROUTER_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

namespace jax_deepep {

// Operands: ranking and group_ranking, float32 [..., E]. Result: topk_idx, int32 [..., K].
// Attributes: num_experts_per_tok, num_groups, topk_groups, best_of_group.
XLA_FFI_DECLARE_HANDLER_SYMBOL(ExpertChoiceHandler);

// Operands: topk_idx, int32 [T, K]; topk_weights, float32 [T, K]; rank, int32 []. Result: int32
// [T, K] in the memory of topk_idx. Attributes: num_groups, experts_per_group, share, rest,
// num_ranks.
XLA_FFI_DECLARE_HANDLER_SYMBOL(FairShareHandler);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_ROUTER_ROUTER_HANDLERS_H_
