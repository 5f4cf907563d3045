// Throughput mode between nodes: ranks put rows, once per node, into the staging of the rank of the
// other node with their index, from where the ranks of that node pull them.
#ifndef JAX_DEEPEP_CUDA_INTERNODE_INTERNODE_H_
#define JAX_DEEPEP_CUDA_INTERNODE_INTERNODE_H_

#include <cstdint>

#include "cuda/kernels.h"
#include "cuda/staging.h"

namespace jax_deepep {

// See KernelSet. The kernels are those of Throughput, with NodeOp in place of GroupOp.
struct Internode {
  static constexpr Mode kMode = Mode::kThroughput;
  static constexpr int64_t kFlags = 0;
  static constexpr bool kReadsPeers = true;
  static int64_t WindowBytes(const GroupShape& shape, const WindowSize&) {
    return StagingLayout(shape, kPutsAreAsynchronous).bytes(shape);
  }
  static int64_t LeastSharedBytes(const GroupShape& shape, const WindowSize&);
  static int NumBlocks(const OpBytes& bytes, int most) { return BlocksFor(bytes, most); }
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_INTERNODE_INTERNODE_H_
