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
  const int32_t* group_sizes = nullptr;  // [G]
  const int32_t* source = nullptr;       // [C], token-major with a wire format, or null
  const void* bias = nullptr;            // [T, W] of route.rows(), or null
  // Results.
  void* out = nullptr;         // [T, W]
  float* gradients = nullptr;  // [T, K], with row_gradients; 0 for entries without a row
  void* sums = nullptr;        // scratch of CombineSums, or null likewise

  // Expert-major, on one node: whether there are sums of pairs.
  JAX_DEEPEP_HOST_DEVICE bool sums_pairs() const { return pairs != nullptr && sums != nullptr; }
};

// Scratch of a combine that uses scratch. Expert-major, by (rank, token): the sum of every
// (token, device) pair that has several rows, or crosses a link in a wire format; then, if
// there is one, by token (with several nodes, by (node, token)) the sums that stay on this rank.
// Token-major, by row: rows that cross a link, in the wire format. With several nodes, after either
// by token the sum of this rank's node, and gradients [K] of the token's entries there.
struct CombineSums {
  int64_t num_rows = 0, num_own = 0;  // in the wire format, if any, and not
  int64_t num_of_node = 0;
  int64_t row_bytes = 0, own_bytes = 0, gradient_bytes = 0;
  bool is_quantized = false;

  JAX_DEEPEP_HOST_DEVICE CombineSums(const GroupShape& group, const RouteShape& route)
      : row_bytes(route.rows().wire_bytes()), own_bytes((route.rows().bytes() + 15) / 16 * 16) {
    const bool several = PairTable(group, route).max_rows > 1;
    is_quantized = route.rows().is_quantized();
    if (route.layout == Layout::kTokenMajor) {
      num_rows = is_quantized ? route.capacity : 0;
    } else {
      num_rows = is_quantized || several ? int64_t{group.num_ranks} * route.num_tokens : 0;
      num_own = is_quantized && several ? int64_t{group.num_nodes()} * route.num_tokens : 0;
    }
    if (group.num_nodes() == 1) return;
    num_of_node = route.num_tokens;
    gradient_bytes = int64_t{4} * group.num_topk;
  }
  // Of a sum that crosses nodes.
  int64_t crossing_bytes() const { return is_quantized ? row_bytes : own_bytes; }
  // Whether it is an array of rows of y's type: num_rows.
  bool has_plain_rows() const { return !is_quantized && num_of_node == 0; }
  JAX_DEEPEP_HOST_DEVICE int64_t own_offset() const { return num_rows * row_bytes; }
  JAX_DEEPEP_HOST_DEVICE int64_t node_offset() const {
    return (own_offset() + num_own * own_bytes + 15) / 16 * 16;
  }
  JAX_DEEPEP_HOST_DEVICE int64_t gradients_offset() const {
    return node_offset() + num_of_node * own_bytes;
  }
  JAX_DEEPEP_HOST_DEVICE int64_t bytes() const {
    if (num_of_node == 0) return own_offset() + num_own * own_bytes;
    return gradients_offset() + num_of_node * gradient_bytes;
  }
};

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
    const int64_t of_entries = expert_major ? floats : floats * group.num_topk;
    if (route.rows().is_quantized()) return {{&params->row_gradients, of_entries}, params->sums};
    return {{&params->y, route.capacity * route.rows().bytes()},
            {&params->weights, floats},
            {&params->row_gradients, of_entries},
            params->sums};
  }
  // Pairs with several rows are written as sums too.
  static double LocalRows(const CombineParams& params, const ExpectedRows& rows) {
    const bool writes_all = params.route.rows().is_quantized();
    return rows.rows + (writes_all || rows.rows > rows.pairs ? rows.pairs : 0);
  }
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_INTERFACE_COMBINE_H_
