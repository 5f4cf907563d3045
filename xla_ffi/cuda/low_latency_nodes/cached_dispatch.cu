// cached_dispatch in low-latency mode between nodes: see low_latency/cached_dispatch.cuh.
#include "cuda/low_latency/cached_dispatch.cuh"
#include "cuda/low_latency_nodes/low_latency_nodes.h"
#include "cuda/low_latency_nodes/signalled_node_op.cuh"

namespace jax_deepep {

template <>
const char* VerbKernels<LowLatencyNodes, CachedDispatchParams>::Launch(
    const OpFrame& frame, const CachedDispatchParams& params, int num_blocks, const DeviceFacts&,
    const KernelStream& stream) {
  return LowLatencyCachedDispatchKernels<SignalledNodeOp>::Launch(frame, params, num_blocks,
                                                                  stream);
}

template <>
const char* VerbKernels<LowLatencyNodes, CachedDispatchParams>::Load(int /*max_shared_bytes*/) {
  return LowLatencyCachedDispatchKernels<SignalledNodeOp>::Load();
}

}  // namespace jax_deepep
