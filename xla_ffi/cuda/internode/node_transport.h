// The table of a transport between nodes: the kernels are those of the library that includes this.
#ifndef JAX_DEEPEP_CUDA_INTERNODE_NODE_TRANSPORT_H_
#define JAX_DEEPEP_CUDA_INTERNODE_NODE_TRANSPORT_H_

#include <memory>

#include "cuda/internode/internode.h"
#include "cuda/internode/node_kernels.h"
#include "cuda/low_latency_nodes/low_latency_nodes.h"
#include "cuda/remote_transport.h"

namespace jax_deepep {

// `Memory` is a rank's side on the host. The rest as in RemoteTransport.
template <typename Memory>
RemoteTransport NodeTransport(const char* source_digest, RemoteProcess* (*process)()) {
  static const KernelSet sets[kNumModes] = {KernelSet::Of<Internode>(),
                                            KernelSet::Of<LowLatencyNodes>()};
  return {
      source_digest,
      kPutsAreAsynchronous,
      [](Mode mode) -> const KernelSet& { return sets[static_cast<int>(mode)]; },
      &LoadNodeKernels,
      &LaunchAbortBetweenNodes,
      &LaunchTestNodes,
      process,
      []() -> std::unique_ptr<RemoteMemory> { return std::make_unique<Memory>(); },
  };
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_INTERNODE_NODE_TRANSPORT_H_
