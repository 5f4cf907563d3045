// The parts of combine between nodes: see intranode/combine.cuh.
#ifndef JAX_DEEPEP_CUDA_INTERNODE_NODE_SUMS_CUH_
#define JAX_DEEPEP_CUDA_INTERNODE_NODE_SUMS_CUH_

#include <cstdint>

#include "cuda/intranode/combine_sums.cuh"
#include "cuda/memory_order.cuh"
#include "cuda/remote_put.cuh"
#include "cuda/row_sums.cuh"
#include "cuda/row_values.cuh"
#include "cuda/staging.h"
#include "cuda/warp_items.cuh"
#include "interface/combine.h"

namespace jax_deepep {
namespace {

// The sum of this node for a token of this rank, and the gradients of all its entries here.
__device__ char* NodeSum(const Combine& op, int64_t token) {
  return static_cast<char*>(op.params.sums) + op.of_sums.node_offset() +
         token * op.of_sums.own_bytes;
}
__device__ float* NodeGradients(const Combine& op) {
  return reinterpret_cast<float*>(static_cast<char*>(op.params.sums) +
                                  op.of_sums.gradients_offset());
}

// Put this rank's routes to every other node.
template <typename Group>
__device__ void PutDestinations(const Combine& op, Group& group) {
  const int64_t entries = int64_t{op.params.route.num_tokens} * op.frame.shape.num_topk;
  group.Exchange(
      [&](int node) {
        group.Stage(node, StagedArray::kFirst, 0, op.params.destination, entries);
        group.PutArray(node, StagedArray::kFirst, 0, entries * sizeof(int32_t));
      },
      [] {});
}

// Step 3 between nodes, for a chunk of the tokens of the rank with this rank's index on `node`.
template <typename Type, bool kWhole, bool kWeighted, bool kQuantized, WireFormat kFormat,
          typename Group>
__device__ void SumNode(const Combine& op, const Group& group, int node, int chunk, int32_t* taken,
                        WarpTerms* terms) {
  const CombineParams& params = op.params;
  const RowShape<kWhole> shape{params.route.row_size};
  const GroupRange all = {0, shape.num_groups()};
  const int first = op.frame.chunks.First(chunk), num_topk = op.frame.shape.num_topk;
  const int end = group.EndOf(chunk, params.route.num_tokens);
  const int lane = threadIdx.x % 32, owner = op.frame.RankOnNode(node);
  const bool own = owner == op.frame.rank;
  const int32_t* destinations =
      own ? params.destination : group.template From<int32_t>(owner, StagedArray::kFirst);
  float* gradients =
      own ? NodeGradients(op) : group.template StagedFor<float>(node, StagedArray::kSecond);
  ForWarpItems(
      end - first,
      [&](int item) {
        const bool inside = first + item < end && lane < num_topk;
        return inside ? LoadFresh(destinations + int64_t{first + item} * num_topk + lane) : kNone;
      },
      [&](int item, int32_t destination) {
        return InputsOf<kQuantized>(op, group, owner, first + item, destination, taken);
      },
      [&](int item, const Inputs& inputs) {
        const int token = first + item;
        if (params.gradients != nullptr && lane < num_topk) {
          gradients[int64_t{token} * num_topk + lane] = inputs.gradient;
        }
        if (inputs.count == 0) return;
        const auto new_row = [&] {
          return PointerOfLane(lane == 0 ? group.NewRowFor(node, chunk, token) : nullptr, 0);
        };
        char* to = own ? NodeSum(op, token) : new_row();
        if (kQuantized && !own) {
          AddUp<Type, kWhole, kWeighted, SumOfRanks, kQuantized, kFormat>(
              inputs, shape, all, terms, op.wire, StoreEncoded<kWhole, kFormat>{to, op.wire});
        } else {
          AddUp<Type, kWhole, kWeighted, SumOfRanks, kQuantized, kFormat>(
              inputs, shape, all, terms, op.wire, StoreRounded<Type, kWhole>{to, shape});
        }
      });
}

// The inputs of a token's sum over nodes. `destination` is that of the lane's entry.
template <bool kQuantized, typename Group>
__device__ Inputs InputsOfNodes(const Combine& op, const Group& group, int chunk, int token,
                                int32_t destination) {
  const CombineParams& params = op.params;
  const int lane = threadIdx.x % 32, num_nodes = op.frame.shape.num_nodes();
  const int own_node = op.frame.NodeOf(op.frame.rank);
  const bool somewhere = destination != kNone;
  const int node =
      somewhere ? op.frame.NodeOf(op.capacity.Quotient(destination)) : num_nodes + lane;
  const uint32_t same = __match_any_sync(~0u, node);
  const bool leads = somewhere && __ffs(same) - 1 == lane;
  const int source = op.frame.RankOnNode(somewhere ? node : own_node);
  Inputs inputs;
  if (params.gradients != nullptr && somewhere) {
    const float* gradients = node == own_node
                                 ? NodeGradients(op)
                                 : group.template From<float>(source, StagedArray::kSecond);
    inputs.gradient = LoadFresh(gradients + int64_t{token} * op.frame.shape.num_topk + lane);
  }
  if (params.bias != nullptr && token < params.route.num_tokens) {
    inputs.first = static_cast<const char*>(params.bias) + token * op.row_bytes;
    inputs.count = 1;
  }
  int position = inputs.count;
  for (int base = 0; base < num_nodes; base += 32) {
    const uint32_t nodes = RanksOfLanes(somewhere ? node : kNone, base);
    position += __popc(nodes & BitsBelow(node, base));
    inputs.count += __popc(nodes);
  }
  if (leads) {
    inputs.position = position;
    inputs.encoded = kQuantized && node != own_node;
    inputs.row = node == own_node ? NodeSum(op, token) : group.RowFrom(source, chunk, token);
  }
  return inputs;
}

template <typename Type, bool kWhole, bool kWeighted, bool kQuantized, WireFormat kFormat,
          typename Group>
__device__ void SumNodes(const Combine& op, Group& group, int32_t* taken, WarpTerms* terms) {
  const CombineParams& params = op.params;
  const RowShape<kWhole> shape{params.route.row_size};
  const int num_tokens = params.route.num_tokens, num_topk = op.frame.shape.num_topk;
  const int lane = threadIdx.x % 32, own_node = op.frame.NodeOf(op.frame.rank);
  const auto put = [&](int chunk) {
    group.ForOtherNodes([&](int node) {
      SumNode<Type, kWhole, kWeighted, kQuantized, kFormat>(op, group, node, chunk, taken, terms);
    });
    group.SendChunk(chunk, [&](int node) {
      if (params.gradients == nullptr) return;
      const int64_t first = int64_t{op.frame.chunks.First(chunk)} * num_topk;
      const int64_t end = int64_t{group.EndOf(chunk, num_tokens)} * num_topk;
      group.PutArray(node, StagedArray::kSecond, first * sizeof(float),
                     (end - first) * sizeof(float));
    });
  };
  // While the other nodes' sums arrive. A warp has the same tokens here and below.
  const auto sum_own = [&](int chunk) {
    SumNode<Type, kWhole, kWeighted, kQuantized, kFormat>(op, group, own_node, chunk, taken, terms);
  };
  group.ForChunksOfSums(put, sum_own, [&](int chunk) {
    const int first = op.frame.chunks.First(chunk), end = group.EndOf(chunk, num_tokens);
    ForWarpItems(
        end - first,
        [&](int item) {
          const bool inside = first + item < end && lane < num_topk;
          return inside ? params.destination[int64_t{first + item} * num_topk + lane] : kNone;
        },
        [&](int item, int32_t destination) {
          return InputsOfNodes<kQuantized>(op, group, chunk, first + item, destination);
        },
        [&](int item, const Inputs& inputs) {
          const int token = first + item;
          if (params.gradients != nullptr && lane < num_topk) {
            params.gradients[int64_t{token} * num_topk + lane] = inputs.gradient;
          }
          char* to = static_cast<char*>(params.out) + token * op.row_bytes;
          AddUp<Type, kWhole, false, SumOfRows, kQuantized, kFormat>(
              inputs, shape, {0, shape.num_groups()}, terms, op.wire,
              StoreRounded<Type, kWhole>{to, shape});
        });
  });
}

}  // namespace
}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_INTERNODE_NODE_SUMS_CUH_
