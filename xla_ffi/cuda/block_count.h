// How many blocks, one per SM, an op takes: from the bytes that it moves.
#ifndef JAX_DEEPEP_CUDA_BLOCK_COUNT_H_
#define JAX_DEEPEP_CUDA_BLOCK_COUNT_H_

#include <cstdint>

#include "interface/combine.h"
#include "interface/dispatch.h"
#include "interface/redispatch.h"

namespace jax_deepep {

// What one rank's part of an op moves, on average over uniform routings.
struct OpBytes {
  int64_t link = 0;   // from peers
  int64_t local = 0;  // reads and writes of this rank's own memory
};

OpBytes BytesOf(const GroupShape& shape, const DispatchParams& params);
OpBytes BytesOf(const GroupShape& shape, const RedispatchParams& params);
OpBytes BytesOf(const GroupShape& shape, const CombineParams& params);

// The blocks of an op of all ranks that share a GPU wait for each other: they must all run at once,
// one to an SM. Two SMs stay free for what a late rank has yet to do.
int MostBlocks(int num_sms, int num_ranks_on_gpu);

// The blocks of an op that may take up to `most`.
int BlocksFor(const OpBytes& bytes, int most);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_BLOCK_COUNT_H_
