// dispatch in low-latency mode inside a node: see dispatch.cuh.
#include "cuda/low_latency/dispatch.cuh"
#include "cuda/low_latency/low_latency.h"

namespace jax_deepep {

int64_t LowLatency::LeastSharedBytes(const GroupShape& shape, const WindowSize& size) {
  return LowLatencyDispatchKernels<SignalledOp>::LeastSharedBytes(shape, size);
}

template <>
const char* VerbKernels<LowLatency, DispatchParams>::Launch(const OpFrame& frame,
                                                            const DispatchParams& params,
                                                            int num_blocks, const DeviceFacts&,
                                                            const KernelStream& stream) {
  return LowLatencyDispatchKernels<SignalledOp>::Launch(frame, params, num_blocks, stream);
}

template <>
const char* VerbKernels<LowLatency, DispatchParams>::Load(int max_shared_bytes) {
  return LowLatencyDispatchKernels<SignalledOp>::Load(max_shared_bytes);
}

}  // namespace jax_deepep
