// Memory of a rank's communicator for what crosses nodes in low-latency mode, behind its window:
// for each channel two banks, which its ops take in turn, of two areas.
//
//     received   a slot for each node: what the rank there with this rank's index has put here; in
//                combine, the slot of the own node has its sums
//     sent       what this rank puts: a slot for each other node, and that of the own node for what
//                goes to several. But for words of the control block, puts have no other source.
//
// A slot has a header, values, and a row for each token:
//
//     dispatch          entries, SlotEntry [T][K]: the expert of all, or kNone; tokens
//     cached_dispatch   tokens
//     combine           whether there is a sum, int32 [T]; gradients of weights as each rank of
//                       the node has pushed them, float [T][L][min(K, local experts) or K]; sums
#ifndef JAX_DEEPEP_CUDA_LOW_LATENCY_NODES_PUT_AREAS_H_
#define JAX_DEEPEP_CUDA_LOW_LATENCY_NODES_PUT_AREAS_H_

#include <algorithm>
#include <cstdint>

#include "cuda/device_control.h"
#include "cuda/low_latency/window.h"
#include "cuda/op_frame.h"
#include "interface/geometry.h"
#include "interface/host_device.h"

namespace jax_deepep {

// Put with the values, before the flag. The flag alone does not say which op that was: `arrived`
// may be that of the next one already, and so may Channel::published.
struct alignas(16) PutHeader {
  Signal tag;  // as that of packets
};

enum class PutArea : int32_t { kReceived, kSent };

struct PutAreas {
  int64_t offset = 0;  // from the beginning of the control block
  int64_t slot_bytes = 0;
  int64_t rows_offset = 0;  // in a slot
  int32_t row_stride = 0;
  int32_t num_nodes = 0;

  PutAreas() = default;
  PutAreas(const GroupShape& shape, const WindowSize& size) : num_nodes(shape.num_nodes()) {
    const WindowLayout window(shape, size);
    const int64_t tokens = size.num_tokens, of_ranks = int64_t{shape.node_size()} * shape.num_topk;
    const int64_t entries = tokens * shape.num_topk * static_cast<int64_t>(sizeof(SlotEntry));
    const int64_t sums = tokens * 4 * (1 + of_ranks);
    offset = RoundUp(window.offset + window.bytes(), 256);
    rows_offset = RoundUp(static_cast<int64_t>(sizeof(PutHeader)) + std::max(entries, sums), 256);
    row_stride = static_cast<int32_t>(RoundUp(size.row_bytes, 16));
    slot_bytes = RoundUp(rows_offset + tokens * row_stride, 256);
  }

  // Of one rank.
  int64_t bytes() const { return int64_t{2} * kNumChannels * 2 * num_nodes * slot_bytes; }

  // From the beginning of the control block.
  JAX_DEEPEP_HOST_DEVICE int64_t SlotOffset(int32_t channel, uint64_t step, PutArea area,
                                            int32_t node) const {
    const int64_t bank = 2 * channel + static_cast<int64_t>(step % 2);
    return offset + ((2 * bank + static_cast<int64_t>(area)) * num_nodes + node) * slot_bytes;
  }

 private:
  static int64_t RoundUp(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
  }
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_LOW_LATENCY_NODES_PUT_AREAS_H_
