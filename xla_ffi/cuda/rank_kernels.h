// Single-block kernels that the host runs for a rank besides its ops. Those that write to other
// nodes are in cuda/remote_transport.h.
#ifndef JAX_DEEPEP_CUDA_RANK_KERNELS_H_
#define JAX_DEEPEP_CUDA_RANK_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/op_frame.h"

namespace jax_deepep {

// Abort the op in `frame`, of a group of one node: notify the group and this rank's host that the
// rank cannot continue. Enqueues one kernel; returns an error or null.
const char* LaunchAbort(const OpFrame& frame, Failure failure, cudaStream_t stream);

// Write a word to the control block of every rank of this node and read it back; if it reads back
// differently, set frame.status->unreachable to 1 + the rank. Likewise.
const char* LaunchTestPeers(const OpFrame& frame, uint64_t word, cudaStream_t stream);

// Load both into the current device.
const char* LoadRankKernels(int max_shared_bytes);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_RANK_KERNELS_H_
