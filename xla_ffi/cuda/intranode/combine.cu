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
#include "cuda/row_stream.cuh"
#include "cuda/row_values.cuh"
#include "interface/combine.h"

namespace jax_deepep {
namespace {

// Operands that peers read.
enum { kRows, kWeights, kSums, kGradients };

struct Combine {
  OpFrame frame;
  CombineParams params;
  StreamShape stream;
  int64_t row_bytes;
};

// What a task adds up, chunk by chunk, in the order of its inputs, and writes.
template <typename Type>
struct RowSum {
  float values[kGroupsPerLane][kGroup];

  template <typename Term>
  __device__ __forceinline__ void Add(const char* run, int size, bool whole, bool first, Term term) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kGroupsPerLane; ++i) {
      float row[kGroup];
      ReadGroup<Type>(run, i * 32 + lane, size, whole, row);
#pragma unroll
      for (int e = 0; e < kGroup; ++e) {
        const float value = term(row[e]);
        values[i][e] = first ? value : __fadd_rn(values[i][e], value);
      }
    }
  }

  __device__ __forceinline__ void Write(char* run, int size, bool whole) const {
#pragma unroll
    for (int i = 0; i < kGroupsPerLane; ++i) {
      WriteGroup<Type>(run, i * 32 + threadIdx.x % 32, size, whole, values[i]);
    }
  }
};

template <typename Type>
__device__ int64_t ChunkOffset(int chunk) {
  return int64_t{chunk} * kChunk * sizeof(typename Type::Storage);
}

// Step 1.
template <typename Type, bool kBulk>
__device__ void SumPairs(const Combine& op, RowStream<Type, kBulk>& stream, int first, int stride) {
  const CombineParams& params = op.params;
  const PairTable table(op.frame.shape, params.route);
  const int lane = threadIdx.x % 32;
  auto prepare = [&](int pair, const TaskView& task) {
    const int32_t* line = params.pairs + int64_t{1 + pair} * table.line_ints();
    const int32_t row = lane < table.max_rows ? line[1 + lane] : kNone;
    const int num_rows = __popc(__ballot_sync(~0u, row != kNone));
    if (row != kNone) {
      task.inputs[lane] = static_cast<const char*>(params.y) + row * op.row_bytes;
      task.weights[lane] = params.weights == nullptr ? 1.0f : params.weights[row];
    }
    if (lane == 0) {
      *task.id = line[0];
      *task.num_inputs = num_rows > 1 ? num_rows : 0;
    }
  };
  auto consume = [&](const TaskView& task, auto next) {
    const int num_inputs = *task.num_inputs;
    if (num_inputs == 0) return;
    char* to = static_cast<char*>(params.sums) + *task.id * op.row_bytes;
    for (int chunk = 0; chunk < stream.num_chunks(); ++chunk) {
      const int size = stream.ChunkSize(chunk);
      RowSum<Type> sum;
      for (int input = 0; input < num_inputs; ++input) {
        const float weight = task.weights[input];
        next([&](const char* run) {
          sum.Add(run, size, stream.whole(), input == 0,
                  [weight](float value) { return __fmul_rn(value, weight); });
        });
      }
      sum.Write(to + ChunkOffset<Type>(chunk), size, stream.whole());
    }
  };
  stream.Run(first, params.pairs[0], stride, prepare, consume);
}

// Step 3.
template <typename Type, bool kBulk>
__device__ void SumTokens(const Combine& op, const GroupOp& group, RowStream<Type, kBulk>& stream,
                          int first, int stride, int32_t* taken) {
  const CombineParams& params = op.params;
  const GroupShape& shape = op.frame.shape;
  const int lane = threadIdx.x % 32, num_topk = shape.num_topk;
  const bool expert_major = params.route.layout == Layout::kExpertMajor;
  auto prepare = [&](int token, const TaskView& task) {
    const int32_t destination =
        lane < num_topk ? params.destination[int64_t{token} * num_topk + lane] : kNone;
    const bool somewhere = destination != kNone;
    const int rank = somewhere ? destination / params.route.capacity : shape.num_ranks + lane;
    const int64_t row = somewhere ? destination % params.route.capacity : 0;
    const uint32_t same = __match_any_sync(~0u, rank);
    const bool leads = somewhere && __ffs(same) - 1 == lane;
    // One input for each rank, ranks ascending.
    int order = 0;
    for (int k = 0; k < num_topk; ++k) {
      const int other = __shfl_sync(~0u, leads ? rank : shape.num_ranks, k);
      order += other < rank;
    }
    if (leads) {
      const bool summed = expert_major && __popc(same) > 1;
      const int64_t source = int64_t{op.frame.rank} * shape.max_tokens + token;
      task.inputs[order] = summed ? group.Operand<char>(rank, kSums) + source * op.row_bytes
                                  : group.Operand<char>(rank, kRows) + row * op.row_bytes;
      task.weights[order] = summed || params.weights == nullptr
                                ? 1.0f
                                : LoadFresh(group.Operand<float>(rank, kWeights) + row);
      atomicAdd(&taken[rank], 1);
    }
    if (params.gradients != nullptr && lane < num_topk) {
      const int64_t at = expert_major ? row : row * num_topk + lane;
      params.gradients[int64_t{token} * num_topk + lane] =
          somewhere ? LoadFresh(group.Operand<float>(rank, kGradients) + at) : 0.0f;
    }
    const int num_inputs = __popc(__ballot_sync(~0u, leads));
    if (lane == 0) {
      *task.id = token;
      *task.num_inputs = num_inputs;
    }
  };
  auto consume = [&](const TaskView& task, auto next) {
    const int num_inputs = *task.num_inputs;
    const int64_t row_offset = *task.id * op.row_bytes;
    for (int chunk = 0; chunk < stream.num_chunks(); ++chunk) {
      const int size = stream.ChunkSize(chunk);
      const int64_t offset = row_offset + ChunkOffset<Type>(chunk);
      RowSum<Type> sum{};
      if (params.bias != nullptr) {
        sum.Add(static_cast<const char*>(params.bias) + offset, size, stream.whole(), /*first=*/true,
                [](float value) { return value; });
      }
      for (int input = 0; input < num_inputs; ++input) {
        const float weight = task.weights[input];
        next([&](const char* run) {
          if (weight == 1.0f) {
            sum.Add(run, size, stream.whole(), false, [](float value) { return value; });
          } else {
            sum.Add(run, size, stream.whole(), false,
                    [weight](float value) { return Rounded<Type>(__fmul_rn(value, weight)); });
          }
        });
      }
      sum.Write(static_cast<char*>(params.out) + offset, size, stream.whole());
    }
  };
  stream.Run(first, params.route.num_tokens, stride, prepare, consume);
}

template <typename Type, bool kBulk>
__global__ void __launch_bounds__(kThreads, 1) CombineKernel(const __grid_constant__ Combine op) {
  extern __shared__ __align__(128) char memory[];
  __shared__ GroupOp::Shared shared;
  __shared__ int32_t taken[kMaxRanks];
  const CombineParams& params = op.params;
  GroupOp group(op.frame, &shared);
  for (int rank = threadIdx.x; rank < kMaxRanks; rank += kThreads) taken[rank] = 0;
  const int warp = threadIdx.x / 32;
  const bool works = warp < op.stream.warps;
  const int first = warp * gridDim.x + blockIdx.x, stride = gridDim.x * op.stream.warps;
  RowStream<Type, kBulk> stream(memory + min(warp, op.stream.warps - 1) * op.stream.BytesPerWarp(),
                                op.stream, op.frame.shape.hidden_size, works);

  group.Begin();
  if (works && params.sums != nullptr) SumPairs(op, stream, first, stride);
  group.Publish();
  if (group.WaitForArrivals()) {
    if (works) SumTokens(op, group, stream, first, stride, taken);
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

template <bool kBulk>
Kernel KernelFor(RowType type) {
  switch (type) {
    case RowType::kFloat32:
      return CombineKernel<Float32, kBulk>;
    case RowType::kFloat16:
      return CombineKernel<Float16, kBulk>;
    case RowType::kBFloat16:
      return CombineKernel<BFloat16, kBulk>;
  }
  return nullptr;
}

}  // namespace

const char* LaunchCombine(const OpFrame& frame, const CombineParams& params, int num_blocks,
                          const DeviceFacts& device, cudaStream_t stream) {
  const GroupShape& shape = frame.shape;
  Combine op{frame, params, {}, 0};
  op.row_bytes = static_cast<int64_t>(shape.hidden_size) * BytesOf(params.route.row_type);
  op.frame.offsets[kRows] = device.OffsetOf(params.y);
  if (params.weights != nullptr) op.frame.offsets[kWeights] = device.OffsetOf(params.weights);
  if (params.sums != nullptr) op.frame.offsets[kSums] = device.OffsetOf(params.sums);
  if (params.row_gradients != nullptr) {
    op.frame.offsets[kGradients] = device.OffsetOf(params.row_gradients);
  }
  op.stream = StreamShapeOf(shape, params.route, shape.num_topk, device);
  const Kernel kernel = op.stream.bulk ? KernelFor<true>(params.route.row_type)
                                       : KernelFor<false>(params.route.row_type);
  return LaunchKernel(kernel, op, num_blocks, op.stream.warps * op.stream.BytesPerWarp(), stream);
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
