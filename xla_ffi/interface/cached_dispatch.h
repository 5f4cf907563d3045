// cached_dispatch: move other rows along known routes; scaled, it is the gradient of combine.
#ifndef JAX_DEEPEP_INTERFACE_CACHED_DISPATCH_H_
#define JAX_DEEPEP_INTERFACE_CACHED_DISPATCH_H_

#include <cstdint>
#include <vector>

#include "interface/geometry.h"
#include "interface/verb_traits.h"

namespace jax_deepep {

// One rank's part of a cached_dispatch: rows = weights * x[source], products = <x[source], y>.
struct CachedDispatchParams {
  RouteShape route;
  bool zero_rest = false;  // also clear the rows after the last group
  // Operands.
  const void* x = nullptr;               // [T, W] of route.rows()
  const int32_t* source = nullptr;       // [C]
  const int32_t* destination = nullptr;  // [T, K], or null if not needed
  const int32_t* group_sizes = nullptr;  // [G]
  const int32_t* pairs = nullptr;        // as PairTable, expert-major, or null if not needed
  const float* weights = nullptr;        // [C], or null for 1
  const void* y = nullptr;               // [C, W], or null where no products are wanted
  // Results.
  void* rows = nullptr;       // [C, W], or null with keeps_quantized
  KeptArrays kept;            // with keeps_quantized, in place of rows
  float* products = nullptr;  // [C], with y; 0 in rows without a token
  void* encoded = nullptr;    // scratch [T, wire_bytes], or null if not needed
};

template <>
struct VerbTraits<CachedDispatchParams> {
  static constexpr char kName[] = "cached_dispatch";
  static int64_t Flags(const CachedDispatchParams& params) {
    return (params.zero_rest ? 1 : 0) | (params.weights != nullptr ? 2 : 0) |
           (params.y != nullptr ? 4 : 0) | (params.route.keeps_quantized ? 8 : 0);
  }
  static std::vector<PeerArray> ReadByPeers(const GroupShape&, CachedDispatchParams* params) {
    return {RowsOnWire(params->encoded, &params->x, params->route)};
  }
  static double LocalRows(const CachedDispatchParams& params, const ExpectedRows& rows) {
    return (params.y != nullptr ? 2 * rows.rows : rows.rows) +
           (params.encoded != nullptr ? params.route.num_tokens : 0);
  }
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_INTERFACE_CACHED_DISPATCH_H_
