#include "cuda/kernels.h"

#include "cuda/intranode/throughput.h"
#include "cuda/low_latency/low_latency.h"
#include "cuda/remote_transport.h"

namespace jax_deepep {

const KernelSet& KernelsOf(Mode mode, const GroupShape& shape) {
  static const KernelSet sets[kNumModes] = {
      KernelSet::Of<Throughput>(),
      KernelSet::Of<LowLatency>(),
  };
  return shape.num_nodes() > 1 ? MappedTransport().kernels(mode) : sets[static_cast<int>(mode)];
}

std::vector<const KernelSet*> KernelsFor(const GroupShape& shape, const WindowSize& window) {
  std::vector<const KernelSet*> sets = {&KernelsOf(Mode::kThroughput, shape)};
  if (window.num_tokens > 0) sets.push_back(&KernelsOf(Mode::kLowLatency, shape));
  return sets;
}

}  // namespace jax_deepep
