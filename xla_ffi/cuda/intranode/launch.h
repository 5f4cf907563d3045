// The verbs as kernels: what the host needs to know of them. No CUDA syntax beyond the stream.
#ifndef JAX_DEEPEP_CUDA_INTRANODE_LAUNCH_H_
#define JAX_DEEPEP_CUDA_INTRANODE_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/op_frame.h"
#include "cuda/row_pull.h"
#include "cuda/row_stream.h"
#include "interface/combine.h"
#include "interface/dispatch.h"
#include "interface/redispatch.h"

namespace jax_deepep {

// A device of this process.
struct DeviceFacts {
  const char* pool = nullptr;  // XLA's memory
  size_t pool_bytes = 0;
  int num_sms = 0;           // that this process may use
  int shared_bytes = 0;      // most that a block may have
  bool bulk_copies = false;  // SM90

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

// Load the kernels of a verb into the current device: loading one lazily can wait for a running kernel
// that itself waits for a peer.
const char* LoadDispatchKernels(int max_shared_bytes);
const char* LoadRedispatchKernels(int max_shared_bytes);
const char* LoadCombineKernels(int max_shared_bytes);

// Divide the shared memory of a block, after `reserved_bytes`, between warps that pull rows, or that
// stream chunks. No slots: there is no copy engine, or rows are not whole 16 bytes, or too long.
PullShape PullShapeOf(const GroupShape& shape, const RouteShape& route, int record_bytes,
                      int reserved_bytes, const DeviceFacts& device);
StreamShape StreamShapeOf(const GroupShape& shape, const RouteShape& route, int max_inputs,
                          const DeviceFacts& device);

const char* LoadKernelWithShared(const void* kernel, int max_shared_bytes);
const char* LaunchKernelWithShared(const void* kernel, void* argument, int num_blocks,
                                   int shared_bytes, cudaStream_t stream);

template <typename Op>
const char* LoadKernel(void (*kernel)(Op), int max_shared_bytes) {
  return LoadKernelWithShared(reinterpret_cast<const void*>(kernel), max_shared_bytes);
}

template <typename Op>
const char* LaunchKernel(void (*kernel)(Op), Op& op, int num_blocks, int shared_bytes,
                         cudaStream_t stream) {
  return LaunchKernelWithShared(reinterpret_cast<const void*>(kernel), &op, num_blocks, shared_bytes,
                                stream);
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_INTRANODE_LAUNCH_H_
