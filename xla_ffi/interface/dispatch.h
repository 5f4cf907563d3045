// dispatch: decide the routes of topk_idx and move rows along them.
#ifndef JAX_DEEPEP_INTERFACE_DISPATCH_H_
#define JAX_DEEPEP_INTERFACE_DISPATCH_H_

#include <cstdint>
#include <vector>

#include "interface/geometry.h"
#include "interface/verb_traits.h"

namespace jax_deepep {

// One rank's part of a dispatch. Letters as in GroupShape and RouteShape; G = NumRowGroups.
struct DispatchParams {
  RouteShape route;
  // Operands.
  const void* x = nullptr;              // [T, W] of route.rows()
  const int32_t* topk_idx = nullptr;    // [T, K] global expert, or kNone
  const float* topk_weights = nullptr;  // [T, K]
  // Results. Rows of `tokens` after the last group are not written.
  void* tokens = nullptr;            // [C, W], or null with keeps_quantized
  KeptArrays kept;                   // with keeps_quantized, in place of tokens
  int32_t* source = nullptr;         // [C] source rank * max_tokens + token, or kNone
  int32_t* destination = nullptr;    // [T, K] rank * C + row, or kNone
  float* weights = nullptr;          // [C] expert-major, [C, K] token-major
  int32_t* local_experts = nullptr;  // [C, K] token-major, else nothing
  int32_t* group_sizes = nullptr;    // [G] rows with padding
  int32_t* num_rows = nullptr;       // [G] rows without
  int32_t* num_received = nullptr;   // [] rows sent to this rank, before dropping
  int32_t* num_dropped = nullptr;    // []
  int32_t* num_invalid = nullptr;    // [] entries of topk_idx that were ignored
  int32_t* pairs = nullptr;          // as PairTable, or null if not needed
  int32_t* scratch = nullptr;        // [DispatchScratchInts], or null likewise
  void* encoded = nullptr;           // scratch [T, wire_bytes], or null likewise
};

// int32s of scratch of a dispatch that uses scratch: a record of 16 bytes for each entry,
// and a list of tokens for each rank.
inline int64_t DispatchScratchInts(const GroupShape& group, const RouteShape& route) {
  return int64_t{route.num_tokens} * (4 * group.num_topk + group.num_ranks);
}

template <>
struct VerbTraits<DispatchParams> {
  static constexpr char kName[] = "dispatch";
  static int64_t Flags(const DispatchParams& params) {
    return params.route.keeps_quantized ? 1 : 0;
  }
  static std::vector<PeerArray> ReadByPeers(const GroupShape&, DispatchParams* params) {
    return {RowsOnWire(params->encoded, &params->x, params->route), params->scratch};
  }
  static double LocalRows(const DispatchParams& params, const ExpectedRows& rows) {
    return rows.rows + (params.encoded != nullptr ? params.route.num_tokens : 0);
  }
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_INTERFACE_DISPATCH_H_
