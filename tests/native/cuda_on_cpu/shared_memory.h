// Included before every file of kernels: the dynamic shared memory of a block, under the name that kernels use.
#include "cuda_runtime.h"

namespace jax_deepep {
namespace {

alignas(128) [[maybe_unused]] thread_local char memory[227 << 10];

}  // namespace
}  // namespace jax_deepep
