// The verbs as kernels: what the host needs to know of them. No CUDA syntax beyond the stream.
#ifndef JAX_DEEPEP_CUDA_INTRANODE_LAUNCH_H_
#define JAX_DEEPEP_CUDA_INTRANODE_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/op_frame.h"
#include "interface/combine.h"
#include "interface/dispatch.h"
#include "interface/redispatch.h"

namespace jax_deepep {

// A device of this process.
struct DeviceFacts {
  const char* pool = nullptr;  // XLA's memory
  size_t pool_bytes = 0;
  int shared_bytes = 0;      // most that a block may have
  bool bulk_copies = false;  // SM90; only floors of the bench use them

  bool Holds(const void* pointer) const {
    const auto* address = static_cast<const char*>(pointer);
    return address >= pool && address < pool + pool_bytes;
  }
  int64_t OffsetOf(const void* pointer) const { return static_cast<const char*>(pointer) - pool; }
};

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

template <typename Op>
const char* LoadKernel(void (*kernel)(Op), int max_shared_bytes) {
  const cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, max_shared_bytes);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename Op>
const char* LaunchKernel(void (*kernel)(Op), Op& op, int num_blocks, int num_threads,
                         int shared_bytes, cudaStream_t stream) {
  void* arguments[] = {&op};
  const cudaError_t error =
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(num_blocks), dim3(num_threads),
                       arguments, shared_bytes, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_INTRANODE_LAUNCH_H_
