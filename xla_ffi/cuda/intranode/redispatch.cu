// redispatch inside a node: every rank pulls rows along known routes, each token once; scaled and
// multiplied with other rows on the way, it is the gradient of combine.
#include <cuda_runtime.h>

#include "cuda/group_op.cuh"
#include "cuda/intranode/launch.h"
#include "cuda/op_frame.h"
#include "cuda/row_pull.cuh"
#include "cuda/row_stream.cuh"
#include "cuda/row_values.cuh"
#include "interface/redispatch.h"

namespace jax_deepep {
namespace {

// The operand that peers read.
enum { kRows };

struct Redispatch {
  OpFrame frame;
  RedispatchParams params;
  PullShape pull;      // where rows travel as they are
  StreamShape stream;  // where they are scaled
};

// The pairs of this rank, in either layout.
struct Pairs {
  const Redispatch& op;
  const PairTable table;
  int count;  // of pairs
  int turn;   // the first one of a later rank: read first, so that ranks read from different ones

  __device__ explicit Pairs(const Redispatch& op)
      : op(op), table(op.frame.shape, op.params.route), count(0), turn(0) {
    count = expert_major() ? op.params.pairs[0] : CountRows();
    int low = 0, high = count;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (Source(middle) / op.frame.shape.max_tokens <= op.frame.rank) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    turn = low;
  }

  __device__ bool expert_major() const { return op.params.route.layout == Layout::kExpertMajor; }
  __device__ int PairOf(int item) const {
    return item < count - turn ? item + turn : item - (count - turn);
  }
  __device__ const int32_t* Line(int pair) const {
    return op.params.pairs + int64_t{1 + pair} * table.line_ints();
  }
  __device__ int32_t Source(int pair) const {
    return expert_major() ? Line(pair)[0] : op.params.source[pair];
  }

 private:
  // Token-major: rows of tokens come first, then what fills them up to the alignment.
  __device__ int CountRows() const {
    int low = 0, high = op.params.group_sizes[0];
    while (low < high) {
      const int middle = (low + high) / 2;
      if (op.params.source[middle] >= 0) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

__device__ const char* RowAt(const Redispatch& op, const GroupOp& group, int32_t source) {
  const int rank = source / op.frame.shape.max_tokens;
  const int64_t token = source % op.frame.shape.max_tokens;
  return group.Operand<char>(rank, kRows) + token * op.pull.row_bytes;
}

__device__ void CountTaken(int32_t* taken, const Redispatch& op, int32_t source) {
  if (threadIdx.x % 32 == 0) atomicAdd(&taken[source / op.frame.shape.max_tokens], 1);
}

// Rows as they are.
template <bool kBulk>
__device__ void Pull(const Redispatch& op, const GroupOp& group, const Pairs& pairs, char* memory,
                     int32_t* taken) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp >= op.pull.warps) return;
  auto locate = [&](int item) {
    const int pair = pairs.PairOf(item);
    RowOrigin origin;
    origin.row = RowAt(op, group, pairs.Source(pair));
    origin.record = reinterpret_cast<const char*>(pairs.expert_major() ? pairs.Line(pair)
                                                                       : op.params.source);
    return origin;
  };
  auto deliver = [&](int item, const char* record) {
    const int pair = pairs.PairOf(item);
    if (!pairs.expert_major()) {
      CountTaken(taken, op, op.params.source[pair]);
      return lane == 0 ? int64_t{pair} : int64_t{kNone};
    }
    const auto* line = reinterpret_cast<const int32_t*>(record);
    CountTaken(taken, op, line[0]);
    return lane < pairs.table.max_rows ? int64_t{line[1 + lane]} : int64_t{kNone};
  };
  PullRows<kBulk>(memory + warp * op.pull.BytesPerWarp(), op.pull, static_cast<char*>(op.params.rows),
                  warp * gridDim.x + blockIdx.x, pairs.count, gridDim.x * op.pull.warps, locate, deliver);
}

// The sum over a warp's lanes of eight running sums each, in the order of the contract: halves of
// the eight first, then halves of the warp. The result is that of lane 0.
__device__ float FoldSums(float* sums) {
#pragma unroll
  for (int width = kGroup / 2; width > 0; width /= 2) {
#pragma unroll
    for (int i = 0; i < width; ++i) sums[i] = __fadd_rn(sums[i], sums[i + width]);
  }
  float sum = sums[0];
#pragma unroll
  for (int width = 16; width > 0; width /= 2) {
    sum = __fadd_rn(sum, __shfl_down_sync(~0u, sum, width));
  }
  return sum;
}

// Rows scaled by their weights, and their products with y. Expert-major.
template <typename Type, bool kBulk>
__device__ void Scale(const Redispatch& op, const GroupOp& group, const Pairs& pairs, char* memory,
                      int32_t* taken) {
  const RedispatchParams& params = op.params;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp >= op.stream.warps) return;
  const int64_t row_bytes = op.pull.row_bytes;
  RowStream<Type, kBulk> stream(memory + warp * op.stream.BytesPerWarp(), op.stream,
                                op.frame.shape.hidden_size);
  const bool with_products = params.products != nullptr;
  auto prepare = [&](int item, const TaskView& task) {
    const int32_t* line = pairs.Line(pairs.PairOf(item));
    const int32_t source = line[0];
    const int32_t row = lane < pairs.table.max_rows ? line[1 + lane] : kNone;
    const int num_rows = __popc(__ballot_sync(~0u, row != kNone));
    if (row != kNone) {
      task.rows[lane] = row;
      task.weights[lane] = params.weights[row];
      if (with_products) task.inputs[1 + lane] = static_cast<const char*>(params.y) + row * row_bytes;
    }
    if (lane == 0) {
      task.inputs[0] = RowAt(op, group, source);
      *task.id = num_rows;
      *task.num_inputs = num_rows == 0 ? 0 : with_products ? 1 + num_rows : 1;
    }
    if (num_rows > 0) CountTaken(taken, op, source);
  };
  auto consume = [&](const TaskView& task, auto next) {
    const int num_rows = *task.id;
    if (num_rows == 0) return;
    float product = 0.0f;  // of the lane's row
    for (int chunk = 0; chunk < stream.num_chunks(); ++chunk) {
      const int size = stream.ChunkSize(chunk);
      float x[kGroupsPerLane][kGroup];
      next([&](const char* run) {
#pragma unroll
        for (int i = 0; i < kGroupsPerLane; ++i) {
          ReadGroup<Type>(run, i * 32 + lane, size, stream.whole(), x[i]);
        }
      });
      for (int input = 0; input < num_rows; ++input) {
        if (with_products) {
          float sums[kGroup] = {};
          next([&](const char* run) {
#pragma unroll
            for (int i = 0; i < kGroupsPerLane; ++i) {
              float y[kGroup];
              ReadGroup<Type>(run, i * 32 + lane, size, stream.whole(), y);
#pragma unroll
              for (int e = 0; e < kGroup; ++e) {
                if ((i * 32 + lane) * kGroup + e < size) {
                  sums[e] = __fadd_rn(sums[e], __fmul_rn(x[i][e], y[e]));
                }
              }
            }
          });
          const float sum = __shfl_sync(~0u, FoldSums(sums), 0);
          if (lane == input) product = __fadd_rn(product, sum);
        }
        char* to = static_cast<char*>(params.rows) + task.rows[input] * row_bytes +
                   int64_t{chunk} * kChunk * sizeof(typename Type::Storage);
        const float weight = task.weights[input];
#pragma unroll
        for (int i = 0; i < kGroupsPerLane; ++i) {
          float scaled[kGroup];
#pragma unroll
          for (int e = 0; e < kGroup; ++e) scaled[e] = __fmul_rn(x[i][e], weight);
          WriteGroup<Type>(to, i * 32 + lane, size, stream.whole(), scaled);
        }
      }
    }
    if (with_products && lane < num_rows) params.products[task.rows[lane]] = product;
  };
  stream.Run(warp * gridDim.x + blockIdx.x, pairs.count, gridDim.x * op.stream.warps, prepare, consume);
}

// Zeros in the rows of no token, as far as they are wanted.
__device__ void WriteZeros(const Redispatch& op) {
  const RedispatchParams& params = op.params;
  const int groups =
      params.route.layout == Layout::kExpertMajor ? op.frame.shape.num_local_experts() : 1;
  const int lane = threadIdx.x % 32;
  int64_t end = params.route.capacity;
  if (!params.zero_rest) {
    end = 0;
    for (int group = 0; group < groups; ++group) end += params.group_sizes[group];
  }
  const int64_t first = (int64_t{blockIdx.x} * kWarps + threadIdx.x / 32) * 32;
  for (int64_t base = first; base < params.route.capacity; base += int64_t{gridDim.x} * kThreads) {
    const int64_t row = base + lane;
    const bool empty = row < params.route.capacity && params.source[row] == kNone;
    if (empty && params.products != nullptr) params.products[row] = 0.0f;
    uint32_t lanes = __ballot_sync(~0u, empty && row < end);
    for (; lanes != 0; lanes &= lanes - 1) {
      const int64_t at = base + __ffs(lanes) - 1;
      ZeroRowByWarp(static_cast<char*>(params.rows) + at * op.pull.row_bytes, op.pull.row_bytes);
    }
  }
}

template <typename Type, bool kBulk>
__global__ void __launch_bounds__(kThreads, 1) RedispatchKernel(const __grid_constant__ Redispatch op) {
  extern __shared__ __align__(128) char memory[];
  __shared__ GroupOp::Shared shared;
  __shared__ int32_t taken[kMaxRanks];
  const RedispatchParams& params = op.params;
  GroupOp group(op.frame, &shared);
  for (int rank = threadIdx.x; rank < kMaxRanks; rank += kThreads) taken[rank] = 0;

  group.Begin();
  group.Publish();
  const Pairs pairs(op);
  if (group.WaitForArrivals()) {
    if (params.weights == nullptr) {
      Pull<kBulk>(op, group, pairs, memory, taken);
    } else {
      Scale<Type, kBulk>(op, group, pairs, memory, taken);
    }
    WriteZeros(op);
    group.CountTaken(taken);
  }
  group.Finish([] {},
               [&] {
                 const int64_t capacity = params.route.capacity;
                 FillRowsWithNaN(params.route.row_type, params.rows,
                                 capacity * op.frame.shape.hidden_size);
                 if (params.products != nullptr) {
                   FillRowsWithNaN(RowType::kFloat32, params.products, capacity);
                 }
               });
}

using Kernel = void (*)(Redispatch);

template <bool kBulk>
Kernel KernelFor(RowType type) {
  switch (type) {
    case RowType::kFloat32:
      return RedispatchKernel<Float32, kBulk>;
    case RowType::kFloat16:
      return RedispatchKernel<Float16, kBulk>;
    case RowType::kBFloat16:
      return RedispatchKernel<BFloat16, kBulk>;
  }
  return nullptr;
}

}  // namespace

const char* LaunchRedispatch(const OpFrame& frame, const RedispatchParams& params, int num_blocks,
                             const DeviceFacts& device, cudaStream_t stream) {
  const GroupShape& shape = frame.shape;
  Redispatch op{frame, params, {}, {}};
  op.frame.offsets[kRows] = device.OffsetOf(params.x);
  const PairTable table(shape, params.route);
  const bool expert_major = params.route.layout == Layout::kExpertMajor;
  const int record_bytes = expert_major ? table.line_ints() * static_cast<int>(sizeof(int32_t)) : 0;
  op.pull = PullShapeOf(shape, params.route, record_bytes, 0, device);
  op.stream = StreamShapeOf(shape, params.route, 1 + table.max_rows, device);
  const bool scale = params.weights != nullptr;
  const bool bulk = scale ? op.stream.bulk : op.pull.slots > 0;
  const int shared_bytes = scale ? op.stream.warps * op.stream.BytesPerWarp()
                                 : op.pull.slots > 0 ? op.pull.warps * op.pull.BytesPerWarp() : 0;
  const Kernel kernel =
      bulk ? KernelFor<true>(params.route.row_type) : KernelFor<false>(params.route.row_type);
  return LaunchKernel(kernel, op, num_blocks, shared_bytes, stream);
}

const char* LoadRedispatchKernels(int max_shared_bytes) {
  for (const RowType type : {RowType::kFloat32, RowType::kFloat16, RowType::kBFloat16}) {
    for (const Kernel kernel : {KernelFor<true>(type), KernelFor<false>(type)}) {
      if (const char* error = LoadKernel(kernel, max_shared_bytes)) return error;
    }
  }
  return nullptr;
}

}  // namespace jax_deepep
