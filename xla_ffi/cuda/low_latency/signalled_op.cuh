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

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cuda/low_latency/slot.cuh"
#include "cuda/low_latency/window.h"
#include "cuda/memory_order.cuh"
#include "cuda/op_frame.h"
#include "cuda/rank_op.cuh"
#include "cuda/warp_items.cuh"

namespace jax_deepep {

// What all kernels of this mode take besides their parameters.
struct SignalledFrame {
  WindowLayout window;
  int32_t num_parts = 1;
  int32_t num_slots = 1;  // of a source, in this op: T, and at least 1

  // With rows in one part if they must be whole. Between nodes so many bytes of a token cross
  // beside its row: see put_areas.h.
  static SignalledFrame Of(const OpFrame& frame, const RowFormat& rows, int num_tokens,
                           int64_t /*value_bytes*/, bool whole = false) {
    return {WindowLayout(frame.shape, frame.window),
            whole ? 1 : NumParts(frame.shape, num_tokens, rows), std::max(num_tokens, 1)};
  }
};

// A part of a slot that a warp has written, the same slot on several ranks.
struct Sent {
  int64_t offset;  // of the slot
  int32_t part;
  RankSet to;       // the ranks that get a signal
  RankSet has_row;  // those whose slot has a row
};

// Slots of this rank's window: At(i) for i < count.
struct AllSlots {
  int count;
  __device__ int At(int index) const { return index; }
};

// What a wait is for: see ForArrivals in group_op.cuh.
struct ForSources {
  static constexpr bool kIndirect = false;
  static constexpr Failure kFailure = Failure::kNotArrived;
};

// `Peers` push to each other.
template <typename Peers>
class SignalledOpOf : public RankOpOf<Peers::kSeveralNodes> {
 protected:
  using OfRank = RankOpOf<Peers::kSeveralNodes>;
  using OfRank::channel_, OfRank::frame_, OfRank::shared_;
  using OfRank::Fail, OfRank::IsBroken, OfRank::num_ranks;

 public:
  using OfRank::Enter, OfRank::step;
  static constexpr bool kSeveralNodes = Peers::kSeveralNodes;
  using Frame = SignalledFrame;

  struct Shared {
    typename OfRank::Shared of_rank;
    Sent sent[kWarps];
  };

  __device__ SignalledOpOf(const OpFrame& frame, const Frame& signalled, Shared* shared)
      : OfRank(frame, &shared->of_rank), signalled_(signalled), sent_(shared->sent) {}

  __device__ int first_peer() const { return Peers::First(frame_); }
  __device__ int end_peer() const { return Peers::End(frame_); }

  // As in RankOp.
  __device__ bool Begin() {
    Enter();
    return Entered();
  }
  __device__ bool Entered() {
    const bool entered = OfRank::Entered();
    bank_offset_ = signalled_.window.BankOffset(frame_.channel, step());
    return entered;
  }

  // Which halves of the op this kernel does.
  __device__ bool sends() const { return frame_.part != Part::kDone; }
  __device__ bool receives() const { return frame_.part != Part::kStart; }

  // Announce this op to all peers. By every warp once it has pushed: one of the block with the
  // fewest items does it, so that no other waits for these stores.
  __device__ void Announce(int by_warp = kWarps - 1) {
    if (blockIdx.x != gridDim.x - 1 || static_cast<int>(threadIdx.x) / 32 != by_warp) return;
    const int lane = threadIdx.x % 32;
    for (int peer = first_peer(); peer < end_peer(); ++peer) {
      // Its own may still be the source of a put of throughput mode.
      if (kSeveralNodes && peer == frame_.rank) continue;
      auto* words = reinterpret_cast<uint64_t*>(&frame_.ChannelOf(peer).published[frame_.rank]);
      if (lane < Publication::kWords) words[lane] = this->WordToPublish(lane);
    }
    __syncwarp();
    for (int peer = first_peer() + lane; peer < end_peer(); peer += 32) {
      // Pairs with the acquire loads in WaitForAll of group_op.cuh and in FailWithOtherOp, on the
      // peer.
      StoreReleaseSystem(&frame_.ChannelOf(peer).arrived[frame_.rank], step());
      OfRank::Announce(peer);
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
    if (PushRounds(num_items, push)) SendSignals(kThreads);
  }
  // The same without the signals of the last round. Whether there was one.
  template <typename Push>
  __device__ __forceinline__ bool PushRounds(int num_items, Push push) {
    const auto first = static_cast<int>(blockIdx.x);
    for (int base = 0; base + first < num_items; base += NumWarps()) {
      if (base > 0) {
        SendSignals(kThreads);
        __syncthreads();
      }
      const int item = base + FirstItem();
      Sent& sent = sent_[threadIdx.x / 32];
      if (item < num_items) {
        push(item, &sent);
      } else {
        SetRank(&sent.to, kNone);
      }
      __syncthreads();
    }
    return first < num_items;
  }
  // By the first threads of a block.
  __device__ __forceinline__ void SendSignals(int num_threads) {
    for (int i = threadIdx.x; i < NumSignals(); i += num_threads) {
      const Sent& of_warp = sent_[i % kWarps];
      const int peer = first_peer() + i / kWarps;
      if (!of_warp.to.Has(peer)) continue;
      const bool has_row = of_warp.has_row.Has(peer);
      // Pairs with the acquire load in Wait, on the owner.
      StoreReleaseSystem(SlotAt(peer, of_warp.offset).signals() + of_warp.part,
                         SignalOf(frame_.op_hash, step(), has_row));
      if (has_row && of_warp.part == 0) CountPushed(peer);
    }
  }
  // That a block sends at most in a round.
  __device__ int NumSignals() const { return kWarps * (end_peer() - first_peer()); }

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

  // Push a part of the row of a token to the ranks of all lanes, and copy it to what lanes have in
  // `copy`, unless that is null. They get its signals, or all do.
  template <typename Part>
  __device__ __forceinline__ void PushRow(Part& from, int token, int part, int32_t rank,
                                          bool to_all, Sent* sent, char* copy = nullptr) const {
    const uint32_t copies = kSeveralNodes ? __ballot_sync(~0u, copy != nullptr) : 0;
    const int lane = threadIdx.x % 32;
    const int64_t offset = SlotOffset(frame_.rank, token);
    if (lane == 0) {
      sent->offset = offset;
      sent->part = part;
    }
    for (int base = 0; base < num_ranks(); base += 32) {
      const uint32_t ranks = RanksOfLanes(rank, base);
      if (ranks != 0 || (base == 0 && copies != 0)) {
        if (base > 0) from.Load();  // the first chunk may be another by now
        from.CopyTo([&](auto store) {
          ForBits(ranks, [&](int i) { store(SlotAt(base + i, offset).row()); });
          if (base == 0) ForBits(copies, [&](int i) { store(PointerOfLane(copy, i)); });
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
  __device__ void CountPushed(int peer) const { Add(&channel_.rows_pushed[peer], 1); }
  __device__ void CountReceived(int peer) const { Add(&channel_.rows_received[peer], 1); }

  // Where combine pushes the sums for the tokens of a rank: the owner of a slot, and its source.
  __device__ int AdderOf(int owner) const { return owner; }
  __device__ int SourceForAdder(int /*owner*/) const { return frame_.rank; }

  // Call receive(slots), which returns whether the slots of this rank's window have arrived, for
  // all of them. pass(...) is for several nodes.
  template <typename Pass, typename Receive>
  __device__ __forceinline__ bool ReceiveFromAll(Pass /*pass*/, Receive receive) {
    return receive(AllSlots{num_ranks() * signalled_.num_slots});
  }
  // Whether the row of a token arrives in this rank's window, with a signal; and where it is then.
  __device__ bool IsPushed(int /*source*/) const { return true; }
  __device__ const char* RowFrom(const Slot& slot, int /*source*/, int /*token*/) const {
    return slot.row();
  }

  // Wait until look() of every lane returns kNone instead of the rank that it waits for. Returns
  // false for all lanes if the op is lost.
  template <typename For = ForSources, typename Look>
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
        trouble = Check<For>(source, began_ns);
      }
      if (__any_sync(~0u, trouble != Trouble::kNone)) return EndWait<For>(source, trouble);
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
  // matter, `lost` on any thread. The end of the kernel publishes their results, so that the count
  // of blocks orders nothing and does not wait for their stores.
  template <typename Succeed, typename Fill>
  __device__ void Finish(bool lost, Succeed succeed, Fill fail) {
    if (shared_.refused) {  // the counters belong to the other op
      fail();
      return;
    }
    lost = !__syncthreads_and(!lost);
    if (threadIdx.x == 0) {
      const uint64_t added = uint64_t{shared_.num_invalid} << 32 | (lost ? 1u << 16 : 0u) | 1;
      shared_.ended = Add(&channel_.ended, added) + added;
    }
    __syncthreads();
    // After this block's results. Waits for their stores, but nothing waits for it.
    if (threadIdx.x == blockDim.x - 1) AddRelease(&channel_.num_written, 1);
    const uint64_t ended = shared_.ended;
    if ((ended & 0xffff) != gridDim.x) return;
    lost = (ended >> 16 & 0xffff) != 0;
    if (threadIdx.x == 0) {
      channel_.ended = 0;
      // What fail() writes comes after the results of other blocks; what the ranks of a node are
      // told (SignalledNodeOp::Leave), after what they have counted. More have written if two ops
      // run at once, which fails, and less than none for a moment after the op before.
      if (lost || kSeveralNodes) {
        while (static_cast<int32_t>(LoadAcquireDevice(&channel_.num_written) - gridDim.x) < 0) {
        }
      }
      atomicAdd(&channel_.num_written, 0u - gridDim.x);
    }
    __syncthreads();
    this->End(lost, [&] { succeed(static_cast<uint32_t>(ended >> 32)); }, fail);
  }

  // Count entries of topk_idx that the op ignores.
  __device__ void CountInvalid(int count) { atomicAdd(&shared_.num_invalid, count); }

 private:
  enum class Trouble : int { kNone, kStopped, kLate, kOtherOp };

  // Whether the wait of a lane for a rank must end.
  template <typename For>
  __device__ __noinline__ Trouble Check(int source, uint64_t began_ns) const {
    if (IsBroken()) return Trouble::kStopped;
    if (this->IsInOtherOp(source)) return Trouble::kOtherOp;
    const uint64_t limit_ns = frame_.timeout_ns + (For::kIndirect ? frame_.timeout_ns / 4 : 0);
    return NanosecondClock() - began_ns > limit_ns ? Trouble::kLate : Trouble::kNone;
  }

  // The end of a wait of all lanes, for `source` each or kNone. False: the op is lost.
  template <typename For>
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
    if (lane == 0) Fail(For::kFailure, missing);
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

using SignalledOp = SignalledOpOf<WholeGroup>;

static_assert(sizeof(SignalledOp::Shared) <= kStaticSharedBytes);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_LOW_LATENCY_SIGNALLED_OP_CUH_
