// combine: sum the rows of every token where the token came from; unweighted, it is the gradient
// of dispatch, and carries the gradients of the rows' weights back as well.
#ifndef JAX_DEEPEP_INTERFACE_COMBINE_H_
#define JAX_DEEPEP_INTERFACE_COMBINE_H_

#include "interface/geometry.h"

namespace jax_deepep {

// What one rank brings to a combine.
struct CombineParams {
  RouteShape route;
  // Operands; what belongs to received rows first.
  const void* y = nullptr;               // [C, W] of route.row_type
  const float* weights = nullptr;        // [C], or null for 1
  const float* row_gradients = nullptr;  // [C] expert-major, [C, K] token-major, or null
  const int32_t* destination = nullptr;  // [T, K]
  const int32_t* pairs = nullptr;  // as PairTable, expert-major, or null where ops get on without
  const void* bias = nullptr;      // [T, W] of route.row_type, or null
  // Results.
  void* out = nullptr;         // [T, W]
  float* gradients = nullptr;  // [T, K], with row_gradients; 0 where an entry went nowhere
  void* sums = nullptr;        // scratch [R * T, W] of route.row_type, or null as pairs
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_INTERFACE_COMBINE_H_
