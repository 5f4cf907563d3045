// Staging: memory of a rank's communicator into which the ranks of other nodes with the same index
// put rows. It is behind the rank's control block, and has a slot for each channel and other node:
//
//     dispatch, cached_dispatch: tokens for each rank of this node [L][T], records [T][K], rows
//     combine: destination [T][K], gradients [T][K], sums
//
// Rows and sums are in a chunk each of tokens, which crosses in one message (Chunks): only those
// that the node needs, in the order in which they were ready, after the place of each token's.
//
// Between more than kNodesOfWholeOps nodes there is less room for rows and sums: they cross in
// chunks of tokens, which take two parts of it in turn.
//
// Where puts are asynchronous, as many slots follow, from which this rank puts.
#ifndef JAX_DEEPEP_CUDA_STAGING_H_
#define JAX_DEEPEP_CUDA_STAGING_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/device_control.h"
#include "interface/geometry.h"
#include "interface/host_device.h"

namespace jax_deepep {

// Whether puts to other nodes return before they are done: a property of the transport that kernels
// are compiled for, see cuda/remote_put.cuh.
#ifdef JAX_DEEPEP_NVSHMEM
inline constexpr bool kPutsAreAsynchronous = true;
#else
inline constexpr bool kPutsAreAsynchronous = false;
#endif

// The arrays of a slot, in the order above.
enum class StagedArray { kFirst, kSecond, kRows };

// Up to so many nodes the rows of a whole op have room; beyond, staging takes no more memory than
// with so many, but for room that is worth a message.
inline constexpr int kNodesOfWholeOps = 8;
inline constexpr int64_t kLeastBytesForRows = 1 << 20;  // of a slot

// How the rows of an op cross: `count` chunks of so many tokens, but for the last. A chunk is
//
//     places, int32 [tokens]   of each token's row among the rows, if the node needs it
//     rows
struct Chunks {
  int32_t count = 1;
  int32_t tokens = 0;
  int64_t row_bytes = 0;
  int64_t part_bytes = 0;

  JAX_DEEPEP_HOST_DEVICE int32_t First(int chunk) const { return chunk * tokens; }
  // From the beginning of a slot's rows.
  JAX_DEEPEP_HOST_DEVICE int64_t OffsetOf(int chunk) const { return (chunk & 1) * part_bytes; }
  // From the beginning of a chunk.
  JAX_DEEPEP_HOST_DEVICE int64_t OffsetOfRow(int64_t place) const {
    return PlacesBytes(tokens) + place * row_bytes;
  }

  JAX_DEEPEP_HOST_DEVICE static int64_t PlacesBytes(int64_t tokens) {
    return (4 * tokens + 15) / 16 * 16;
  }
};
// More than an op has.
inline constexpr uint64_t kMostChunks = 1 << 20;

struct StagingLayout {
  int64_t offset = 0;  // from the beginning of the control block
  int64_t slot_bytes = 0;
  int64_t second_offset = 0, rows_offset = 0;  // in a slot
  int64_t bytes_for_rows = 0;                  // of a slot
  int32_t slots = 0;                           // of a channel, in which others put
  bool sends = false;                          // whether this rank puts from slots, too

  StagingLayout() = default;
  // Tests may give the bytes for rows of a slot.
  StagingLayout(const GroupShape& shape, bool puts_are_asynchronous, int64_t most_for_rows = 0)
      : sends(puts_are_asynchronous) {
    slots = shape.num_nodes() - 1;
    if (slots == 0) return;
    const int64_t tokens = shape.max_tokens, entries = tokens * shape.num_topk;
    const int64_t lists = RoundUp(4 * tokens * shape.node_size(), 16);
    offset = RoundUp(static_cast<int64_t>(ControlBytes(shape)), 256);
    second_offset = std::max(lists, RoundUp(4 * entries, 16));
    rows_offset = second_offset + 16 * entries;  // a record has 16 bytes
    int64_t row_bytes = shape.max_row_bytes();
    for (int format = 1; format < kNumWireFormats; ++format) {
      const WireRow row{static_cast<WireFormat>(format), shape.hidden_size};
      row_bytes = std::max<int64_t>(row_bytes, row.bytes());
    }
    bytes_for_rows = Chunks::PlacesBytes(tokens) + tokens * row_bytes;
    if (slots >= kNodesOfWholeOps) {
      const int64_t share = bytes_for_rows * (kNodesOfWholeOps - 1) / slots;
      bytes_for_rows = std::min(bytes_for_rows, std::max(share, kLeastBytesForRows));
    }
    if (most_for_rows > 0) bytes_for_rows = std::min(bytes_for_rows, most_for_rows);
    bytes_for_rows = std::max(bytes_for_rows, 2 * RoundUp(16 + row_bytes, 256));
    slot_bytes = RoundUp(rows_offset + bytes_for_rows, 256);
  }

  // Of an op with such rows.
  Chunks ChunksOf(int32_t num_tokens, int64_t row_bytes) const {
    const int64_t bytes = Chunks::PlacesBytes(num_tokens) + num_tokens * row_bytes;
    if (slots == 0 || bytes <= bytes_for_rows) return {1, num_tokens, row_bytes, 0};
    const int64_t part_bytes = bytes_for_rows / 2 / 256 * 256;
    const auto tokens = static_cast<int32_t>((part_bytes - 12) / (row_bytes + 4));
    return {(num_tokens + tokens - 1) / tokens, tokens, row_bytes, part_bytes};
  }

  // Of one rank, behind its control block.
  int64_t bytes(const GroupShape& shape) const {
    if (slots == 0) return 0;
    return end() - static_cast<int64_t>(ControlBytes(shape));
  }
  // From the beginning of the control block.
  JAX_DEEPEP_HOST_DEVICE int64_t end() const {
    return offset + int64_t{sends ? 2 : 1} * kNumChannels * slots * slot_bytes;
  }

  // In the memory of a rank of `node`, from the beginning of its control block: the slot of what
  // comes from the node `source`.
  JAX_DEEPEP_HOST_DEVICE int64_t SlotOffset(int channel, int node, int source) const {
    const int slot = source < node ? source : source - 1;
    return offset + (int64_t{channel} * slots + slot) * slot_bytes;
  }
  // The slot from which a rank of `node` puts to the node `destination`.
  JAX_DEEPEP_HOST_DEVICE int64_t SendOffset(int channel, int node, int destination) const {
    return SlotOffset(kNumChannels + channel, node, destination);
  }
  // From the beginning of the slot.
  JAX_DEEPEP_HOST_DEVICE int64_t In(StagedArray array) const {
    if (array == StagedArray::kFirst) return 0;
    return array == StagedArray::kSecond ? second_offset : rows_offset;
  }

 private:
  static int64_t RoundUp(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
  }
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_STAGING_H_
