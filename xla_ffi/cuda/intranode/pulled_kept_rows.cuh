// Rows that stay encoded, in kernels that pull.
#ifndef JAX_DEEPEP_CUDA_INTRANODE_PULLED_KEPT_ROWS_CUH_
#define JAX_DEEPEP_CUDA_INTRANODE_PULLED_KEPT_ROWS_CUH_

#include <cstdint>

#include "cuda/kept_rows.cuh"

namespace jax_deepep {

// In place of other rows of an op with `wire` and params.kept: they are pulled as they cross links.
struct KeptRows {
  using Row = KeptRow;
  using Kept = KeptRows;
  template <typename Op>
  __device__ static void Encode(const Op&) {}
  template <typename Op>
  __device__ static KeptRowArrays Received(const Op& op) {
    return {op.params.kept, {op.wire}};
  }
  template <typename Op>
  __device__ static Row At(const Op& op, const char* rows, int64_t token) {
    return {rows + token * op.wire.bytes(), {op.wire}};
  }
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_INTRANODE_PULLED_KEPT_ROWS_CUH_
