// A slot of a window, and the parts of rows that are pushed into slots.
#ifndef JAX_DEEPEP_CUDA_LOW_LATENCY_SLOT_CUH_
#define JAX_DEEPEP_CUDA_LOW_LATENCY_SLOT_CUH_

#include <algorithm>
#include <cstdint>

#include "cuda/low_latency/window.h"
#include "cuda/memory_order.cuh"
#include "cuda/row_copies.cuh"
#include "cuda/wire_rows.cuh"

namespace jax_deepep {

static_assert(sizeof(Packet) == kPacketBytes && sizeof(SlotEntry) == sizeof(Packet::value));

// On this rank or on a peer.
class Slot {
 public:
  __device__ Slot(char* memory, int32_t row_offset) : memory_(memory), row_offset_(row_offset) {}

  __device__ Signal* signals() const { return reinterpret_cast<Signal*>(memory_); }
  __device__ Packet* packets() const {
    return reinterpret_cast<Packet*>(memory_ + kMaxParts * sizeof(Signal));
  }
  // The value of a packet without regard to its tag.
  __device__ float& value(int index) const {
    return reinterpret_cast<SlotEntry*>(packets() + index)->value;
  }
  __device__ char* row() const { return memory_ + row_offset_; }

 private:
  char* memory_;
  int32_t row_offset_;
};

// A part of a row, whose first chunk a warp loads early. `Row` as in RowChunk. A lane has half as
// much in flight as of a whole row, but at least 4 words: there are many warps with a part each.
template <typename Row>
struct LoadedPart {
  using Chunk = RowChunk<Row, std::max(Row::kInFlight / 2, 4)>;
  Row row;
  GroupRange range;
  Chunk chunk;

  __device__ LoadedPart(const Row& row, int granule, int part, int num_parts)
      : row(row), range(GroupRange::Part(row.shape.num_groups(), granule, part, num_parts)) {}
  __device__ void Load() { chunk.Load(row, range.first, range.end); }

  // Call to(store) for every chunk: store(row) stores it, or a part of it, in another row.
  template <typename To>
  __device__ __forceinline__ void CopyTo(To to) {
    for (int base = range.first; base < range.end; base += Chunk::kGroups) {
      if (base > range.first) chunk.Load(row, base, range.end);
      chunk.CopyTo(row, base, range.end, to);
    }
  }
};

// The same of a row that is encoded while it is copied.
template <typename Type, bool kWhole, WireFormat kFormat>
using EncodedPart = PartToEncode<Type, kWhole, kFormat, /*kAhead=*/4, /*kOutOfLine=*/true>;

// Call use(bit) for the bits of a mask, in ascending order.
template <typename Use>
__device__ __forceinline__ void ForBits(uint32_t mask, Use use) {
  for (; mask != 0; mask &= mask - 1) use(__ffs(mask) - 1);
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_LOW_LATENCY_SLOT_CUH_
