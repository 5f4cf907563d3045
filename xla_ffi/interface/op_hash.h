// A hash of what an op does: equal on two ranks when they come to the same op.
#ifndef JAX_DEEPEP_INTERFACE_OP_HASH_H_
#define JAX_DEEPEP_INTERFACE_OP_HASH_H_

#include <cstdint>

#include "interface/combine.h"
#include "interface/dispatch.h"
#include "interface/geometry.h"
#include "interface/redispatch.h"

namespace jax_deepep {

inline uint64_t HashOf(const RouteShape& route, uint64_t verb_and_flags) {
  uint64_t hash = verb_and_flags;
  for (const int64_t fact :
       {static_cast<int64_t>(route.layout), static_cast<int64_t>(route.row_type),
        int64_t{route.row_size}, int64_t{route.num_tokens}, int64_t{route.capacity},
        int64_t{route.alignment}, route.expert_capacity}) {
    // The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), over a running sum.
    hash += static_cast<uint64_t>(fact) + 0x9e3779b97f4a7c15u;
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9u;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
    hash ^= hash >> 31;
  }
  return hash;
}

inline uint64_t HashOf(const DispatchParams& params) { return HashOf(params.route, 1); }

inline uint64_t HashOf(const RedispatchParams& params) {
  const uint64_t flags = (params.zero_rest ? 1 : 0) | (params.weights != nullptr ? 2 : 0) |
                         (params.y != nullptr ? 4 : 0);
  return HashOf(params.route, 2 + (flags << 8));
}

inline uint64_t HashOf(const CombineParams& params) {
  const uint64_t flags = (params.weights != nullptr ? 1 : 0) | (params.bias != nullptr ? 2 : 0) |
                         (params.row_gradients != nullptr ? 4 : 0);
  return HashOf(params.route, 3 + (flags << 8));
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_INTERFACE_OP_HASH_H_
