// combine: sum the rows of every token on the rank of the token; unweighted, it is the gradient of
// dispatch, and also returns the gradients of the rows' weights.
#ifndef JAX_DEEPEP_INTERFACE_COMBINE_H_
#define JAX_DEEPEP_INTERFACE_COMBINE_H_

#include <cstdint>
#include <vector>

#include "interface/geometry.h"
#include "interface/verb_traits.h"

namespace jax_deepep {

// One rank's part of a combine.
struct CombineParams {
  RouteShape route;
  // Operands; those of received rows first.
  const void* y = nullptr;               // [C, W] of route.rows()
  const float* weights = nullptr;        // [C], or null for 1
  const float* row_gradients = nullptr;  // [C] expert-major, [C, K] token-major, or null
  const int32_t* destination = nullptr;  // [T, K]
  const int32_t* pairs = nullptr;        // as PairTable, expert-major, or null if not needed
  const void* bias = nullptr;            // [T, W] of route.rows(), or null
  // Results.
  void* out = nullptr;         // [T, W]
  float* gradients = nullptr;  // [T, K], with row_gradients; 0 for entries without a row
  void* sums = nullptr;        // scratch [CombineSumRows, W] of route.rows(), or null likewise
};

// Rows of scratch of a combine that uses scratch: the sum of every (token, device) pair
// with several rows.
inline int64_t CombineSumRows(const GroupShape& group, const RouteShape& route) {
  const bool sums = route.layout == Layout::kExpertMajor && PairTable(group, route).max_rows > 1;
  return sums ? int64_t{group.num_ranks} * route.num_tokens : 0;
}

template <>
struct VerbTraits<CombineParams> {
  static constexpr char kName[] = "combine";
  static int64_t Flags(const CombineParams& params) {
    return (params.weights != nullptr ? 1 : 0) | (params.bias != nullptr ? 2 : 0) |
           (params.row_gradients != nullptr ? 4 : 0);
  }
  static std::vector<PeerArray> ReadByPeers(const GroupShape& group, CombineParams* params) {
    const RouteShape& route = params->route;
    const int64_t floats = sizeof(float) * int64_t{route.capacity};
    const bool expert_major = route.layout == Layout::kExpertMajor;
    return {{&params->y, route.capacity * route.rows().bytes()},
            {&params->weights, floats},
            {&params->row_gradients, expert_major ? floats : floats * group.num_topk},
            params->sums};
  }
  // Pairs with several rows are written as sums too.
  static double LocalRows(const CombineParams&, const ExpectedRows& rows) {
    return rows.rows + (rows.rows > rows.pairs ? rows.pairs : 0);
  }
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_INTERFACE_COMBINE_H_
