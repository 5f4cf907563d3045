// How the ranks of an EP group synchronise in low-latency mode: one one-way message per peer.
//
//     Begin | push rows, then their Signals | Wait for everyone's | read own window | Finish
//
// In every op a rank hears of each slot from its source, whether it has a row or not: by packets in
// dispatch, whose rows alone then have a Signal, and by a Signal otherwise. It waits for all slots
// of its own window. So a rank that begins op n has heard from all peers in op n - 1; each of them
// had then ended op n - 2, and with it its reads of the bank that op n writes. No peer reads this
// rank's arrays, so there is no wait at the end.
//
// A started op ends after its pushes (OpFrame::part); the call that ends it begins with Wait. Both
// have one step and one signature.
//
// The rank also announces the op to its peers (Announce): a peer that waits in another op, of
// either mode, detects it.
//
// tests/unit/protocol_low_latency.py models this protocol step by step.
#ifndef JAX_DEEPEP_CUDA_LOW_LATENCY_SIGNALLED_OP_CUH_
#define JAX_DEEPEP_CUDA_LOW_LATENCY_SIGNALLED_OP_CUH_

#include <cstdint>
#include <cstring>

#include "cuda/low_latency/window.h"
#include "cuda/memory_order.cuh"
#include "cuda/op_frame.h"
#include "cuda/rank_op.cuh"
#include "cuda/row_copies.cuh"
#include "cuda/warp_items.cuh"

namespace jax_deepep {

// What all kernels of this mode take besides their parameters.
struct SignalledFrame {
  WindowLayout window;
  int32_t num_parts = 1;
  int32_t num_slots = 1;  // of a source, in this op: T, and at least 1
};

static_assert(sizeof(Packet) == kPacketBytes && sizeof(SlotEntry) == sizeof(Packet::value));

// Words of 16 bytes of a row that a lane has in flight: there are many warps with a part each.
inline constexpr int kWordsOfPart = 4;

// A slot of a window, on this rank or on a peer.
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

// A part of a row, whose first chunk a warp loads early. `Row` as in RowChunk.
template <typename Row>
struct LoadedPart {
  using Chunk = RowChunk<Row, kWordsOfPart>;
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
using EncodedPart = PartToEncode<Type, kWhole, kFormat, kWordsOfPart, /*kOutOfLine=*/true>;

// Call use(bit) for the bits of a mask, in ascending order.
template <typename Use>
__device__ __forceinline__ void ForBits(uint32_t mask, Use use) {
  for (; mask != 0; mask &= mask - 1) use(__ffs(mask) - 1);
}

// A part of a slot that a warp has written, the same slot on several ranks.
struct Sent {
  int64_t offset;  // of the slot
  int32_t part;
  RankSet to;       // the ranks that get a signal
  RankSet has_row;  // those whose slot has a row
};

class SignalledOp : public RankOp {
 public:
  struct Shared {
    RankOp::Shared of_rank;
    Sent sent[kWarps];
  };

  __device__ SignalledOp(const OpFrame& frame, const SignalledFrame& signalled, Shared* shared)
      : RankOp(frame, &shared->of_rank), signalled_(signalled), sent_(shared->sent) {}

  // As in RankOp.
  __device__ bool Begin() {
    Enter();
    return Entered();
  }
  __device__ bool Entered() {
    const bool entered = RankOp::Entered();
    bank_offset_ = signalled_.window.BankOffset(frame_.channel, step());
    return entered;
  }

  // Which halves of the op this kernel does.
  __device__ bool sends() const { return frame_.part != Part::kDone; }
  __device__ bool receives() const { return frame_.part != Part::kStart; }

  // Announce this op to all peers. By every warp once it has pushed: the one with the fewest
  // items does it, so that no other waits for these stores.
  __device__ void Announce() {
    if (FirstItem() != NumWarps() - 1) return;
    const int lane = threadIdx.x % 32;
    for (int peer = 0; peer < num_ranks(); ++peer) {
      auto* words = reinterpret_cast<uint64_t*>(&frame_.ChannelOf(peer).published[frame_.rank]);
      if (lane < Publication::kWords) words[lane] = WordToPublish(lane);
    }
    __syncwarp();
    for (int peer = lane; peer < num_ranks(); peer += 32) {
      // Pairs with the acquire loads in WaitForAll of group_op.cuh and in FailWithOtherOp, on the
      // peer.
      StoreReleaseSystem(&frame_.ChannelOf(peer).arrived[frame_.rank], step());
      RankOp::Announce(peer);
    }
  }

  // The slot to which `source` pushes the data of one of its own tokens, or of one of the owner's.
  __device__ Slot SlotOf(int owner, int source, int token) const {
    return SlotAt(owner, SlotOffset(source, token));
  }
  // The same slot on any owner.
  __device__ int64_t SlotOffset(int source, int token) const {
    return bank_offset_ + signalled_.window.SlotOffset(source, token);
  }
  __device__ Slot SlotAt(int owner, int64_t offset) const {
    return {reinterpret_cast<char*>(frame_.control[owner]) + offset, signalled_.window.row_offset};
  }
  // What packets of this op have as tag, and signals if there is a row.
  __device__ Signal Tag() const { return SignalOf(frame_.op_hash, step(), true); }

  // Call push(item, sent) for the items of all warps, one of each warp in a round. It writes a part
  // of a slot on peers and says which, in shared memory. After every round, the block sends the
  // signals: a release store waits for all stores of the SM, so that one of each warp would take
  // longer.
  template <typename Push>
  __device__ __forceinline__ void PushItems(int num_items, Push push) {
    for (int base = 0; base + static_cast<int>(blockIdx.x) < num_items; base += NumWarps()) {
      if (base > 0) __syncthreads();
      const int item = base + FirstItem();
      Sent& sent = sent_[threadIdx.x / 32];
      if (item < num_items) {
        push(item, &sent);
      } else {
        SetRank(&sent.to, kNone);
      }
      __syncthreads();
      for (int i = threadIdx.x; i < kWarps * num_ranks(); i += kThreads) {
        const Sent& of_warp = sent_[i % kWarps];
        const int peer = i / kWarps;
        if (!of_warp.to.Has(peer)) continue;
        const bool has_row = of_warp.has_row.Has(peer);
        // Pairs with the acquire load in Wait, on the owner.
        StoreReleaseSystem(SlotAt(peer, of_warp.offset).signals() + of_warp.part,
                           SignalOf(frame_.op_hash, step(), has_row));
        if (has_row && of_warp.part == 0) CountPushed(peer);
      }
    }
  }

  // Push an entry that accompanies a row. Every op that does so pushes all of a slot, to all ranks.
  __device__ void PushEntry(int peer, int64_t slot_offset, int index, SlotEntry entry) const {
    Packet packet;
    memcpy(&packet.value, &entry, sizeof(entry));
    packet.tag = Tag();
    StorePacket(SlotAt(peer, slot_offset).packets() + index, packet);
  }
  // Whether it has arrived.
  __device__ bool HasEntry(const Slot& slot, int index, SlotEntry* entry) const {
    const Packet packet = LoadPacket(slot.packets() + index);
    memcpy(entry, &packet.value, sizeof(*entry));
    return packet.tag == Tag();
  }

  // Push a part of the row of a token to the ranks of all lanes. They get its signals, or all do.
  template <typename Part>
  __device__ __forceinline__ void PushRow(Part& from, int token, int part, int32_t rank,
                                          bool to_all, Sent* sent) const {
    const int lane = threadIdx.x % 32;
    const int64_t offset = SlotOffset(frame_.rank, token);
    if (lane == 0) {
      sent->offset = offset;
      sent->part = part;
    }
    for (int base = 0; base < num_ranks(); base += 32) {
      const uint32_t ranks = RanksOfLanes(rank, base);
      if (ranks != 0) {
        if (base > 0) from.Load();  // the first chunk may be another by now
        from.CopyTo([&](auto store) {
          ForBits(ranks, [&](int i) { store(SlotAt(base + i, offset).row()); });
        });
      }
      if (lane == 0) {
        sent->has_row.words[base / 32] = ranks;
        sent->to.words[base / 32] = to_all ? ~0u : ranks;
      }
    }
  }

  // Set to one rank, which may be kNone.
  __device__ static void SetRank(RankSet* ranks, int32_t rank) {
    const int lane = threadIdx.x % 32;
    if (lane < RankSet::kWords)
      ranks->words[lane] = rank / 32 == lane && rank >= 0 ? 1u << rank % 32 : 0u;
  }

  // Count a row that this rank has pushed, where PushItems does not, or received. By one lane.
  __device__ void CountPushed(int peer) const { Count(&channel_.rows_pushed[peer]); }
  __device__ void CountReceived(int peer) const { Count(&channel_.rows_received[peer]); }

  // Wait until look() of every lane returns kNone instead of the rank that it waits for. Returns
  // false for all lanes if the op is lost.
  template <typename Look>
  __device__ __forceinline__ bool WaitUntil(Look look) {
    constexpr int kLooksBetweenChecks = 32;  // a check takes longer than a peer's store
    constexpr int kUnknown = -2;
    int source = kUnknown;
    uint64_t began_ns = 0;
    for (int i = 0;; ++i) {
      if (source != kNone) source = look();
      if (__all_sync(~0u, source == kNone)) return true;
      if (i == 0) began_ns = NanosecondClock();
      Trouble trouble = Trouble::kNone;
      if (source != kNone && i % kLooksBetweenChecks == kLooksBetweenChecks - 1) {
        trouble = Check(source, began_ns);
      }
      if (__any_sync(~0u, trouble != Trouble::kNone)) return EndWait(source, trouble);
    }
  }

  // Wait until a part of the slot of every lane with `waits` has arrived from its source. Returns
  // false for all lanes if the op is lost; sets `has_row` to whether the lane's slot has a row.
  __device__ __forceinline__ bool Wait(bool waits, const Slot& slot, int part, int source,
                                       bool* has_row) {
    const Signal* signal = slot.signals() + part;
    const Signal expected = Tag();
    *has_row = false;
    return WaitUntil([&] {
      if (!waits) return kNone;
      const Signal found = LoadAcquireSystem(signal);
      if ((found | 1) != expected) return source;
      *has_row = (found & 1) != 0;
      return kNone;
    });
  }

  // End the op: the last block calls succeed(number of invalid entries) or fail(). All data that
  // this rank has waited for is of this op, whatever happens to its peers, so only its own blocks
  // matter, `lost` on any thread.
  template <typename Succeed, typename Fill>
  __device__ void Finish(bool lost, Succeed succeed, Fill fail) {
    if (shared_.refused) {  // the counter belongs to the other op
      fail();
      return;
    }
    lost = !__syncthreads_and(!lost);
    if (threadIdx.x == 0) {
      const uint64_t added = uint64_t{shared_.num_invalid} << 32 | (lost ? 1u << 16 : 0u) | 1;
      // Releases this block's results: they come before those that fail() writes.
      shared_.ended = AddAcquireRelease(&channel_.ended, added) + added;
    }
    __syncthreads();
    const uint64_t ended = shared_.ended;
    if ((ended & 0xffff) != gridDim.x) return;
    channel_.ended = 0;
    End((ended >> 16 & 0xffff) != 0, [&] { succeed(static_cast<uint32_t>(ended >> 32)); }, fail);
  }

  // Count entries of topk_idx that the op ignores.
  __device__ void CountInvalid(int count) { atomicAdd(&shared_.num_invalid, count); }

 private:
  __device__ static void Count(uint64_t* counter) {
    atomicAdd(reinterpret_cast<unsigned long long*>(counter), 1ull);
  }

  enum class Trouble : int { kNone, kStopped, kLate, kOtherOp };

  // Whether the wait of a lane for a rank must end.
  __device__ __noinline__ Trouble Check(int source, uint64_t began_ns) const {
    if (IsBroken()) return Trouble::kStopped;
    if (IsInOtherOp(source)) return Trouble::kOtherOp;
    return NanosecondClock() - began_ns > frame_.timeout_ns ? Trouble::kLate : Trouble::kNone;
  }

  // The end of a wait of all lanes, for `source` each or kNone. False: the op is lost.
  __device__ __noinline__ bool EndWait(int source, Trouble trouble) {
    const int lane = threadIdx.x % 32;
    if (__any_sync(~0u, trouble == Trouble::kStopped)) return false;
    if (const uint32_t lanes = __ballot_sync(~0u, trouble == Trouble::kOtherOp); lanes != 0) {
      const int other = __shfl_sync(~0u, source, __ffs(lanes) - 1);
      if (lane == 0) FailWithOtherOp(other);
      return false;
    }
    RankSet missing;
    for (int i = 0; i < RankSet::kWords; ++i) missing.words[i] = RanksOfLanes(source, 32 * i);
    if (lane == 0) Fail(Failure::kNotArrived, missing);
    return false;
  }

  // The peer has published its op, or will.
  __device__ void FailWithOtherOp(int peer) {
    const uint64_t began_ns = NanosecondClock();
    while (LoadAcquireSystem(&channel_.arrived[peer]) < step() &&
           NanosecondClock() - began_ns < frame_.timeout_ns) {
    }
    Fail(Failure::kDifferentOps, {}, peer);
  }

  const SignalledFrame& signalled_;
  Sent* sent_;
  int64_t bank_offset_ = 0;  // of this op
};

static_assert(sizeof(SignalledOp::Shared) <= kStaticSharedBytes);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_LOW_LATENCY_SIGNALLED_OP_CUH_
