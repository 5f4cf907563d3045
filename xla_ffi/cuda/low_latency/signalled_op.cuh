// How the ranks of an EP group synchronise in low-latency mode: one one-way message per peer.
//
//     Begin | push parts of rows, each with its Signal | Wait for everyone's | read own window |
//     Finish
//
// Every op pushes a Signal for each slot of every peer, whether it has a row for it or not, and
// waits for all slots of its own window. So a rank that begins op n has received signals of all
// peers in op n - 1; each of them had then ended op n - 2, and with it its reads of the bank that
// op n writes. No peer reads this rank's arrays, so there is no wait at the end.
//
// The rank also announces the op to its peers (Announce): a peer that waits in another op, of
// either mode, detects it.
//
// tests/unit/protocol_low_latency.py models this protocol step by step.
#ifndef JAX_DEEPEP_CUDA_LOW_LATENCY_SIGNALLED_OP_CUH_
#define JAX_DEEPEP_CUDA_LOW_LATENCY_SIGNALLED_OP_CUH_

#include <cstdint>

#include "cuda/low_latency/window.h"
#include "cuda/memory_order.cuh"
#include "cuda/op_frame.h"
#include "cuda/rank_op.cuh"
#include "cuda/row_values.cuh"

namespace jax_deepep {

// What all kernels of this mode take besides their parameters.
struct SignalledFrame {
  WindowLayout window;
  int32_t num_parts = 1;
  int32_t num_slots = 1;  // of a source, in this op: T, and at least 1
};

// A slot of a window, on this rank or on a peer.
class Slot {
 public:
  __device__ Slot(char* memory, int32_t row_offset) : memory_(memory), row_offset_(row_offset) {}

  __device__ Signal* signals() const { return reinterpret_cast<Signal*>(memory_); }
  __device__ SlotEntry* entries() const {
    return reinterpret_cast<SlotEntry*>(memory_ + kMaxParts * sizeof(Signal));
  }
  __device__ char* row() const { return memory_ + row_offset_; }

 private:
  char* memory_;
  int32_t row_offset_;
};

// A part of a row: where it begins, in bytes, and its elements.
template <bool kWhole>
struct RowPart {
  int64_t begin;
  RowShape<kWhole> shape;

  // Parts are whole groups of elements; the last one is the rest, which may be empty.
  __device__ RowPart(int32_t size, int element_bytes, int part, int num_parts) {
    const int groups = (size + kGroup - 1) / kGroup;
    const int of_part = (groups + num_parts - 1) / num_parts * kGroup;
    const int first = min(part * of_part, size);
    begin = int64_t{first} * element_bytes;
    shape.size = min(of_part, size - first);
  }
};

// Copy a row to the addresses of all lanes of this warp that are not null.
template <bool kWhole>
__device__ void CopyRow(const char* from, RowShape<kWhole> shape, char* to) {
  const int lane = threadIdx.x % 32;
  const uint32_t all = __ballot_sync(~0u, to != nullptr);
  if (all == 0) return;
  for (int base = 0; base < shape.num_groups(); base += 32 * kWordsInFlight) {
    Packed<uint16_t> groups[kWordsInFlight];
#pragma unroll
    for (int i = 0; i < kWordsInFlight; ++i) {
      const int group = base + i * 32 + lane;
      if (group < shape.num_groups()) groups[i] = LoadGroup<uint16_t>(from, group, shape);
    }
    for (uint32_t lanes = all; lanes != 0; lanes &= lanes - 1) {
      const auto address = reinterpret_cast<uint64_t>(to);
      char* of_lane = reinterpret_cast<char*>(__shfl_sync(~0u, address, __ffs(lanes) - 1));
#pragma unroll
      for (int i = 0; i < kWordsInFlight; ++i) {
        const int group = base + i * 32 + lane;
        if (group < shape.num_groups()) StoreGroup(of_lane, group, shape, groups[i]);
      }
    }
  }
}

class SignalledOp : public RankOp {
 public:
  __device__ SignalledOp(const OpFrame& frame, const SignalledFrame& signalled, Shared* shared)
      : RankOp(frame, shared), signalled_(signalled) {}

  // Announce this op to all peers. By the first block, after Begin.
  __device__ void Announce() {
    if (blockIdx.x != 0) return;
    const int lane = threadIdx.x % 32;
    for (int peer = threadIdx.x / 32; peer < num_ranks(); peer += blockDim.x / 32) {
      DeviceControl& control = *frame_.control[peer];
      if (lane < Publication::kWords) {
        reinterpret_cast<uint64_t*>(&control.published[frame_.rank])[lane] = WordToPublish(lane);
      }
      __syncwarp();
      // Pairs with the acquire loads in WaitForAll of group_op.cuh and in HasOtherOp, on the peer.
      if (lane == 0) StoreReleaseSystem(&control.arrived[frame_.rank], step());
    }
  }

  // The slot to which `source` pushes the data of one of its own tokens, or of one of the owner's.
  __device__ Slot SlotOf(int owner, int source, int token) const {
    char* control = reinterpret_cast<char*>(frame_.control[owner]);
    return {control + signalled_.window.SlotOffset(step(), source, token),
            signalled_.window.row_offset};
  }

  // Signal to the owner of a slot that this warp has written a part of it; every lane may have a
  // slot.
  __device__ void Send(bool sends, const Slot& slot, int part, bool has_row) const {
    __syncwarp();
    if (!sends) return;
    Signal* signal = slot.signals() + part;
    signal->op_hash = SignalHash(has_row);
    StoreReleaseSystem(&signal->step, step());  // pairs with the acquire load in Wait, on the owner
  }

  // Push a part of the row of a token to the ranks of the lanes with `leads`, and send the signal
  // to all ranks.
  template <bool kWhole>
  __device__ void PushRow(const char* row, int64_t row_bytes, int token, int part, int32_t rank,
                          bool leads) const {
    const int lane = threadIdx.x % 32, self = frame_.rank;
    const RowPart<kWhole> words(static_cast<int>(row_bytes / 2), 2, part, signalled_.num_parts);
    if (words.shape.size > 0) {
      char* to = leads ? SlotOf(rank, self, token).row() + words.begin : nullptr;
      CopyRow<kWhole>(row + words.begin, words.shape, to);
    }
    // A lane for each peer; the lanes of entries know which peers have a row of the token.
    for (int base = 0; base < num_ranks(); base += 32) {
      const int peer = base + lane;
      bool has_row = false;
      for (uint32_t lanes = __ballot_sync(~0u, leads); lanes != 0; lanes &= lanes - 1) {
        has_row |= __shfl_sync(~0u, rank, __ffs(lanes) - 1) == peer;
      }
      const bool sends = peer < num_ranks();
      Send(sends, SlotOf(sends ? peer : self, self, token), part, has_row);
    }
  }

  // Wait until a part of the slot of every lane with `waits` has arrived from its source. Returns
  // false for all lanes if the op is lost; sets `has_row` to whether the lane's slot has a row.
  __device__ bool Wait(bool waits, const Slot& slot, int part, int source, bool* has_row) {
    const Signal* signal = slot.signals() + part;
    const uint64_t began_ns = NanosecondClock();
    constexpr int kLoadsBetweenChecks = 32;  // a check takes longer than a peer's store
    bool here = !waits, differs = false, late = false, stopped = false;
    *has_row = false;
    for (int i = 1;; ++i) {
      if (!here && LoadAcquireSystem(&signal->step) == step()) {
        here = true;
        const uint64_t hash = *static_cast<const volatile uint64_t*>(&signal->op_hash);
        *has_row = (hash & 1) != 0;
        differs = (hash | 1) != (frame_.op_hash | 1);
      }
      if (__all_sync(~0u, here) || __any_sync(~0u, differs)) break;
      if (i % kLoadsBetweenChecks != 0) continue;
      if (!here) {
        stopped = IsBroken();
        late = NanosecondClock() - began_ns > frame_.timeout_ns;
        // Load the step again after the announcement: a peer that is already in a later op has sent
        // this signal before.
        differs = HasOtherOp(source) && LoadAcquireSystem(&signal->step) != step();
      }
      if (__any_sync(~0u, stopped || late || differs)) break;
    }
    if (__any_sync(~0u, stopped)) return false;
    if (const uint32_t lanes = __ballot_sync(~0u, differs); lanes != 0) {
      const int other = __shfl_sync(~0u, source, __ffs(lanes) - 1);
      if (threadIdx.x % 32 == 0) FailWithOtherOp(other);
      return false;
    }
    if (!__any_sync(~0u, late)) return true;
    const uint32_t low = __reduce_or_sync(~0u, !here && source < 32 ? 1u << source : 0u);
    const uint32_t high = __reduce_or_sync(~0u, !here && source >= 32 ? 1u << (source - 32) : 0u);
    if (threadIdx.x % 32 == 0) Fail(Failure::kNotArrived, uint64_t{high} << 32 | low);
    return false;
  }

  // End the op: the last block calls succeed() or fail().
  template <typename Succeed, typename Fill>
  __device__ void Finish(Succeed succeed, Fill fail) {
    if (shared_.refused) {  // the counters belong to the other op
      fail();
      return;
    }
    if (!IsLastBlock(&own_.num_finished)) return;
    for (int peer = threadIdx.x; peer < num_ranks(); peer += blockDim.x) {
      frame_.control[peer]->rows_taken[frame_.rank] =
          *static_cast<volatile uint64_t*>(&own_.rows_received[peer]);
    }
    End(succeed, fail);
  }

 private:
  __device__ uint64_t SignalHash(bool has_row) const {
    return (frame_.op_hash & ~uint64_t{1}) | (has_row ? 1 : 0);
  }

  // Whether a peer has announced another op at this step.
  __device__ bool HasOtherOp(int peer) const {
    if (LoadAcquireSystem(&own_.arrived[peer]) < step()) return false;
    return LoadAcquireSystem(&own_.published[peer].op_hash) != frame_.op_hash;
  }

  // The peer has announced its op, or will.
  __device__ void FailWithOtherOp(int peer) {
    const uint64_t began_ns = NanosecondClock();
    while (LoadAcquireSystem(&own_.arrived[peer]) < step() &&
           NanosecondClock() - began_ns < frame_.timeout_ns) {
    }
    Fail(Failure::kDifferentOps, 0, peer);
  }

  const SignalledFrame& signalled_;
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_LOW_LATENCY_SIGNALLED_OP_CUH_
