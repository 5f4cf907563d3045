// Low-latency mode between nodes: inside a node ranks push, as on one node; to another node they
// put each row once, and one flag per op.
#ifndef JAX_DEEPEP_CUDA_LOW_LATENCY_NODES_LOW_LATENCY_NODES_H_
#define JAX_DEEPEP_CUDA_LOW_LATENCY_NODES_LOW_LATENCY_NODES_H_

#include <cstdint>

#include "cuda/kernels.h"
#include "cuda/low_latency/low_latency.h"
#include "cuda/low_latency_nodes/put_areas.h"
#include "cuda/staging.h"

namespace jax_deepep {

// See KernelSet. The kernels are those of LowLatency, with SignalledNodeOp in place of SignalledOp.
struct LowLatencyNodes : LowLatency {
  static int64_t WindowBytes(const GroupShape& shape, const WindowSize& size) {
    const PutAreas areas(shape, size);
    return areas.offset + areas.bytes() - static_cast<int64_t>(ControlBytes(shape)) -
           StagingLayout(shape, kPutsAreAsynchronous).bytes(shape);
  }
  static int64_t LeastSharedBytes(const GroupShape& shape, const WindowSize& size);
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_LOW_LATENCY_NODES_LOW_LATENCY_NODES_H_
