// combine inside a node: the rank of the experts sums a token's rows first, so that one row crosses
// the link per (token, rank); the rank of the token pulls these and sums them in ascending order.
//
// 1. Sum: for every pair of this rank with several rows, p = sum of w * y, rounded once. With a
// wire
//    format, for every pair of another rank, encoded.
// 2. Publish; wait for everyone.
// 3. Pull: for every token of this rank, bias + p_0 + p_1 + ...; a pair with one row that is not
//    encoded needs no sum: its row is read and weighted in place.
#include <cuda_runtime.h>

#include "cuda/divisor.h"
#include "cuda/group_op.cuh"
#include "cuda/intranode/throughput.h"
#include "cuda/kernel_choice.cuh"
#include "cuda/kernel_launch.h"
#include "cuda/op_frame.h"
#include "cuda/row_copies.cuh"
#include "cuda/row_sums.cuh"
#include "cuda/row_values.cuh"
#include "cuda/warp_items.cuh"
#include "interface/combine.h"

namespace jax_deepep {
namespace {

// Operands that peers read.
enum { kRows, kWeights, kSums, kGradients };

struct Combine {
  OpFrame frame;
  CombineParams params;
  int64_t row_bytes;
  WireRow wire;
  CombineSums of_sums;
  Divisor max_tokens, capacity;
};

// The offset of a token's sum in the scratch of the rank of its experts.
__device__ int64_t SumOffset(const Combine& op, int rank, int token) {
  return (int64_t{rank} * op.params.route.num_tokens + token) * op.of_sums.row_bytes;
}
// The sum of a token that stays on this rank.
__device__ char* OwnSum(const Combine& op, int token) {
  const CombineSums& of_sums = op.of_sums;
  char* sums = static_cast<char*>(op.params.sums);
  if (of_sums.num_own == 0) return sums + SumOffset(op, op.frame.rank, token);
  return sums + of_sums.num_rows * of_sums.row_bytes + token * of_sums.own_bytes;
}

// Step 1.
template <typename Type, bool kWhole, bool kWeighted, bool kQuantized, WireFormat kFormat>
__device__ void SumPairs(const Combine& op, Term* terms) {
  struct Line {
    int32_t source, row;
  };
  struct Pair {
    int32_t source;
    Inputs inputs;
  };
  const CombineParams& params = op.params;
  const RowShape<kWhole> shape{params.route.row_size};
  const PairTable table(op.frame.shape, params.route);
  const int lane = threadIdx.x % 32, num_pairs = params.pairs[0];
  ForWarpItems(
      num_pairs,
      [&](int pair) {
        if (pair >= num_pairs) return Line{kNone, kNone};
        const int32_t* line = params.pairs + int64_t{1 + pair} * table.line_ints();
        return Line{line[0], lane < table.max_rows ? line[1 + lane] : kNone};
      },
      [&](int, const Line& line) {
        Pair pair{line.source, {}};
        pair.inputs.count = __popc(__ballot_sync(~0u, line.row != kNone));
        if (line.row == kNone) return pair;
        pair.inputs.position = lane;
        pair.inputs.row = static_cast<const char*>(params.y) + line.row * op.row_bytes;
        if (kWeighted && params.weights != nullptr) pair.inputs.weight = params.weights[line.row];
        return pair;
      },
      [&](int, const Pair& pair) {
        if (pair.inputs.count < (kQuantized ? 1 : 2)) return;
        const int rank = op.max_tokens.Quotient(pair.source);
        const int token = op.max_tokens.Remainder(pair.source);
        const GroupRange all = {0, shape.num_groups()};
        char* to = static_cast<char*>(params.sums) + SumOffset(op, rank, token);
        if (kQuantized && rank != op.frame.rank) {
          AddUp<Type, kWhole, kWeighted, SumOfProducts, false>(
              pair.inputs, shape, all, terms, op.wire, StoreEncoded<kWhole, kFormat>{to, op.wire});
          return;
        }
        if (kQuantized) {
          if (pair.inputs.count < 2) return;
          to = OwnSum(op, token);
        }
        AddUp<Type, kWhole, kWeighted, SumOfProducts, false>(
            pair.inputs, shape, all, terms, op.wire, StoreRounded<Type, kWhole>{to, shape});
      });
}

// The inputs of a token's sum: the bias, and a row of every rank that has one, ranks
// ascending. `destination` is that of the lane's entry.
template <bool kQuantized>
__device__ Inputs InputsOf(const Combine& op, const GroupOp& group, int token, int32_t destination,
                           int32_t* taken) {
  const CombineParams& params = op.params;
  const GroupShape& shape = op.frame.shape;
  const int lane = threadIdx.x % 32;
  const bool expert_major = params.route.layout == Layout::kExpertMajor;
  const bool somewhere = destination != kNone;
  const int rank = somewhere ? op.capacity.Quotient(destination) : shape.num_ranks + lane;
  const int64_t row = somewhere ? op.capacity.Remainder(destination) : 0;
  const uint32_t same = __match_any_sync(~0u, rank);
  const bool leads = somewhere && __ffs(same) - 1 == lane;
  Inputs inputs;
  if (params.gradients != nullptr && somewhere) {
    const int64_t at = expert_major ? row : row * shape.num_topk + lane;
    inputs.gradient = group.Operand<float>(rank, kGradients)[at];
  }
  if (params.bias != nullptr && token < params.route.num_tokens) {
    inputs.first = static_cast<const char*>(params.bias) + token * op.row_bytes;
    inputs.count = 1;
  }
  int position = inputs.count;
  for (int base = 0; base < shape.num_ranks; base += 32) {
    const uint32_t ranks = RanksOfLanes(somewhere ? rank : kNone, base);  // that have rows
    const uint32_t below = rank >= base + 32 ? ~0u : rank > base ? (1u << (rank - base)) - 1 : 0u;
    position += __popc(ranks & below);
    inputs.count += __popc(ranks);
  }
  if (leads) {
    inputs.position = position;
    atomicAdd(&taken[rank], 1);
    if (kQuantized && rank != op.frame.rank) {
      inputs.encoded = true;
      inputs.row =
          group.Operand<char>(rank, kSums) +
          (expert_major ? SumOffset(op, op.frame.rank, token) : row * op.of_sums.row_bytes);
    } else if (kQuantized) {  // its arrays need not be where peers can read them
      const bool summed = expert_major && __popc(same) > 1;
      inputs.row =
          summed ? OwnSum(op, token) : static_cast<const char*>(params.y) + row * op.row_bytes;
      if (!summed && params.weights != nullptr) inputs.weight = params.weights[row];
    } else if (expert_major && __popc(same) > 1) {  // summed in step 1
      inputs.row = group.Operand<char>(rank, kSums) + SumOffset(op, op.frame.rank, token);
    } else {
      inputs.row = group.Operand<char>(rank, kRows) + row * op.row_bytes;
      if (params.weights != nullptr) inputs.weight = group.Operand<float>(rank, kWeights)[row];
    }
  }
  return inputs;
}

// Step 3.
template <typename Type, bool kWhole, bool kWeighted, bool kQuantized, WireFormat kFormat>
__device__ void SumTokens(const Combine& op, const GroupOp& group, int32_t* taken, Term* terms) {
  const CombineParams& params = op.params;
  const RowShape<kWhole> shape{params.route.row_size};
  const int lane = threadIdx.x % 32;
  const int num_tokens = params.route.num_tokens, num_topk = op.frame.shape.num_topk;
  ForWarpItems(
      num_tokens,
      [&](int token) {
        const bool inside = token < num_tokens && lane < num_topk;
        return inside ? params.destination[int64_t{token} * num_topk + lane] : kNone;
      },
      [&](int token, int32_t destination) {
        return InputsOf<kQuantized>(op, group, token, destination, taken);
      },
      [&](int token, const Inputs& inputs) {
        if (params.gradients != nullptr && lane < num_topk) {
          params.gradients[int64_t{token} * num_topk + lane] = inputs.gradient;
        }
        char* to = static_cast<char*>(params.out) + token * op.row_bytes;
        AddUp<Type, kWhole, kWeighted, SumOfRows, kQuantized, kFormat>(
            inputs, shape, {0, shape.num_groups()}, terms, op.wire,
            StoreRounded<Type, kWhole>{to, shape});
      });
}

template <typename Type, bool kWhole, bool kWeighted, bool kQuantized, WireFormat kFormat>
__global__ void __launch_bounds__(kThreads, 1) CombineKernel(const __grid_constant__ Combine op) {
  __shared__ GroupOp::Shared shared;
  __shared__ int32_t taken[kMaxRanks];
  __shared__ Term of_warps[kWarps][kMaxTerms];
  Term* terms = of_warps[threadIdx.x / 32];
  const CombineParams& params = op.params;
  GroupOp group(op.frame, &shared);
  for (int rank = threadIdx.x; rank < kMaxRanks; rank += kThreads) taken[rank] = 0;

  if (group.Begin()) {
    if (kQuantized && params.route.layout == Layout::kTokenMajor) {
      // Every received row is the sum of a pair.
      EncodeRows<Type, kWhole, kFormat>(op.wire, params.y, op.row_bytes, params.group_sizes[0],
                                        params.sums);
    } else if (params.sums != nullptr) {
      SumPairs<Type, kWhole, kWeighted, kQuantized, kFormat>(op, terms);
    }
    group.Publish();
    if (group.WaitForArrivals()) {
      SumTokens<Type, kWhole, kWeighted, kQuantized, kFormat>(op, group, taken, terms);
      group.CountTaken(taken);
    }
  }
  group.Finish([] {}, [&] { WriteFailure(params, op.frame.shape); });
}

using Kernel = void (*)(Combine);

template <bool kWeighted>
struct Kernels {
  template <typename Type, bool kWhole>
  static Kernel Of() {
    return CombineKernel<Type, kWhole, kWeighted, false, WireFormat::kNone>;
  }
};
template <WireFormat kFormat>
struct KernelsOnWire {
  template <typename Type, bool kWhole>
  static Kernel Of() {
    return CombineKernel<Type, kWhole, true, true, kFormat>;
  }
};

Kernel KernelFor(const RowFormat& rows, bool weighted) {
  // Without weights they are 1, which changes no bit: kernels of their own would gain little.
  if (rows.is_quantized()) {
    return WireInstanceFor<KernelsOnWire, false, WireFormat::kFp8, WireFormat::kFp8E8m0,
                           WireFormat::kMxfp8>(rows);
  }
  return weighted ? InstanceFor<Kernels<true>>(rows) : InstanceFor<Kernels<false>>(rows);
}

}  // namespace

template <>
const char* VerbKernels<Throughput, CombineParams>::Launch(const OpFrame& frame,
                                                           const CombineParams& params,
                                                           int num_blocks,
                                                           const DeviceFacts& device,
                                                           const KernelStream& stream) {
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
  const Kernel kernel = KernelFor(rows, params.weights != nullptr);
  if (kernel == nullptr) return "y: expected floats, got integers, which are not summed";
  return LaunchKernel(kernel, op, num_blocks, kThreads, 0, stream);
}

template <>
const char* VerbKernels<Throughput, CombineParams>::Load(int /*max_shared_bytes*/) {
  for (const bool weighted : {false, true}) {
    const auto kernel_for = [=](const RowFormat& rows) { return KernelFor(rows, weighted); };
    if (const char* error = LoadKernels(kernel_for, 0)) return error;
  }
  return nullptr;
}

}  // namespace jax_deepep
