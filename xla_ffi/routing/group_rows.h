// Which row an entry gets, computed sequentially; GPUs compute the same rows in parallel.
//
// 1. Every source counts its entries per row group (of a local expert of some rank, or of a rank).
// 2. first[source][group] = entries of earlier sources in the group.
// 3. A group keeps its first rows: at most expert_capacity, and what fits before row C.
// 4. row = offset of the group + first[source][group] + position among the source's own entries.
#ifndef JAX_DEEPEP_ROUTING_GROUP_ROWS_H_
#define JAX_DEEPEP_ROUTING_GROUP_ROWS_H_

#include <cstdint>

#include "interface/geometry.h"

namespace jax_deepep {

inline int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Whether entry k of a token's topk_idx names an expert for the first time in its row.
inline bool IsValidEntry(const int32_t* topk_idx, int k, int32_t num_experts) {
  if (topk_idx[k] < 0 || topk_idx[k] >= num_experts) return false;
  for (int earlier = 0; earlier < k; ++earlier) {
    if (topk_idx[earlier] == topk_idx[k]) return false;
  }
  return true;
}

// Whether a valid entry k makes its own row: expert-major, always; token-major, only the first
// valid entry of each rank does, and later ones share its row.
inline bool MakesRow(const int32_t* topk_idx, int k, int32_t num_experts, int32_t num_local_experts,
                     Layout layout) {
  if (layout == Layout::kExpertMajor) return true;
  for (int earlier = 0; earlier < k; ++earlier) {
    if (IsValidEntry(topk_idx, earlier, num_experts) &&
        topk_idx[earlier] / num_local_experts == topk_idx[k] / num_local_experts) {
      return false;
    }
  }
  return true;
}

// The rows of one row group on its rank.
struct GroupRows {
  int64_t offset = 0;  // first row
  int64_t kept = 0;    // rows with tokens, after dropping
  int64_t padded = 0;  // the same, rounded up to the alignment
};

// Lay out a group of `received` rows after the one that ended at `offset` (before dropping).
// Returns the group, and advances `offset` to the start of the next one.
inline GroupRows LayOutGroup(int64_t received, const RouteShape& route, int64_t* offset) {
  int64_t wanted = received;
  if (route.expert_capacity != kNoLimit && wanted > route.expert_capacity) {
    wanted = route.expert_capacity;
  }
  const int64_t room = route.capacity - *offset;
  GroupRows group;
  group.offset = *offset;
  group.kept = room < 0 ? 0 : (wanted < room ? wanted : room);
  // The capacity is a multiple of the alignment, so that padding fits where the rows do.
  group.padded = RoundUp(group.kept, route.alignment);
  *offset += RoundUp(wanted, route.alignment);
  return group;
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_ROUTING_GROUP_ROWS_H_
