// What every kernel of ours needs to know about its group, given to it by value.
#ifndef JAX_DEEPEP_CUDA_OP_FRAME_H_
#define JAX_DEEPEP_CUDA_OP_FRAME_H_

#include <cstddef>
#include <cstdint>

#include "cuda/device_control.h"
#include "interface/geometry.h"
#include "interface/host_device.h"

namespace jax_deepep {

struct OpFrame {
  GroupShape shape;
  int32_t rank = 0;
  OpSignature op;  // what must be the same on all ranks
  uint64_t op_hash = 0;
  uint64_t launch = 0;                     // another one for every launch, never 0
  uint64_t timeout_ns = 0;                 // the longest wait
  const int32_t* expected_rank = nullptr;  // what the program takes this device for
  HostStatus* status = nullptr;
  int64_t offsets[kMaxOperands] = {};      // of what peers read of this rank, in its pool
  DeviceControl* control[kMaxRanks] = {};  // of every rank, this one included
  const char* pool[kMaxRanks] = {};        // XLA's memory of every rank, to be read only

  // The counts behind this rank's control block, and behind a peer's.
  JAX_DEEPEP_HOST_DEVICE int32_t* Counts(int owner, int source) const {
    return reinterpret_cast<int32_t*>(control[owner] + 1) +
           static_cast<size_t>(source) * NumCountColumns(shape.num_experts, shape.num_ranks);
  }
  JAX_DEEPEP_HOST_DEVICE int32_t* BlockCounts(int block) const {
    return Counts(rank, shape.num_ranks + block);
  }
};

// Of a block; one block runs on an SM. Half of what an SM has, so that a thread has registers for
// many loads in flight.
inline constexpr int kThreads = 512;
inline constexpr int kWarps = kThreads / 32;

// Shared memory that a kernel may declare statically, if it takes dynamic shared memory too.
inline constexpr int kStaticSharedBytes = kMaxOperands * kMaxRanks * sizeof(void*) + 512;

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_OP_FRAME_H_
