// Why native ops cannot run on GPUs, determined before a communicator is made.
#ifndef JAX_DEEPEP_CUDA_UNSUPPORTED_REASON_H_
#define JAX_DEEPEP_CUDA_UNSUPPORTED_REASON_H_

#include <cstddef>
#include <string>

#include "cuda/kernels.h"
#include "interface/geometry.h"

namespace jax_deepep {

// A device of this process, and any address in XLA's pool on it.
struct LocalDevice {
  int ordinal = 0;
  const void* in_pool = nullptr;
};

// All of these return a reason, with a remedy, or empty.

// Sizes that native ops do not support on any GPU.
std::string UnsupportedReasonOfLimits(const GroupShape& shape);

// A device that is too old, or has too little shared memory for the sizes.
std::string UnsupportedReasonOfDevice(int ordinal, const GroupShape& shape,
                                      const WindowSize& window);

// A pool that peers cannot map. `limit_bytes` is the most that XLA may allocate: a smaller pool
// may grow.
std::string UnsupportedReasonOfPool(const LocalDevice& device, size_t limit_bytes);

// The dynamic shared memory per block of a device; 0 if unknown.
int DynamicSharedBytes(int ordinal);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_UNSUPPORTED_REASON_H_
