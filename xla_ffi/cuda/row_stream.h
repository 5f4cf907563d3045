// How the shared memory of a block is divided between warps that stream rows: see row_stream.cuh.
#ifndef JAX_DEEPEP_CUDA_ROW_STREAM_H_
#define JAX_DEEPEP_CUDA_ROW_STREAM_H_

#include "interface/host_device.h"

namespace jax_deepep {

inline constexpr int kGroup = 8;                             // elements that a lane handles at once
inline constexpr int kGroupsPerLane = 8;                     // of one chunk
inline constexpr int kChunk = 32 * kGroup * kGroupsPerLane;  // elements that a warp handles at once

// Shared memory that describes one task.
JAX_DEEPEP_HOST_DEVICE constexpr int TaskBytes(int max_inputs) { return 16 + max_inputs * 16; }

struct StreamShape {
  bool bulk = false;   // by the copy engine
  int warps = 0;
  int slots = 0;       // chunks that are loaded ahead
  int task_slots = 0;  // tasks that are prepared ahead, the running one included
  int max_inputs = 0;
  int slot_bytes = 0;

  JAX_DEEPEP_HOST_DEVICE int BytesPerWarp() const {
    return (slots * (slot_bytes + 8) + task_slots * TaskBytes(max_inputs) + 15) / 16 * 16;
  }
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_ROW_STREAM_H_
