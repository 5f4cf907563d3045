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
#include "cuda/word_queue.cuh"
#include "interface/combine.h"

namespace jax_deepep {
namespace {

// Operands that peers read.
enum { kRows, kWeights, kSums, kGradients };

// Words of 16 bytes that a thread has in flight: 128 KiB of a block, more than SM86 and SM89 have.
using Queue = WordQueue<8>;

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

// Add up rows in the order of the inputs, by a warp. begin(at, sum) begins the sum of the elements
// at `at`, or the first term does if there is none; term(sum, value, weight, first) adds one;
// end(at, sum) stores it. Rows of whole words go 16 bytes at a time, through the queue; others by
// elements.
template <typename Type, bool kWhole, typename Begin, typename Term, typename End>
__device__ __forceinline__ void AddRows(Queue& queue, int size, const Inputs& inputs, Begin begin,
                                        Term term, End end) {
  const int lane = threadIdx.x % 32;
  if constexpr (kWhole) {
    constexpr int kPerWord = Type::kPerWord;
    const int num_words = size / kPerWord, rounds = (num_words + 31) / 32;
    float sum[kPerWord];
    if (inputs.count == 0) {
      for (int word = lane; word < num_words; word += 32) {
        begin(word * kPerWord, sum);
        end(word * kPerWord, sum);
      }
      return;
    }
    int next_input = 0, next_word = lane;  // to be loaded
    int input = 0, word = lane;            // to be added
    queue.Run(
        rounds * inputs.count,
        [&](int) {
          const auto* row = reinterpret_cast<const uint4*>(
              __shfl_sync(~0u, reinterpret_cast<uint64_t>(inputs.row), next_input));
          const uint4* from = next_word < num_words ? row + next_word : nullptr;
          if (++next_input == inputs.count) next_input = 0, next_word += 32;
          return from;
        },
        [&](int, uint4 bits) {
          const float weight = __shfl_sync(~0u, inputs.weight, input);
          if (word < num_words) {
            if (input == 0) begin(word * kPerWord, sum);
            float values[kPerWord];
            Type::UnpackWord(bits, values);
#pragma unroll
            for (int i = 0; i < kPerWord; ++i) term(sum[i], values[i], weight, input == 0);
            if (input == inputs.count - 1) end(word * kPerWord, sum);
          }
          if (++input == inputs.count) input = 0, word += 32;
        });
  } else {
    for (int base = 0; base < size; base += 32) {
      const int at = base + lane;
      float sum[1];
      if (at < size) begin(at, sum);
      for (int input = 0; input < inputs.count; ++input) {
        const auto* row = reinterpret_cast<const typename Type::Element*>(
            __shfl_sync(~0u, reinterpret_cast<uint64_t>(inputs.row), input));
        const float weight = __shfl_sync(~0u, inputs.weight, input);
        if (at < size) term(sum[0], Type::Load(row[at]), weight, input == 0);
      }
      if (at < size) end(at, sum);
    }
  }
}

// The elements of one sum in memory: a word, or an element.
template <typename Type, bool kWhole>
__device__ __forceinline__ void LoadSum(const char* row, int at, float* sum) {
  const auto* from = reinterpret_cast<const typename Type::Element*>(row) + at;
  if constexpr (kWhole) {
    Type::UnpackWord(LoadOnce(reinterpret_cast<const uint4*>(from)), sum);
  } else {
    sum[0] = Type::Load(*from);
  }
}

template <typename Type, bool kWhole>
__device__ __forceinline__ void StoreSum(char* row, int at, const float* sum) {
  auto* to = reinterpret_cast<typename Type::Element*>(row) + at;
  if constexpr (kWhole) {
    *reinterpret_cast<uint4*>(to) = Type::PackWord(sum);
  } else {
    *to = Type::Store(sum[0]);
  }
}

// The first item of this warp; the next one is a stride further.
__device__ int FirstItem() { return threadIdx.x / 32 * gridDim.x + blockIdx.x; }
__device__ int ItemStride() { return gridDim.x * kWarps; }

// Step 1.
template <typename Type, bool kWhole>
__device__ void SumPairs(const Combine& op, Queue& queue) {
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
    AddRows<Type, kWhole>(
        queue, op.frame.shape.hidden_size, inputs, [](int, float*) {},
        [](float& sum, float value, float weight, bool first) {
          const float product = __fmul_rn(value, weight);
          sum = first ? product : __fadd_rn(sum, product);
        },
        [to](int at, const float* sum) { StoreSum<Type, kWhole>(to, at, sum); });
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
__device__ void SumTokens(const Combine& op, const GroupOp& group, Queue& queue, int32_t* taken) {
  const CombineParams& params = op.params;
  for (int token = FirstItem(); token < params.route.num_tokens; token += ItemStride()) {
    const Inputs inputs = InputsOf(op, group, token, taken);
    const char* bias = params.bias == nullptr
                           ? nullptr
                           : static_cast<const char*>(params.bias) + token * op.row_bytes;
    char* to = static_cast<char*>(params.out) + token * op.row_bytes;
    AddRows<Type, kWhole>(
        queue, op.frame.shape.hidden_size, inputs,
        [bias](int at, float* sum) {
          if (bias != nullptr) {
            LoadSum<Type, kWhole>(bias, at, sum);
          } else {
            for (int i = 0; i < (kWhole ? Type::kPerWord : 1); ++i) sum[i] = 0.0f;
          }
        },
        [](float& sum, float value, float weight, bool) {
          // A weight of 1 changes nothing, also where it stands for none.
          sum = __fadd_rn(
              sum, weight == 1.0f ? value : Type::Load(Type::Store(__fmul_rn(value, weight))));
        },
        [to](int at, const float* sum) { StoreSum<Type, kWhole>(to, at, sum); });
  }
}

template <typename Type, bool kWhole>
__global__ void __launch_bounds__(kThreads, 1) CombineKernel(const __grid_constant__ Combine op) {
  extern __shared__ __align__(16) char memory[];
  __shared__ GroupOp::Shared shared;
  __shared__ int32_t taken[kMaxRanks];
  Queue queue(memory);
  const CombineParams& params = op.params;
  GroupOp group(op.frame, &shared);
  for (int rank = threadIdx.x; rank < kMaxRanks; rank += kThreads) taken[rank] = 0;

  group.Begin();
  if (params.sums != nullptr) SumPairs<Type, kWhole>(op, queue);
  group.Publish();
  if (group.WaitForArrivals()) {
    SumTokens<Type, kWhole>(op, group, queue, taken);
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
  const bool whole = op.row_bytes % sizeof(uint4) == 0;
  const Kernel kernel = whole ? KernelFor<true>(type) : KernelFor<false>(type);
  return LaunchKernel(kernel, op, num_blocks, kThreads,
                      whole ? kThreads * Queue::kBytesPerThread : 0, stream);
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
