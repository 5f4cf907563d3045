// How many blocks, one per SM, an op takes: from the bytes that it moves.
#ifndef JAX_DEEPEP_CUDA_BLOCK_COUNT_H_
#define JAX_DEEPEP_CUDA_BLOCK_COUNT_H_

#include <cstdint>

#include "interface/geometry.h"
#include "interface/verb_traits.h"

namespace jax_deepep {

// What one rank's part of an op moves, on average over uniform routings.
struct OpBytes {
  int64_t link = 0;   // from peers
  int64_t local = 0;  // reads and writes of this rank's own memory
};

ExpectedRows ExpectedRowsOf(const GroupShape& shape, const RouteShape& route);

// `local_rows` as VerbTraits has them.
OpBytes BytesOf(const GroupShape& shape, const RouteShape& route, double local_rows);

template <typename Params>
OpBytes BytesOf(const GroupShape& shape, const Params& params) {
  const ExpectedRows rows = ExpectedRowsOf(shape, params.route);
  return BytesOf(shape, params.route, VerbTraits<Params>::LocalRows(params, rows));
}

// The blocks of an op of all ranks that share a GPU wait for each other: they must all run at once,
// one to an SM. Two SMs stay free for what a late rank has yet to do.
int MostBlocks(int num_sms, int num_ranks_on_gpu);

// The blocks of an op that may take up to `most`.
int BlocksFor(const OpBytes& bytes, int most);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_BLOCK_COUNT_H_
