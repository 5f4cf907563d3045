#include <memory>

#include "cuda/internode/internode.h"
#include "cuda/internode/node_kernels.h"
#include "cuda/remote_transport.h"

namespace jax_deepep {

const RemoteTransport& MappedTransport() {
  static const KernelSet throughput = KernelSet::Of<Internode>();
  static const RemoteTransport transport = {
      /*source_digest=*/"",
      kPutsAreAsynchronous,
      [](Mode mode) { return mode == Mode::kThroughput ? &throughput : nullptr; },
      &LoadNodeKernels,
      &LaunchAbortBetweenNodes,
      &LaunchTestNodes,
      /*process=*/nullptr,
      []() -> std::unique_ptr<RemoteMemory> { return std::make_unique<MappedRemoteMemory>(); },
  };
  return transport;
}

}  // namespace jax_deepep
