// The mode for many tokens inside a node: ranks pull rows from each other's memory.
#ifndef JAX_DEEPEP_CUDA_INTRANODE_THROUGHPUT_H_
#define JAX_DEEPEP_CUDA_INTRANODE_THROUGHPUT_H_

#include <cstdint>

#include "cuda/kernels.h"

namespace jax_deepep {

// See KernelSet. The kernels of a verb are in <verb>.cu.
struct Throughput {
  static constexpr Mode kMode = Mode::kThroughput;
  static constexpr int64_t kFlags = 0;
  static constexpr bool kReadsPeers = true;
  static int64_t WindowBytes(const GroupShape&, const WindowSize&) { return 0; }
  static int64_t LeastSharedBytes(const GroupShape& shape, const WindowSize&);
  static int NumBlocks(const OpBytes& bytes, int most) { return BlocksFor(bytes, most); }
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_INTRANODE_THROUGHPUT_H_
