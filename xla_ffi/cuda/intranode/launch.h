// The verbs as kernels: what the host needs to know of them. No CUDA syntax beyond the stream.
#ifndef JAX_DEEPEP_CUDA_INTRANODE_LAUNCH_H_
#define JAX_DEEPEP_CUDA_INTRANODE_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/kernel_launch.h"
#include "cuda/op_frame.h"
#include "interface/combine.h"
#include "interface/dispatch.h"
#include "interface/redispatch.h"

namespace jax_deepep {

// All of these enqueue one kernel and return an error or null.
const char* LaunchDispatch(const OpFrame& frame, const DispatchParams& params, int num_blocks,
                           const DeviceFacts& device, cudaStream_t stream);
const char* LaunchRedispatch(const OpFrame& frame, const RedispatchParams& params, int num_blocks,
                             const DeviceFacts& device, cudaStream_t stream);
const char* LaunchCombine(const OpFrame& frame, const CombineParams& params, int num_blocks,
                          const DeviceFacts& device, cudaStream_t stream);

// The shared memory that a block of dispatch cannot do without.
int64_t LeastSharedBytesOfDispatch(const GroupShape& shape);

// Load the kernels of a verb into the current device: loading one lazily can wait for a running
// kernel that itself waits for a peer.
const char* LoadDispatchKernels(int max_shared_bytes);
const char* LoadRedispatchKernels(int max_shared_bytes);
const char* LoadCombineKernels(int max_shared_bytes);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_INTRANODE_LAUNCH_H_
