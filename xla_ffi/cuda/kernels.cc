#include "cuda/kernels.h"

#include "cuda/internode/internode.h"
#include "cuda/intranode/throughput.h"
#include "cuda/low_latency/low_latency.h"
#include "cuda/low_latency_nodes/low_latency_nodes.h"

namespace jax_deepep {

const KernelSet& KernelsOf(Mode mode, const GroupShape& shape) {
  static const KernelSet sets[kNumModes] = {
      KernelSet::Of<Throughput>(),
      KernelSet::Of<LowLatency>(),
  };
  static const KernelSet between_nodes[kNumModes] = {
      KernelSet::Of<Internode>(),
      KernelSet::Of<LowLatencyNodes>(),
  };
  return (shape.num_nodes() > 1 ? between_nodes : sets)[static_cast<int>(mode)];
}

std::vector<const KernelSet*> KernelsFor(const GroupShape& shape, const WindowSize& window) {
  std::vector<const KernelSet*> sets = {&KernelsOf(Mode::kThroughput, shape)};
  if (window.num_tokens > 0) sets.push_back(&KernelsOf(Mode::kLowLatency, shape));
  return sets;
}

}  // namespace jax_deepep
