// combine in low-latency mode between nodes, once the ranks of this node have pushed their sums:
// see low_latency/combine.cuh.
//
// 1. For every token of the ranks with this rank's index on other nodes, add up the sums of the
//    ranks of this node, ascending, and put the result there, rounded once or encoded.
// 2. Add up those for this rank's own tokens, rounded once.
// 3. Add the sums of all nodes, ascending, to the bias.
#ifndef JAX_DEEPEP_CUDA_LOW_LATENCY_NODES_SUMS_OF_NODES_CUH_
#define JAX_DEEPEP_CUDA_LOW_LATENCY_NODES_SUMS_OF_NODES_CUH_

#include <cstdint>

#include "cuda/low_latency/signalled_op.cuh"
#include "cuda/low_latency_nodes/put_areas.h"
#include "cuda/memory_order.cuh"
#include "cuda/row_sums.cuh"
#include "cuda/row_values.cuh"
#include "cuda/warp_items.cuh"
#include "interface/combine.h"

namespace jax_deepep {
namespace {

// The gradients that a slot has in combine.
struct GradientsOfSums {
  float* gradients;  // [T][L][width]
  int width;         // gradients of a token on a rank
  int size;          // L

  template <typename Op, typename Group>
  __device__ GradientsOfSums(const Op& op, const Group& group, char* slot)
      : gradients(group.template ValuesIn<float>(slot)),
        width(WidthOf(op.frame.shape, op.params.route)),
        size(op.frame.shape.node_size()) {}

  __device__ float* Of(int token) const { return gradients + int64_t{token} * size * width; }

  JAX_DEEPEP_HOST_DEVICE static int WidthOf(const GroupShape& shape, const RouteShape& route) {
    return route.layout == Layout::kExpertMajor ? PairTable(shape, route).max_rows : shape.num_topk;
  }
};

// Collect the terms of this node's sum for a token of the rank with this rank's index on `node`.
// False if the op is lost.
template <bool kQuantized, typename Op, typename Group>
__device__ bool CollectTerms(const Op& op, Group& group, int node, int token, WarpTerms* terms,
                             Inputs* inputs) {
  const int lane = threadIdx.x % 32, self = op.frame.rank, size = op.frame.shape.node_size();
  __syncwarp();  // the terms of the token before have been used
  for (int base = 0; base < size; base += 32) {
    const bool waits = base + lane < size;
    const int index = waits ? base + lane : 0, rank = group.first_peer() + index;
    const Slot at = group.SlotOf(self, node * size + index, token);
    bool has_row;
    if (!group.Wait(waits, at, 0, rank, &has_row)) return false;
    const uint32_t present = __ballot_sync(~0u, has_row);
    if (has_row) {
      terms->inputs[inputs->count + __popc(present & ((1u << lane) - 1))] = {at.row(), 1.0f,
                                                                             rank != self};
      group.CountReceived(rank);
    }
    inputs->count += __popc(present);
  }
  return true;
}

// The gradient that a rank of this node has pushed, whose slot has arrived; 0 without a row.
template <typename Op, typename Group>
__device__ float PushedGradient(const Op& op, const Group& group, int source, int token,
                                int position) {
  const Slot at = group.SlotOf(op.frame.rank, source, token);
  return (LoadAcquireSystem(at.signals()) & 1) != 0 ? at.value(position) : 0.0f;
}

// Step 1. False if the op is lost.
template <typename Type, bool kWhole, bool kQuantized, WireFormat kFormat, typename Op,
          typename Group>
__device__ bool SumForNodes(const Op& op, Group& group, WarpTerms* terms) {
  const CombineParams& params = op.params;
  const RowShape<kWhole> shape{params.route.row_size};
  const GroupRange all = {0, shape.num_groups()};
  const int lane = threadIdx.x % 32, size = op.frame.shape.node_size();
  const int num_items = (group.num_nodes() - 1) * op.signalled.num_slots;
  for (int item = FirstItem(); item < num_items; item += NumWarps()) {
    // The next node first.
    const int after = group.node() + 1 + op.num_slots.Quotient(item);
    const int node = after < group.num_nodes() ? after : after - group.num_nodes();
    const int token = op.num_slots.Remainder(item);
    Inputs inputs;
    if (!CollectTerms<kQuantized>(op, group, node, token, terms, &inputs)) return false;
    if (token >= params.route.num_tokens) continue;
    char* slot = group.StagedFor(node);
    const GradientsOfSums gradients(op, group, slot);
    for (int i = lane; params.gradients != nullptr && i < size * gradients.width; i += 32) {
      gradients.Of(token)[i] =
          PushedGradient(op, group, node * size + i / gradients.width, token, i % gradients.width);
    }
    if (inputs.count == 0) {
      if (lane == 0) group.PlacesIn(slot)[token] = kNone;
      continue;
    }
    char* to = PointerOfLane(lane == 0 ? group.NewRowFor(node, token) : nullptr, 0);
    if (kQuantized) {
      AddUp<Type, kWhole, false, SumOfRanks, true, kFormat>(
          inputs, shape, all, terms, op.wire, StoreEncoded<kWhole, kFormat>{to, op.wire});
    } else {
      AddUp<Type, kWhole, false, SumOfRanks, false>(inputs, shape, all, terms, op.wire,
                                                    StoreRounded<Type, kWhole>{to, shape});
    }
  }
  return true;
}

// Step 2. False if the op is lost.
template <typename Type, bool kWhole, bool kQuantized, WireFormat kFormat, typename Op,
          typename Group>
__device__ bool SumOwnNode(const Op& op, Group& group, WarpTerms* terms) {
  const RowShape<kWhole> shape{op.params.route.row_size};
  int32_t* places =
      group.PlacesIn(group.SlotOfNode(op.frame.rank, PutArea::kReceived, group.node()));
  for (int token = FirstItem(); token < op.signalled.num_slots; token += NumWarps()) {
    Inputs inputs;
    if (!CollectTerms<kQuantized>(op, group, group.node(), token, terms, &inputs)) return false;
    if (token >= op.params.route.num_tokens) continue;
    if (threadIdx.x % 32 == 0) places[token] = inputs.count > 0 ? token : kNone;
    if (inputs.count == 0) continue;
    char* to = group.OwnSum(token);
    AddUp<Type, kWhole, false, SumOfRanks, kQuantized, kFormat>(
        inputs, shape, {0, shape.num_groups()}, terms, op.wire,
        StoreRounded<Type, kWhole>{to, shape});
  }
  return true;
}

// The gradient of the lane's entry of a token.
template <typename Op, typename Group>
__device__ float GradientOfEntry(const Op& op, const Group& group, int token) {
  const int lane = threadIdx.x % 32, num_topk = op.frame.shape.num_topk;
  const int size = op.frame.shape.node_size();
  const bool expert_major = op.params.route.layout == Layout::kExpertMajor;
  const int32_t rank =
      lane < num_topk ? op.params.destination[int64_t{token} * num_topk + lane] : kNone;
  const uint32_t same = __match_any_sync(~0u, rank);
  const int nth = __popc(same & ((1u << lane) - 1));  // of the entries of its rank
  const int position = expert_major ? nth : lane;
  if (rank < 0 || rank >= op.frame.shape.num_ranks) return 0.0f;  // after a failed dispatch
  const int node = op.frame.NodeOf(rank);
  if (node == group.node()) return PushedGradient(op, group, rank, token, position);
  const GradientsOfSums gradients(op, group,
                                  group.SlotOfNode(op.frame.rank, PutArea::kReceived, node));
  return LoadFresh(gradients.Of(token) + rank % size * gradients.width + position);
}

// Step 3. A warp has the same tokens as in step 2.
template <typename Type, bool kWhole, bool kQuantized, WireFormat kFormat, typename Op,
          typename Group>
__device__ void AddNodes(const Op& op, const Group& group, WarpTerms* terms) {
  const CombineParams& params = op.params;
  const RowShape<kWhole> shape{params.route.row_size};
  const int lane = threadIdx.x % 32, num_topk = op.frame.shape.num_topk;
  for (int token = FirstItem(); token < params.route.num_tokens; token += NumWarps()) {
    Inputs inputs;
    if (params.bias != nullptr) {
      inputs.first = static_cast<const char*>(params.bias) + token * op.row_bytes;
      inputs.count = 1;
    }
    __syncwarp();  // the terms of the token before have been used
    for (int base = 0; base < group.num_nodes(); base += 32) {
      const bool inside = base + lane < group.num_nodes();
      const int node = inside ? base + lane : group.node();
      char* slot = group.SlotOfNode(op.frame.rank, PutArea::kReceived, node);
      const int place = inside ? LoadFresh(&group.PlacesIn(slot)[token]) : kNone;
      const uint32_t present = __ballot_sync(~0u, place != kNone);
      if (place != kNone) {
        const bool own = node == group.node();
        terms->inputs[inputs.count + __popc(present & ((1u << lane) - 1))] = {
            own ? group.OwnSum(token) : group.RowIn(slot, place), 1.0f, !own};
      }
      inputs.count += __popc(present);
    }
    if (params.gradients != nullptr) {
      const float gradient = GradientOfEntry(op, group, token);
      if (lane < num_topk) params.gradients[int64_t{token} * num_topk + lane] = gradient;
    }
    char* to = static_cast<char*>(params.out) + token * op.row_bytes;
    AddUp<Type, kWhole, false, SumOfRows, kQuantized, kFormat>(
        inputs, shape, {0, shape.num_groups()}, terms, op.wire,
        StoreRounded<Type, kWhole>{to, shape});
  }
}

// False if the op is lost.
template <typename Type, bool kWhole, bool kQuantized, WireFormat kFormat, typename Op,
          typename Group>
__device__ bool SumNodes(const Op& op, Group& group, WarpTerms* terms) {
  const bool summed = SumForNodes<Type, kWhole, kQuantized, kFormat>(op, group, terms);
  if (!__syncthreads_and(summed)) return false;
  group.SendToNodes();
  // While the other nodes' sums arrive.
  const bool own = SumOwnNode<Type, kWhole, kQuantized, kFormat>(op, group, terms);
  if (!__syncthreads_and(own) || !group.WaitForSums()) return false;
  AddNodes<Type, kWhole, kQuantized, kFormat>(op, group, terms);
  return true;
}

}  // namespace
}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_LOW_LATENCY_NODES_SUMS_OF_NODES_CUH_
