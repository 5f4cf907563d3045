// combine in low-latency mode between nodes: see low_latency/combine.cuh.
#include "cuda/low_latency/combine.cuh"
#include "cuda/low_latency_nodes/low_latency_nodes.h"
#include "cuda/low_latency_nodes/signalled_node_op.cuh"

namespace jax_deepep {

template <>
const char* VerbKernels<LowLatencyNodes, CombineParams>::Launch(const OpFrame& frame,
                                                                const CombineParams& params,
                                                                int num_blocks, const DeviceFacts&,
                                                                const KernelStream& stream) {
  return LowLatencyCombineKernels<SignalledNodeOp>::Launch(frame, params, num_blocks, stream);
}

template <>
const char* VerbKernels<LowLatencyNodes, CombineParams>::Load(int /*max_shared_bytes*/) {
  return LowLatencyCombineKernels<SignalledNodeOp>::Load();
}

}  // namespace jax_deepep
