// Included before every file of kernels: the memory that a block may ask for at launch, under the name that
// kernels give it.
#include "cuda_runtime.h"

namespace jax_deepep {
namespace {

alignas(128) [[maybe_unused]] thread_local char memory[227 << 10];

}  // namespace
}  // namespace jax_deepep
