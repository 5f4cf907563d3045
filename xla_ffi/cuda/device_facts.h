// Properties of a GPU that launches need.
#ifndef JAX_DEEPEP_CUDA_DEVICE_FACTS_H_
#define JAX_DEEPEP_CUDA_DEVICE_FACTS_H_

#include <cstddef>
#include <cstdint>

namespace jax_deepep {

// The compute capability, without its minor version, of the oldest GPUs that kernels run on.
inline constexpr int kOldestMajor = 8;

// A device of this process.
struct DeviceFacts {
  const char* pool = nullptr;  // XLA's memory
  size_t pool_bytes = 0;
  int shared_bytes = 0;      // most per block
  bool bulk_copies = false;  // SM90; only the bench uses them

  bool Holds(const void* pointer) const {
    const auto* address = static_cast<const char*>(pointer);
    return address >= pool && address < pool + pool_bytes;
  }
  int64_t OffsetOf(const void* pointer) const { return static_cast<const char*>(pointer) - pool; }
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_DEVICE_FACTS_H_
