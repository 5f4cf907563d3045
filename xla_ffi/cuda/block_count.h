// How many blocks, one per SM, an op takes: derived from the bytes that it moves.
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

// `local_rows` is VerbTraits::LocalRows.
OpBytes BytesOf(const GroupShape& shape, const RouteShape& route, double local_rows);

template <typename Params>
OpBytes BytesOf(const GroupShape& shape, const Params& params) {
  const ExpectedRows rows = ExpectedRowsOf(shape, params.route);
  return BytesOf(shape, params.route, VerbTraits<Params>::LocalRows(params, rows));
}

// The most blocks of a rank. The blocks of all ranks that share a GPU wait for each other, so all
// must run at once, one per SM. Two SMs stay free for kernels that a late rank must run first.
int MostBlocks(int num_sms, int num_ranks_on_gpu);

// What an op may take by default of a rank's blocks, if others need SMs as well: every kernel that
// waits for peers must find room for all of its blocks beside the others, or ranks could hold the
// SMs that each other's kernels need. Up to a quarter of the SMs is for XLA's collectives (NCCL),
// and 3/16 for each op in flight, of this or of other communicators; more than three have no room.
// tests/unit/protocol_overlap.py searches for such deadlocks.
int MostWhole(int most, int num_in_flight);
int MostInFlight(int most);  // in throughput mode; enough to saturate the link

// The blocks of an op, at most `most`.
int BlocksFor(const OpBytes& bytes, int most);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_BLOCK_COUNT_H_
