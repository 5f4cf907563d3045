#include "cuda/kernels.h"

#include "cuda/intranode/throughput.h"
#include "cuda/low_latency/low_latency.h"

namespace jax_deepep {

const KernelSet& KernelsOf(Mode mode) {
  static const KernelSet sets[kNumModes] = {
      KernelSet::Of<Throughput>(),
      KernelSet::Of<LowLatency>(),
  };
  return sets[static_cast<int>(mode)];
}

std::vector<const KernelSet*> KernelsFor(const WindowSize& window) {
  std::vector<const KernelSet*> sets = {&KernelsOf(Mode::kThroughput)};
  if (window.num_tokens > 0) sets.push_back(&KernelsOf(Mode::kLowLatency));
  return sets;
}

}  // namespace jax_deepep
