// dispatch inside a node: see dispatch.cuh.
#include "cuda/group_op.cuh"
#include "cuda/intranode/dispatch.cuh"
#include "cuda/intranode/throughput.h"

namespace jax_deepep {

int64_t Throughput::LeastSharedBytes(const GroupShape& shape, const WindowSize&) {
  return DispatchKernels<GroupOp>::LeastSharedBytes(shape);
}

template <>
const char* VerbKernels<Throughput, DispatchParams>::Launch(const OpFrame& frame,
                                                            const DispatchParams& params,
                                                            int num_blocks,
                                                            const DeviceFacts& device,
                                                            const KernelStream& stream) {
  return DispatchKernels<GroupOp>::Launch(frame, params, num_blocks, device, stream);
}

template <>
const char* VerbKernels<Throughput, DispatchParams>::Load(int max_shared_bytes) {
  return DispatchKernels<GroupOp>::Load(max_shared_bytes);
}

}  // namespace jax_deepep
