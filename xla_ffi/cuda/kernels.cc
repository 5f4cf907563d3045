#include "cuda/kernels.h"

#include <stdexcept>

#include "cuda/intranode/throughput.h"
#include "cuda/low_latency/low_latency.h"

namespace jax_deepep {

const std::vector<KernelSet>& KernelSets() {
  static const std::vector<KernelSet> sets = {
      KernelSet::Of<Throughput>(),
      KernelSet::Of<LowLatency>(),
  };
  return sets;
}

const KernelSet& KernelsOf(const std::string& mode) {
  std::string modes;
  for (const KernelSet& set : KernelSets()) {
    if (mode == set.mode) return set;
    modes += (modes.empty() ? "" : ", ") + std::string(set.mode);
  }
  throw std::invalid_argument("mode: expected one that has kernels (" + modes + "), got " + mode +
                              "; use one of those");
}

}  // namespace jax_deepep
