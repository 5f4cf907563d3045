// What keeps native ops from running on GPUs, found before a communicator is made.
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

// All of these return what is in the way, with what to do about it, or nothing.

// Sizes that no GPU can have.
std::string UnsupportedReasonOfLimits(const GroupShape& shape);

// A device that is too old, or too small for what kernels take for the sizes.
std::string UnsupportedReasonOfDevice(int ordinal, const GroupShape& shape,
                                      const KernelSet& kernels);

// A pool that peers cannot map. `limit_bytes` is what XLA may allocate in all: a pool that is
// smaller may grow.
std::string UnsupportedReasonOfPool(const LocalDevice& device, size_t limit_bytes);

// The shared memory that a launch may ask for on a device, per block; 0 if it cannot be found out.
int DynamicSharedBytes(int ordinal);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_UNSUPPORTED_REASON_H_
