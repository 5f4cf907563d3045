// dispatch in low-latency mode between nodes: see low_latency/dispatch.cuh.
#include "cuda/low_latency/dispatch.cuh"
#include "cuda/low_latency_nodes/low_latency_nodes.h"
#include "cuda/low_latency_nodes/signalled_node_op.cuh"

namespace jax_deepep {

int64_t LowLatencyNodes::LeastSharedBytes(const GroupShape& shape, const WindowSize& size) {
  return LowLatencyDispatchKernels<SignalledNodeOp>::LeastSharedBytes(shape, size);
}

template <>
const char* VerbKernels<LowLatencyNodes, DispatchParams>::Launch(const OpFrame& frame,
                                                                 const DispatchParams& params,
                                                                 int num_blocks, const DeviceFacts&,
                                                                 const KernelStream& stream) {
  return LowLatencyDispatchKernels<SignalledNodeOp>::Launch(frame, params, num_blocks, stream);
}

template <>
const char* VerbKernels<LowLatencyNodes, DispatchParams>::Load(int max_shared_bytes) {
  return LowLatencyDispatchKernels<SignalledNodeOp>::Load(max_shared_bytes);
}

}  // namespace jax_deepep
