// How a warp reads many rows from its own and from peers' memory: a ring of slots in shared memory
// that the copy engine fills ahead of use, or, on GPUs and for rows that it does not serve, plain
// loads.
//
// Work comes as tasks: a task reads some input rows, chunk by chunk, for each chunk all inputs in
// order. Loads run ahead of use over the borders of chunks and tasks.
#ifndef JAX_DEEPEP_CUDA_ROW_STREAM_CUH_
#define JAX_DEEPEP_CUDA_ROW_STREAM_CUH_

#include <cstdint>

#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/row_stream.h"
#include "cuda/row_values.cuh"

namespace jax_deepep {

// What a warp needs to know of one task, in shared memory. `inputs` may stand for more than the
// stream reads: `num_inputs` says how many it does.
struct TaskView {
  int* num_inputs;
  int* id;
  const char** inputs;  // [max_inputs]
  float* weights;       // [max_inputs]
  int* rows;            // [max_inputs]

  __device__ static TaskView At(char* memory, int max_inputs) {
    TaskView view;
    view.num_inputs = reinterpret_cast<int*>(memory);
    view.id = view.num_inputs + 1;
    view.inputs = reinterpret_cast<const char**>(memory + 16);
    view.weights = reinterpret_cast<float*>(memory + 16 + max_inputs * 8);
    view.rows = reinterpret_cast<int*>(view.weights + max_inputs);
    return view;
  }
};

template <typename Type, bool kBulk>
class RowStream {
 public:
  // `memory` is this warp's, [shape.BytesPerWarp()], aligned to 16 bytes. A stream that is not `used`
  // leaves it alone.
  __device__ RowStream(char* memory, const StreamShape& shape, int hidden_size, bool used = true)
      : shape_(shape), hidden_size_(hidden_size), lane_(threadIdx.x % 32) {
    slots_ = memory;
    tasks_ = slots_ + shape.slots * shape.slot_bytes;
    barriers_ = reinterpret_cast<uint64_t*>(tasks_ + shape.task_slots * TaskBytes(shape.max_inputs));
    num_chunks_ = (hidden_size + kChunk - 1) / kChunk;
    whole_ = hidden_size * sizeof(typename Type::Storage) % 16 == 0;
    if constexpr (kBulk) {
      if (used && lane_ == 0) {
        for (int slot = 0; slot < shape.slots; ++slot) InitLoadBarrier(&barriers_[slot]);
        FenceBarrierInit();
      }
      __syncwarp();
    }
  }

  __device__ int num_chunks() const { return num_chunks_; }
  __device__ bool whole() const { return whole_; }
  __device__ int ChunkSize(int chunk) const { return min(kChunk, hidden_size_ - chunk * kChunk); }

  // Run the tasks first, first + stride, ... below `end`.
  // prepare(id, task) fills a task in; consume(task) must call Next exactly num_chunks × num_inputs times.
  // Both are called by the whole warp.
  template <typename Prepare, typename Consume>
  __device__ void Run(int first, int end, int stride, Prepare prepare, Consume consume) {
    next_id_ = first, end_ = end, stride_ = stride;
    prepared_ = finished_ = 0;
    input_ = chunk_ = num_inputs_ = 0;
    auto refill = [&] { Refill(prepare); };
    for (int id = first; id < end; id += stride) {
      refill();
      const TaskView task = Task(finished_);
      consume(task, [&](auto use) {
        const int slot = used_ % shape_.slots;
        if constexpr (kBulk) {
          WaitForLoads(&barriers_[slot], used_ / shape_.slots & 1);
          use(const_cast<const char*>(slots_ + slot * shape_.slot_bytes));
        } else {
          __syncwarp();  // lane 0 has set the pointer
          use(Pointers()[slot]);
        }
        __syncwarp();  // all lanes are through with the slot
        ++used_;
        refill();
      });
      __syncwarp();  // all lanes are through with the task
      ++finished_;
    }
  }

 private:
  __device__ TaskView Task(int number) const {
    return TaskView::At(tasks_ + number % shape_.task_slots * TaskBytes(shape_.max_inputs),
                        shape_.max_inputs);
  }
  __device__ const char** Pointers() const { return reinterpret_cast<const char**>(barriers_); }

  template <typename Prepare>
  __device__ void Refill(Prepare& prepare) {
    while (issued_ - used_ < shape_.slots) {
      if (chunk_ == num_chunks_ || num_inputs_ == 0) {
        if (next_id_ >= end_ || prepared_ - finished_ == shape_.task_slots) return;
        const TaskView task = Task(prepared_);
        prepare(next_id_, task);
        __syncwarp();
        num_inputs_ = *task.num_inputs;
        input_ = chunk_ = 0;
        next_id_ += stride_;
        ++prepared_;
        continue;
      }
      const int slot = issued_ % shape_.slots;
      const char* from = Task(prepared_ - 1).inputs[input_] + chunk_ * kChunk * sizeof(typename Type::Storage);
      if (lane_ == 0) {
        if constexpr (kBulk) {
          const uint32_t bytes = ChunkSize(chunk_) * sizeof(typename Type::Storage);
          ExpectLoads(&barriers_[slot], bytes);
          BulkLoad(slots_ + slot * shape_.slot_bytes, from, bytes, &barriers_[slot]);
        } else {
          Pointers()[slot] = from;
        }
      }
      ++issued_;
      if (++input_ == num_inputs_) input_ = 0, ++chunk_;
    }
  }

  const StreamShape shape_;
  const int hidden_size_, lane_;
  char* slots_;
  char* tasks_;
  uint64_t* barriers_;
  int num_chunks_;
  bool whole_;
  int next_id_ = 0, end_ = 0, stride_ = 1;
  int prepared_ = 0, finished_ = 0;  // tasks
  uint32_t issued_ = 0, used_ = 0;   // chunks, over all runs
  int input_ = 0, chunk_ = 0, num_inputs_ = 0;  // of the task that is being loaded
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_ROW_STREAM_CUH_
