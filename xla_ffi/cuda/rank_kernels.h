// Kernels of one block that the host runs for a rank beside its ops.
#ifndef JAX_DEEPEP_CUDA_RANK_KERNELS_H_
#define JAX_DEEPEP_CUDA_RANK_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/op_frame.h"

namespace jax_deepep {

// Tell the group and this rank's host that the rank cannot go on, in place of the op in `frame`.
// Enqueues one kernel; returns an error or null.
const char* LaunchGiveUp(const OpFrame& frame, Failure failure, cudaStream_t stream);

// Write a word to the control block of every rank and read it back; where it reads otherwise, set
// frame.status->unreachable to 1 + the rank. Likewise.
const char* LaunchTestPeers(const OpFrame& frame, uint64_t word, cudaStream_t stream);

// Load both into the current device.
const char* LoadRankKernels(int max_shared_bytes);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_RANK_KERNELS_H_
