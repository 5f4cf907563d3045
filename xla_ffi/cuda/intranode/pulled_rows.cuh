// How the rows of dispatch and cached_dispatch cross links where they are pulled: as they are, or
// in a wire format, in which they may stay. `Kept` is that for an op that keeps them so.
#ifndef JAX_DEEPEP_CUDA_INTRANODE_PULLED_ROWS_CUH_
#define JAX_DEEPEP_CUDA_INTRANODE_PULLED_ROWS_CUH_

#include <cstdint>

#include "cuda/kept_rows.cuh"
#include "cuda/row_copies.cuh"
#include "cuda/wire_rows.cuh"
#include "interface/cached_dispatch.h"
#include "interface/dispatch.h"

namespace jax_deepep {

// Op has params, row_bytes and wire.
__device__ inline char* ReceivedRows(const DispatchParams& params) {
  return static_cast<char*>(params.tokens);
}
__device__ inline char* ReceivedRows(const CachedDispatchParams& params) {
  return static_cast<char*>(params.rows);
}

template <bool kWholeRows>
struct DecodedRows {
  static constexpr bool kWhole = kWholeRows;
  template <typename Op>
  __device__ static void Encode(const Op&) {}
  template <typename Op>
  __device__ static RowArray<kWhole> Received(const Op& op) {
    return {ReceivedRows(op.params), op.row_bytes};
  }
};

template <typename Element, bool kWholeRows>  // as in PlainRow
struct PlainRows : DecodedRows<kWholeRows> {
  static constexpr bool kWhole = kWholeRows;
  using Kept = PlainRows;
  using Row = PlainRow<Element, kWhole>;
  template <typename Op>
  __device__ static Row At(const Op& op, const char* rows, int64_t token) {
    return {rows + token * op.row_bytes,
            {static_cast<int>(op.row_bytes / static_cast<int64_t>(sizeof(Element)))}};
  }
};

struct KeptRows {
  using Kept = KeptRows;
  using Row = KeptRow;
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

template <typename Type, bool kWholeRows, WireFormat kFormat>
struct EncodedRows : DecodedRows<kWholeRows> {
  static constexpr bool kWhole = kWholeRows;
  using Kept = KeptRows;
  using Row = EncodedRow<Type, kWhole, kFormat>;
  template <typename Op>
  __device__ static void Encode(const Op& op) {
    EncodeRows<Type, kWhole, kFormat>(op.wire, op.params.x, op.row_bytes,
                                      op.params.route.num_tokens, op.params.encoded,
                                      [](int) { return true; });
  }
  template <typename Op>
  __device__ static Row At(const Op& op, const char* rows, int64_t token) {
    return {rows + token * op.wire.bytes(), op.wire};
  }
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_INTRANODE_PULLED_ROWS_CUH_
