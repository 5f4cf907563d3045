#include "cpu/op.h"

namespace jax_deepep {

uint64_t HashOf(const RouteShape& route, uint64_t verb_and_flags) {
  uint64_t hash = verb_and_flags;
  for (const int64_t fact :
       {static_cast<int64_t>(route.layout), static_cast<int64_t>(route.row_type),
        int64_t{route.num_tokens}, int64_t{route.capacity}, int64_t{route.alignment},
        route.expert_capacity}) {
    // The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), over a running sum.
    hash += static_cast<uint64_t>(fact) + 0x9e3779b97f4a7c15u;
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9u;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
    hash ^= hash >> 31;
  }
  return hash;
}

}  // namespace jax_deepep
