// combine by pulling: the rank of the experts sums a token's rows first, so that one row crosses
// the link per (token, rank); the rank of the token pulls these and sums them in ascending order.
// `Group` is GroupOp, or NodeOp between nodes.
//
// 1. Sum: for every pair with several rows, p = sum of w * y, rounded once; with a wire format, for
//    every pair of another rank, encoded. On one node and without a wire format, own pairs wait for
//    step 3, and the pairs of later tokens are summed while peers pull: a warp that waits for a
//    part of the tokens has summed what it has of it, so that none wait in a circle
//    (tests/unit/protocol_parts.py).
// 2. Publish; wait for everyone.
// 3. Pull: for every token of this rank, bias + p_0 + p_1 + ...; a pair with one row that is not
//    encoded needs no sum: its row is read and weighted in place. Own pairs are summed here, which
//    saves writing and reading their sums (not with a wire format, or between nodes).
//
// Between nodes, each rank does step 3 for the tokens of all ranks with its index in their nodes,
// over the ranks of its own node, and puts the sums, rounded once or encoded, to the ranks of the
// tokens. Those sum over nodes in ascending order.
#ifndef JAX_DEEPEP_CUDA_INTRANODE_COMBINE_CUH_
#define JAX_DEEPEP_CUDA_INTRANODE_COMBINE_CUH_

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/divisor.h"
#include "cuda/internode/node_sums.cuh"
#include "cuda/intranode/combine_sums.cuh"
#include "cuda/intranode/pairs_of_parts.cuh"
#include "cuda/kernel_choice.cuh"
#include "cuda/kernel_launch.h"
#include "cuda/kernels.h"
#include "cuda/op_frame.h"
#include "cuda/row_copies.cuh"
#include "cuda/row_sums.cuh"
#include "cuda/row_values.cuh"
#include "cuda/warp_items.cuh"
#include "interface/combine.h"

namespace jax_deepep {
namespace {

template <bool kQuantized, bool kSeveralNodes>
using SumOfToken =
    std::conditional_t<kSumsOwnRows<kQuantized, kSeveralNodes>, SumOfRowsAndPair, SumOfRows>;

// Step 3, for this warp's tokens before `end`.
template <typename Type, bool kWhole, bool kWeighted, bool kQuantized, WireFormat kFormat,
          typename Group>
__device__ __forceinline__ void SumTokens(const Combine& op, const Group& group, EvenItems& tokens,
                                          int end, int32_t* taken,
                                          typename SumOfToken<kQuantized, false>::Terms* terms) {
  using Sum = SumOfToken<kQuantized, false>;
  const CombineParams& params = op.params;
  const RowShape<kWhole> shape{params.route.row_size};
  const int lane = threadIdx.x % 32, num_topk = op.frame.shape.num_topk;
  ForWarpItems(
      tokens, end,
      [&](int at) {
        const bool inside = at < end && lane < num_topk;
        return inside ? params.destination[int64_t{at} * num_topk + lane] : kNone;
      },
      [&](int at, int32_t destination) {
        return InputsOf<kQuantized>(op, group, op.frame.rank, at, destination, taken);
      },
      [&](int at, const Inputs& inputs) {
        if (params.gradients != nullptr && lane < num_topk) {
          params.gradients[int64_t{at} * num_topk + lane] = inputs.gradient;
        }
        char* to = static_cast<char*>(params.out) + at * op.row_bytes;
        AddUp<Type, kWhole, kWeighted, Sum, kQuantized, kFormat>(
            inputs, shape, {0, shape.num_groups()}, terms, op.wire,
            StoreRounded<Type, kWhole>{to, shape});
      });
}

template <typename Group, typename Type, bool kWhole, bool kWeighted, bool kQuantized,
          WireFormat kFormat>
__global__ void __launch_bounds__(kThreads, 1) CombineKernel(const __grid_constant__ Combine op) {
  __shared__ typename Group::Shared shared;
  __shared__ int32_t taken[kMaxRanks];
  __shared__ typename SumOfToken<kQuantized, Group::kSeveralNodes>::Terms of_warps[kWarps];
  auto* terms = &of_warps[threadIdx.x / 32];
  const CombineParams& params = op.params;
  Group group(op.frame, &shared);
  for (int rank = threadIdx.x; rank < kMaxRanks; rank += kThreads) taken[rank] = 0;
  const bool encodes_rows = kQuantized && params.route.layout == Layout::kTokenMajor;

  if (group.Begin()) {
    if (encodes_rows) {  // every received row is the sum of a pair
      EncodeRows<Type, kWhole, kFormat>(
          op.wire, params.y, op.row_bytes, params.group_sizes[0], params.sums, [&](int row) {
            const int32_t source = params.source[row];
            return source >= 0 &&
                   !SumsFor<Group::kSeveralNodes>(op, op.max_tokens.Quotient(source));
          });
    }
    if constexpr (Group::kSeveralNodes) {
      if (!encodes_rows && op.of_sums.num_rows > 0) {
        EvenItems pairs;
        SumPairs<Type, kWhole, kWeighted, kQuantized, kFormat, true>(
            op, terms, pairs, params.pairs[0], [](int item) { return item; });
      }
      group.Publish();
      PutDestinations(op, group);
      if (group.WaitForArrivals()) {
        SumNodes<Type, kWhole, kWeighted, kQuantized, kFormat>(op, group, taken, terms);
        group.CountTaken(taken);
      }
    } else {
      __shared__ PairsOfParts of_parts;
      const int num_parts = op.frame.parts.count;
      const bool sums_pairs = params.sums_pairs();
      if (sums_pairs) of_parts.Find(op);
      EvenItems pairs, tokens;  // SharedItems gained nothing
      // Sums are one part ahead of what is waited for, for who waits for them.
      for (int part = -1; part < num_parts; ++part) {
        if (const int next = part + 1; sums_pairs && next < num_parts) {
          SumPairs<Type, kWhole, kWeighted, kQuantized, kFormat, false>(
              op, terms, pairs, of_parts.before[next + 1],
              [&](int at) { return of_parts.PairOf(op, next, at); });
          group.SignalPart(next);
        }
        if (part < 0) {
          group.Publish();
          if (!group.WaitForArrivals()) break;
          continue;
        }
        const int end =
            part + 1 < num_parts ? op.frame.parts.First(part + 1) : params.route.num_tokens;
        if (tokens.item() >= end) continue;
        if (part > 0 && !group.WaitForPart(part)) break;
        SumTokens<Type, kWhole, kWeighted, kQuantized, kFormat>(op, group, tokens, end, taken,
                                                                terms);
      }
      group.CountTaken(taken);
    }
  }
  group.Finish([] {}, [&] { WriteFailure(params, op.frame.shape); });
}

// The host's side, of a mode whose kernels use `Group`.
template <typename Group>
class CombineKernels {
 public:
  static const char* Launch(const OpFrame& frame, const CombineParams& params, int num_blocks,
                            const DeviceFacts& device, const KernelStream& stream) {
    const RowFormat rows = params.route.rows();
    Combine op{frame,
               params,
               rows.bytes(),
               WireRow{rows.wire, rows.size},
               CombineSums(frame.shape, params.route),
               Divisor(frame.shape.max_tokens),
               Divisor(params.route.capacity)};
    if (!rows.is_quantized()) op.frame.offsets[kRows] = device.OffsetOf(params.y);
    if (!rows.is_quantized() && params.weights != nullptr)
      op.frame.offsets[kWeights] = device.OffsetOf(params.weights);
    if (params.sums != nullptr) op.frame.offsets[kSums] = device.OffsetOf(params.sums);
    if (params.row_gradients != nullptr) {
      op.frame.offsets[kGradients] = device.OffsetOf(params.row_gradients);
    }
    // Not sums that are encoded: fp8 took 13 % longer in parts on two H200, and twice as long with
    // both ranks on one, presumably because instruction caches do not hold the code of summing and
    // encoding beside that of decoding.
    if (!Group::kSeveralNodes && params.sums_pairs() && !rows.is_quantized()) {
      op.frame.parts = TokenParts::Of(params.route.num_tokens, frame.least_part_tokens);
    }
    const Kernel kernel = KernelFor(rows, params.weights != nullptr);
    if (kernel == nullptr) return "y: expected floats, got integers, which are not summed";
    return LaunchKernel(kernel, op, num_blocks, kThreads, 0, stream);
  }

  static const char* Load() {
    for (const bool weighted : {false, true}) {
      const auto kernel_for = [=](const RowFormat& rows) { return KernelFor(rows, weighted); };
      if (const char* error = LoadKernels(kernel_for, 0)) return error;
    }
    return nullptr;
  }

 private:
  using Kernel = void (*)(Combine);

  template <bool kWeighted>
  struct Plain {
    template <typename Type, bool kWhole>
    static Kernel Of() {
      return CombineKernel<Group, Type, kWhole, kWeighted, false, WireFormat::kNone>;
    }
  };
  template <WireFormat kFormat>
  struct OnWire {
    template <typename Type, bool kWhole>
    static Kernel Of() {
      return CombineKernel<Group, Type, kWhole, true, true, kFormat>;
    }
  };

  static Kernel KernelFor(const RowFormat& rows, bool weighted) {
    // Without weights they are 1, which changes no bit: kernels of their own would gain little.
    if (rows.is_quantized()) {
      return WireInstanceFor<OnWire, false, WireFormat::kFp8, WireFormat::kFp8E8m0,
                             WireFormat::kMxfp8>(rows);
    }
    return weighted ? InstanceFor<Plain<true>>(rows) : InstanceFor<Plain<false>>(rows);
  }
};

}  // namespace
}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_INTRANODE_COMBINE_CUH_
