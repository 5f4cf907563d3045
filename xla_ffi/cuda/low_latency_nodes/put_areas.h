// Memory of a rank's communicator for what crosses nodes in low-latency mode, behind its window:
// for each channel two banks, which its ops take in turn, of two areas.
//
//     received   a slot for each node: what the rank there with this rank's index has put here; in
//                combine, the slot of the own node has its sums
//     sent       only where puts are asynchronous: a slot for each node, from which this rank puts
//
// What a rank puts to a node in an op is one message, from the beginning of a slot:
//
//     PutHeader
//     places, int32 [T]   of each token's row among the rows; in combine kNone without a sum
//     values              of each token; dispatch: entries, SlotEntry [K], the expert of all or
//                         kNone; combine: gradients of weights as each rank of the node has pushed
//                         them, float [L][min(K, local experts) or K]
//     rows                in the order in which they were ready
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

struct alignas(16) PutHeader {
  uint64_t step;      // of the channel: the flag may be that of the next op already
  uint64_t num_rows;  // that have been put to this node in total
  Publication published;
};

enum class PutArea : int32_t { kReceived, kSent };

struct PutAreas {
  int64_t offset = 0;  // from the beginning of the control block
  int64_t slot_bytes = 0;
  int32_t row_stride = 0;  // of the widest rows
  int32_t num_nodes = 0;

  PutAreas() = default;
  PutAreas(const GroupShape& shape, const WindowSize& size) : num_nodes(shape.num_nodes()) {
    const WindowLayout window(shape, size);
    const int64_t entries = shape.num_topk * static_cast<int64_t>(sizeof(SlotEntry));
    const int64_t gradients = int64_t{4} * shape.node_size() * shape.num_topk;
    offset = RoundUp(window.offset + window.bytes(), 256);
    row_stride = static_cast<int32_t>(RoundUp(size.row_bytes, 16));
    slot_bytes = RoundUp(RowsOffset(size.num_tokens, std::max(entries, gradients)) +
                             int64_t{size.num_tokens} * row_stride,
                         256);
  }

  // In a slot, in an op with so many tokens and bytes of values of each.
  static int64_t ValuesOffset(int64_t num_tokens) {
    return static_cast<int64_t>(sizeof(PutHeader)) + RoundUp(4 * num_tokens, 16);
  }
  static int64_t RowsOffset(int64_t num_tokens, int64_t value_bytes) {
    return ValuesOffset(num_tokens) + RoundUp(num_tokens * value_bytes, 16);
  }

  // Of one rank.
  int64_t bytes() const { return int64_t{2} * kNumChannels * kNumAreas * num_nodes * slot_bytes; }

  // From the beginning of the control block.
  JAX_DEEPEP_HOST_DEVICE int64_t SlotOffset(int32_t channel, uint64_t step, PutArea area,
                                            int32_t node) const {
    const int64_t bank = 2 * channel + static_cast<int64_t>(step % 2);
    return offset +
           ((kNumAreas * bank + static_cast<int64_t>(area)) * num_nodes + node) * slot_bytes;
  }

 private:
  static constexpr int kNumAreas = kPutsAreAsynchronous ? 2 : 1;

  static int64_t RoundUp(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
  }
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_LOW_LATENCY_NODES_PUT_AREAS_H_
