// Single-block kernels that the host runs for a rank of a group of several nodes besides its ops:
// those of RemoteTransport.
#ifndef JAX_DEEPEP_CUDA_INTERNODE_NODE_KERNELS_H_
#define JAX_DEEPEP_CUDA_INTERNODE_NODE_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/op_frame.h"

namespace jax_deepep {

const char* LaunchAbortBetweenNodes(const OpFrame& frame, Failure failure, cudaStream_t stream);
const char* LaunchTestNodes(const OpFrame& frame, uint64_t word, cudaStream_t stream);
const char* LoadNodeKernels(int max_shared_bytes);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_INTERNODE_NODE_KERNELS_H_
