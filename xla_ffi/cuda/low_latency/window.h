// Windows: memory of a rank's communicator into which its peers push rows, for each channel two
// banks that its ops take in turn. It is behind the rank's control block and, between nodes, the
// staging of throughput mode, and is never cleared.
//
// A bank has a slot for each (source, token):
//
//     signals [kMaxParts]  one for each part of the row, which one warp pushes
//     packets [K]          what accompanies the row: see SlotEntry
//     row                  of at most WindowSize::row_bytes
#ifndef JAX_DEEPEP_CUDA_LOW_LATENCY_WINDOW_H_
#define JAX_DEEPEP_CUDA_LOW_LATENCY_WINDOW_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/device_control.h"
#include "cuda/op_frame.h"
#include "cuda/staging.h"
#include "interface/geometry.h"
#include "interface/host_device.h"

namespace jax_deepep {

// Most parts of a row. If there are few rows, several warps push each, so that all SMs take part.
inline constexpr int kMaxParts = 8;

// Says that a part of a slot has arrived, and for which op: the op's hash and step, and in the
// lowest bit whether there is a row. Written by the source after the part.
using Signal = uint64_t;

JAX_DEEPEP_HOST_DEVICE constexpr Signal SignalOf(uint64_t op_hash, uint64_t step, bool has_row) {
  return ((op_hash ^ step << 1) & ~Signal{1}) | (has_row ? 1 : 0);
}

// The value of a slot's packet. Of a dispatch, an entry of the token in its own column: the local
// expert, or kNone, and the router weight. Of a combine, the gradient of an entry's weight:
// expert-major, of the n-th entry of the token on that rank; token-major, of column k.
struct alignas(8) SlotEntry {
  int32_t expert;
  float value;
};
inline constexpr int kPacketBytes = 16;  // with a tag, which is the signal of the op

struct WindowLayout {
  int64_t offset = 0;      // from the beginning of the control block
  int32_t num_ranks = 0;   // R
  int32_t num_slots = 0;   // of a source: most tokens of an op
  int32_t row_offset = 0;  // in a slot
  int32_t slot_bytes = 0;

  WindowLayout() = default;
  WindowLayout(const GroupShape& shape, const WindowSize& size)
      : offset(RoundUpTo(
            ControlBytes(shape) + StagingLayout(shape, kPutsAreAsynchronous).bytes(shape), 256)),
        num_ranks(shape.num_ranks),
        num_slots(size.num_tokens),
        row_offset(static_cast<int32_t>(
            RoundUpTo(kMaxParts * sizeof(Signal) + shape.num_topk * kPacketBytes, 16))),
        slot_bytes(row_offset + static_cast<int32_t>(RoundUpTo(size.row_bytes, 16))) {}

  // Of one rank, behind its control block, the banks of all channels.
  int64_t bytes() const { return int64_t{2} * kNumChannels * num_ranks * num_slots * slot_bytes; }

  // From the beginning of the control block of the rank whose window it is.
  JAX_DEEPEP_HOST_DEVICE int64_t BankOffset(int32_t channel, uint64_t step) const {
    const int64_t bank = 2 * channel + static_cast<int64_t>(step % 2);
    return offset + bank * num_ranks * num_slots * slot_bytes;
  }
  // From the beginning of the bank.
  JAX_DEEPEP_HOST_DEVICE int64_t SlotOffset(int32_t source, int32_t token) const {
    return int64_t{source * num_slots + token} * slot_bytes;
  }

 private:
  static int64_t RoundUpTo(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
  }
};

// How many warps share each of `num_slots` slots: a power of two up to `most` of which there are up
// to `wanted` in all, or one.
inline int32_t WarpsOfSlot(int64_t num_slots, int64_t most, int64_t wanted) {
  int32_t warps = 1;
  while (2 * warps <= most && 2 * warps * num_slots <= wanted) warps *= 2;
  return warps;
}

// The number of parts of each row of an op: the same on all ranks. The scale of a row of nvfp4
// depends on all of it; rows that stay encoded are copied in other groups than they are encoded in.
inline int32_t NumParts(const GroupShape& shape, int32_t num_tokens, const RowFormat& rows) {
  if (rows.wire == WireFormat::kNvfp4 || rows.keeps_quantized) return 1;
  constexpr int64_t kWarpsWanted = 1024, kLeastBytes = 1024;
  const int64_t slots = int64_t{shape.num_ranks} * (num_tokens > 0 ? num_tokens : 1);
  return WarpsOfSlot(slots, std::min<int64_t>(kMaxParts, rows.bytes() / kLeastBytes), kWarpsWanted);
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_LOW_LATENCY_WINDOW_H_
