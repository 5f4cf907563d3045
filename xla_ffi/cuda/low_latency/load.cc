#include "cuda/low_latency/launch.h"

namespace jax_deepep {

const char* LoadLowLatencyKernels(int max_shared_bytes) {
  for (auto* load : {LoadLowLatencyDispatch, LoadLowLatencyRedispatch, LoadLowLatencyCombine}) {
    if (const char* error = load(max_shared_bytes)) return error;
  }
  return nullptr;
}

}  // namespace jax_deepep
