#include <memory>

#include "cuda/internode/internode.h"
#include "cuda/internode/node_kernels.h"
#include "cuda/low_latency_nodes/low_latency_nodes.h"
#include "cuda/remote_transport.h"

namespace jax_deepep {

const RemoteTransport& MappedTransport() {
  static const KernelSet sets[kNumModes] = {KernelSet::Of<Internode>(),
                                            KernelSet::Of<LowLatencyNodes>()};
  static const RemoteTransport transport = {
      /*source_digest=*/"",
      kPutsAreAsynchronous,
      [](Mode mode) -> const KernelSet& { return sets[static_cast<int>(mode)]; },
      &LoadNodeKernels,
      &LaunchAbortBetweenNodes,
      &LaunchTestNodes,
      /*process=*/nullptr,
      []() -> std::unique_ptr<RemoteMemory> { return std::make_unique<MappedRemoteMemory>(); },
  };
  return transport;
}

}  // namespace jax_deepep
