// combine inside a node: the rank of the experts sums a token's rows first, so that one row crosses
// the link per (token, rank); the rank of the token pulls these and sums them in ascending order.
//
// 1. Sum: for every pair of this rank with several rows, p = sum of w * y, rounded once.
// 2. Publish; wait for everyone.
// 3. Pull: for every token of this rank, bias + p_0 + p_1 + ...; a pair with one row needs no sum,
//    and its row is read, and weighted, in place.
#include <cuda_runtime.h>

#include "cuda/group_op.cuh"
#include "cuda/intranode/launch.h"
#include "cuda/op_frame.h"
#include "cuda/row_values.cuh"
#include "interface/combine.h"

namespace jax_deepep {
namespace {

// Operands that peers read.
enum { kRows, kWeights, kSums, kGradients };

struct Combine {
  OpFrame frame;
  CombineParams params;
  int64_t row_bytes;
};

// The inputs of a sum: lane i has the i-th one.
struct Inputs {
  int count;
  const char* row;
  float weight;
};

// Add up rows in the order of the inputs. A lane has four loads of 16 bytes in flight: two rows, and two
// groups of each (one of float32). init(group, sum) begins a sum, or the first term does if there is
// none; write(group, sum) ends it.
template <typename Type, bool kWhole, typename Init, typename Term, typename Write>
__device__ __forceinline__ void AddRows(RowShape<kWhole> row, const Inputs& inputs, Init init,
                                        Term term, Write write) {
  using Element = typename Type::Element;
  constexpr int kRows = 2, kColumns = 2 / Packed<Element>::kWords;
  const int lane = threadIdx.x % 32;
  for (int base = lane; base - lane < row.num_groups(); base += 32 * kColumns) {
    float sums[kColumns][kGroup];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (base + c * 32 < row.num_groups()) init(base + c * 32, sums[c]);
    }
    for (int first = 0; first < inputs.count; first += kRows) {
      Packed<Element> groups[kRows][kColumns];
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const auto from = reinterpret_cast<const char*>(
            __shfl_sync(~0u, reinterpret_cast<uint64_t>(inputs.row), first + j));
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int group = base + c * 32;
          if (first + j < inputs.count && group < row.num_groups()) {
            groups[j][c] = LoadGroup<Element>(from, group, row);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const float weight = __shfl_sync(~0u, inputs.weight, first + j);
        if (first + j >= inputs.count) continue;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          float values[kGroup];
          Type::Unpack(groups[j][c], values);
#pragma unroll
          for (int e = 0; e < kGroup; ++e) term(sums[c][e], values[e], weight, first + j == 0);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (base + c * 32 < row.num_groups()) write(base + c * 32, sums[c]);
    }
  }
}

// The first item of this warp; the next one is a stride further.
__device__ int FirstItem() { return threadIdx.x / 32 * gridDim.x + blockIdx.x; }
__device__ int ItemStride() { return gridDim.x * kWarps; }

// Step 1.
template <typename Type, bool kWhole>
__device__ void SumPairs(const Combine& op, RowShape<kWhole> row_shape) {
  const CombineParams& params = op.params;
  const PairTable table(op.frame.shape, params.route);
  const int lane = threadIdx.x % 32, num_pairs = params.pairs[0];
  for (int pair = FirstItem(); pair < num_pairs; pair += ItemStride()) {
    const int32_t* line = params.pairs + int64_t{1 + pair} * table.line_ints();
    const int32_t row = lane < table.max_rows ? line[1 + lane] : kNone;
    Inputs inputs;
    inputs.count = __popc(__ballot_sync(~0u, row != kNone));
    if (inputs.count < 2) continue;
    inputs.row = static_cast<const char*>(params.y) + row * op.row_bytes;
    inputs.weight = row == kNone || params.weights == nullptr ? 1.0f : params.weights[row];
    char* to = static_cast<char*>(params.sums) + line[0] * op.row_bytes;
    AddRows<Type>(
        row_shape, inputs, [](int, float*) {},
        [](float& sum, float value, float weight, bool first) {
          const float product = __fmul_rn(value, weight);
          sum = first ? product : __fadd_rn(sum, product);
        },
        [&](int group, const float* sum) { StoreGroup(to, group, row_shape, Type::Pack(sum)); });
  }
}

// What a token of this rank adds up: a row of every rank that has one, ranks ascending.
__device__ Inputs InputsOf(const Combine& op, const GroupOp& group, int token, int32_t* taken) {
  const CombineParams& params = op.params;
  const GroupShape& shape = op.frame.shape;
  const int lane = threadIdx.x % 32, num_topk = shape.num_topk;
  const bool expert_major = params.route.layout == Layout::kExpertMajor;
  const int32_t destination =
      lane < num_topk ? params.destination[int64_t{token} * num_topk + lane] : kNone;
  const bool somewhere = destination != kNone;
  const int rank = somewhere ? destination / params.route.capacity : shape.num_ranks + lane;
  const int64_t row = somewhere ? destination % params.route.capacity : 0;
  const uint32_t same = __match_any_sync(~0u, rank);
  const bool leads = somewhere && __ffs(same) - 1 == lane;
  if (params.gradients != nullptr && lane < num_topk) {
    const int64_t at = expert_major ? row : row * num_topk + lane;
    params.gradients[int64_t{token} * num_topk + lane] =
        somewhere ? group.Operand<float>(rank, kGradients)[at] : 0.0f;
  }
  const char* from = nullptr;
  float weight = 1.0f;
  if (leads) {
    atomicAdd(&taken[rank], 1);
    if (expert_major && __popc(same) > 1) {  // summed in step 1
      const int64_t source = int64_t{op.frame.rank} * shape.max_tokens + token;
      from = group.Operand<char>(rank, kSums) + source * op.row_bytes;
    } else {
      from = group.Operand<char>(rank, kRows) + row * op.row_bytes;
      if (params.weights != nullptr) weight = group.Operand<float>(rank, kWeights)[row];
    }
  }
  // Lane i takes the i-th rank in ascending order.
  Inputs inputs{__popc(__ballot_sync(~0u, leads)), nullptr, 1.0f};
  int order = 0;
  for (int k = 0; k < num_topk; ++k) {
    order += __shfl_sync(~0u, leads ? rank : shape.num_ranks, k) < rank;
  }
  for (int k = 0; k < num_topk; ++k) {
    const bool k_leads = __shfl_sync(~0u, leads, k);
    const int k_order = __shfl_sync(~0u, order, k);
    const auto k_from = __shfl_sync(~0u, reinterpret_cast<uint64_t>(from), k);
    const float k_weight = __shfl_sync(~0u, weight, k);
    if (k_leads && k_order == lane) {
      inputs.row = reinterpret_cast<const char*>(k_from);
      inputs.weight = k_weight;
    }
  }
  return inputs;
}

// Step 3.
template <typename Type, bool kWhole>
__device__ void SumTokens(const Combine& op, const GroupOp& group, RowShape<kWhole> row_shape,
                          int32_t* taken) {
  using Element = typename Type::Element;
  const CombineParams& params = op.params;
  for (int token = FirstItem(); token < params.route.num_tokens; token += ItemStride()) {
    const Inputs inputs = InputsOf(op, group, token, taken);
    const char* bias =
        params.bias == nullptr ? nullptr : static_cast<const char*>(params.bias) + token * op.row_bytes;
    char* to = static_cast<char*>(params.out) + token * op.row_bytes;
    AddRows<Type>(
        row_shape, inputs,
        [&](int at, float* sum) {
          Type::Unpack(bias == nullptr ? Packed<Element>{} : LoadGroup<Element>(bias, at, row_shape), sum);
        },
        [](float& sum, float value, float weight, bool) {
          // A weight of 1 changes nothing, also where it stands for none.
          sum = __fadd_rn(sum, weight == 1.0f ? value : Type::Rounded(__fmul_rn(value, weight)));
        },
        [&](int at, const float* sum) { StoreGroup(to, at, row_shape, Type::Pack(sum)); });
  }
}

template <typename Type, bool kWhole>
__global__ void __launch_bounds__(kThreads, 1) CombineKernel(const __grid_constant__ Combine op) {
  __shared__ GroupOp::Shared shared;
  __shared__ int32_t taken[kMaxRanks];
  const CombineParams& params = op.params;
  GroupOp group(op.frame, &shared);
  for (int rank = threadIdx.x; rank < kMaxRanks; rank += kThreads) taken[rank] = 0;

  group.Begin();
  const RowShape<kWhole> row{op.frame.shape.hidden_size};
  if (params.sums != nullptr) SumPairs<Type>(op, row);
  group.Publish();
  if (group.WaitForArrivals()) {
    SumTokens<Type>(op, group, row, taken);
    group.CountTaken(taken);
  }
  group.Finish([] {},
               [&] {
                 const int64_t num_tokens = params.route.num_tokens;
                 FillRowsWithNaN(params.route.row_type, params.out,
                                 num_tokens * op.frame.shape.hidden_size);
                 if (params.gradients != nullptr) {
                   FillRowsWithNaN(RowType::kFloat32, params.gradients,
                                   num_tokens * op.frame.shape.num_topk);
                 }
               });
}

using Kernel = void (*)(Combine);

template <bool kWhole>
Kernel KernelFor(RowType type) {
  switch (type) {
    case RowType::kFloat32:
      return CombineKernel<Float32, kWhole>;
    case RowType::kFloat16:
      return CombineKernel<Float16, kWhole>;
    case RowType::kBFloat16:
      return CombineKernel<BFloat16, kWhole>;
  }
  return nullptr;
}

}  // namespace

const char* LaunchCombine(const OpFrame& frame, const CombineParams& params, int num_blocks,
                          const DeviceFacts& device, cudaStream_t stream) {
  const int size = frame.shape.hidden_size;
  Combine op{frame, params, static_cast<int64_t>(size * BytesOf(params.route.row_type))};
  op.frame.offsets[kRows] = device.OffsetOf(params.y);
  if (params.weights != nullptr) op.frame.offsets[kWeights] = device.OffsetOf(params.weights);
  if (params.sums != nullptr) op.frame.offsets[kSums] = device.OffsetOf(params.sums);
  if (params.row_gradients != nullptr) {
    op.frame.offsets[kGradients] = device.OffsetOf(params.row_gradients);
  }
  const RowType type = params.route.row_type;
  const Kernel kernel = IsWhole(size) ? KernelFor<true>(type) : KernelFor<false>(type);
  return LaunchKernel(kernel, op, num_blocks, kThreads, 0, stream);
}

const char* LoadCombineKernels(int max_shared_bytes) {
  for (const RowType type : {RowType::kFloat32, RowType::kFloat16, RowType::kBFloat16}) {
    for (const Kernel kernel : {KernelFor<true>(type), KernelFor<false>(type)}) {
      if (const char* error = LoadKernel(kernel, max_shared_bytes)) return error;
    }
  }
  return nullptr;
}

}  // namespace jax_deepep
