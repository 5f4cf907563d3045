// How the shared memory of a block is divided between warps that pull whole rows: see row_pull.cuh.
#ifndef JAX_DEEPEP_CUDA_ROW_PULL_H_
#define JAX_DEEPEP_CUDA_ROW_PULL_H_

#include <cstdint>

#include "interface/host_device.h"

namespace jax_deepep {

struct PullShape {
  int warps = 0;
  int slots = 0;  // of a warp, two at least
  int64_t row_bytes = 0;
  int record_bytes = 0;

  JAX_DEEPEP_HOST_DEVICE int RecordOffset() const { return static_cast<int>((row_bytes + 15) / 16 * 16); }
  JAX_DEEPEP_HOST_DEVICE int SlotBytes() const { return (RecordOffset() + record_bytes + 127) / 128 * 128; }
  JAX_DEEPEP_HOST_DEVICE int BytesPerWarp() const { return slots * (SlotBytes() + 16); }
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_ROW_PULL_H_
