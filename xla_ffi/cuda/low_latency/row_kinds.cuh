// How rows cross links in low-latency mode, and lie in windows: as they are, or in a wire format,
// in which they may stay. A kernel is compiled for one of these kinds, its `Rows`.
#ifndef JAX_DEEPEP_CUDA_LOW_LATENCY_ROW_KINDS_CUH_
#define JAX_DEEPEP_CUDA_LOW_LATENCY_ROW_KINDS_CUH_

#include <cstdint>

#include "cuda/kept_rows.cuh"
#include "cuda/low_latency/slot.cuh"
#include "cuda/row_copies.cuh"
#include "cuda/wire_rows.cuh"

namespace jax_deepep {
namespace {  // throughput mode has other structs of these names

// What an op says of its rows.
struct RowsOfOp {
  int64_t row_bytes;
  const WireRow& wire;
  int num_parts;
};

// `Kept` are the same rows if they stay encoded; `Element` is as in PlainRow. With kPushesOwn, rows
// that stay on this rank go through its own window.
template <typename Element, bool kWholeRows>
struct PlainRows {
  static constexpr bool kWhole = kWholeRows;
  static constexpr bool kPushesOwn = false;
  using Kept = PlainRows;
  using Row = PlainRow<Element, kWhole>;
  using Sent = LoadedPart<Row>;
  using InWindow = Sent;
  __device__ static Row At(const RowsOfOp& rows, const char* row) {
    return {row, {static_cast<int>(rows.row_bytes / sizeof(Element))}};
  }
  __device__ static Sent ToSend(const RowsOfOp& rows, const char* row, int part) {
    return {At(rows, row), 1, part, rows.num_parts};
  }
  __device__ static InWindow InSlot(const RowsOfOp& rows, const char* row, int part) {
    return ToSend(rows, row, part);
  }
  // Where they arrive: in `plain`, or in `kept`.
  __device__ static RowArray<kWhole> Received(const RowsOfOp& rows, void* plain,
                                              const KeptArrays& /*kept*/) {
    return {static_cast<char*>(plain), rows.row_bytes};
  }
};

// Rows that stay encoded: with kAreEncoded, they are before the op; otherwise as EncodedRows sends
// them.
template <bool kAreEncoded>
struct KeptRows : PlainRows<uint16_t, true> {
  static constexpr bool kPushesOwn = !kAreEncoded;
  using Kept = KeptRows;
  using InWindow = LoadedPart<KeptRow>;
  __device__ static InWindow InSlot(const RowsOfOp& rows, const char* row, int part) {
    return {{row, {rows.wire}}, 1, part, rows.num_parts};
  }
  __device__ static KeptRowArrays Received(const RowsOfOp& rows, void* /*plain*/,
                                           const KeptArrays& kept) {
    return {kept, {rows.wire}};
  }
};

template <typename Type, bool kWholeRows, WireFormat kFormat>
struct EncodedRows : PlainRows<typename Type::Element, kWholeRows> {
  static constexpr bool kWhole = kWholeRows;
  static constexpr bool kPushesOwn = true;
  using Kept = KeptRows</*kAreEncoded=*/false>;
  using Row = EncodedRow<Type, kWhole, kFormat>;
  using Sent = EncodedPart<Type, kWhole, kFormat>;
  using InWindow = LoadedPart<Row>;
  __device__ static Row At(const RowsOfOp& rows, const char* row) { return {row, rows.wire}; }
  __device__ static Sent ToSend(const RowsOfOp& rows, const char* row, int part) {
    return {row, rows.wire, part, rows.num_parts};
  }
  __device__ static InWindow InSlot(const RowsOfOp& rows, const char* row, int part) {
    return {At(rows, row), GroupsOfBlock(rows.wire.format), part, rows.num_parts};
  }
};

}  // namespace
}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_LOW_LATENCY_ROW_KINDS_CUH_
