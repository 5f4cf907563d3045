// How the ranks of an EP group synchronise in one op, on the device, without the host.
//
//     Begin | write what peers read | Publish | WaitForArrivals | read peers | Finish
//
// Rows that a rank sums may be ready later, in parts: SignalPart | WaitForPart | read.
//
// Begin, SyncGrid and WaitForArrivals return false if the op is lost: skip to Finish then.
//
// 1. Publish: the last block of a rank notifies every peer, after all writes of the rank.
// 2. WaitForArrivals: every block waits until all peers have published, so that it may read them.
// 3. Finish: the last block notifies every peer that this rank has completed its reads, and waits
//    until all peers have completed theirs: only then may XLA reuse what they read.
//
// A step is an op of the channel, counted in device memory: a replayed graph is as good as a
// fresh launch. Flags only grow, so that nothing is ever reset. A rank that waits longer than the
// timeout aborts: it reports to all peers and its host, and leaves. A peer that still reads then
// may read what XLA has reused; it checks for a report after its last load, in Finish, and fails
// too. It forwards the report before it leaves: a rank that leaves a failed op has notified all
// others.
//
// tests/unit/protocol_throughput.py and protocol_parts.py model this protocol step by step, and
// search all runs of a few ranks. Between nodes, the ranks of a node synchronise in this way: see
// internode/node_op.cuh.
#ifndef JAX_DEEPEP_CUDA_GROUP_OP_CUH_
#define JAX_DEEPEP_CUDA_GROUP_OP_CUH_

#include <cstdint>

#include "cuda/memory_order.cuh"
#include "cuda/op_frame.h"
#include "cuda/rank_op.cuh"
#include "cuda/warp_items.cuh"

namespace jax_deepep {

// What a wait is for.
struct ForArrivals {
  static constexpr bool kArrivals = true;  // peers whose ops are to be compared
  static constexpr int kOpsBefore = 0;     // the last op of the channel, or the one before it
  // Whether a peer may wait for others in turn. Then the wait lasts longer than theirs, so that who
  // waits for a missing rank itself reports it.
  static constexpr bool kIndirect = false;
  static constexpr bool kByAllBlocks = true;
};
struct ForLeaving : ForArrivals {
  static constexpr bool kArrivals = false;
};

template <typename Peers>
class GroupOpOf : public RankOpOf<Peers::kSeveralNodes> {
 protected:
  using OfRank = RankOpOf<Peers::kSeveralNodes>;
  using OfRank::channel_, OfRank::frame_, OfRank::shared_;
  using OfRank::Fail, OfRank::IsBroken, OfRank::IsLastBlock, OfRank::num_ranks, OfRank::SharedFlag,
      OfRank::Stopped;

 public:
  using OfRank::step;
  static constexpr bool kSeveralNodes = Peers::kSeveralNodes;
  static constexpr bool kInChunks = false;  // see NodeOpOf

  struct PartOfBlock {
    uint32_t num_written;  // warps of this block that have written theirs
    uint32_t found;        // by this block, of all ranks
  };
  struct Shared {
    typename OfRank::Shared of_rank;
    const char* operands[kMaxOperands][kMaxRanks];
    PartOfBlock parts[kMostParts];
  };

  // Begin follows, and orders what is cleared here.
  __device__ GroupOpOf(const OpFrame& frame, Shared* shared)
      : OfRank(frame, &shared->of_rank), operands_(shared->operands), parts_(shared->parts) {
    if (threadIdx.x < kMostParts) parts_[threadIdx.x] = {0, kNotSought};
  }

  __device__ int first_peer() const { return Peers::First(frame_); }
  __device__ int end_peer() const { return Peers::End(frame_); }

  // Wait for all blocks of this rank; their earlier writes are visible afterwards. Meanwhile call
  // work(), which does not use what other blocks write.
  template <typename Work>
  __device__ bool SyncGrid(Work work) {
    __syncthreads();
    uint32_t generation = 0;
    bool waits = false;
    if (threadIdx.x == 0) {
      shared_.flag = true;
      generation = LoadAcquireDevice(&channel_.generation);
      waits = AddAcquireRelease(&channel_.num_waiting, 1) != gridDim.x - 1;
      if (!waits) {
        channel_.num_waiting = 0;
        StoreReleaseDevice(&channel_.generation, generation + 1);  // pairs with the load below
      }
    }
    work();
    if (waits) {
      const uint64_t began_ns = NanosecondClock();
      // Checking whether the op is lost takes longer than the other blocks do.
      constexpr int kLoadsBetweenChecks = 256;
      for (int i = 1; LoadAcquireDevice(&channel_.generation) == generation; ++i) {
        if (i % kLoadsBetweenChecks != 0) continue;
        if (NanosecondClock() - began_ns > frame_.timeout_ns) Fail(Failure::kNoRoom);
        if (IsBroken()) {
          shared_.flag = false;
          break;
        }
      }
    }
    return SharedFlag();
  }

  // Let peers read what this rank's blocks have written so far with ordinary stores.
  __device__ void Publish() {
    if (!IsLastBlock(&channel_.num_ready)) return;
    const int lane = threadIdx.x % 32;
    for (int peer = first_peer() + threadIdx.x / 32; peer < end_peer(); peer += blockDim.x / 32) {
      Channel& channel = frame_.ChannelOf(peer);
      if (lane < Publication::kWords) {
        reinterpret_cast<uint64_t*>(&channel.published[frame_.rank])[lane] =
            this->WordToPublish(lane);
      }
      __syncwarp();
      // Pairs with the acquire load in WaitForAll, on the peer. IsLastBlock orders the other
      // blocks' writes before it.
      if (lane == 0) {
        StoreReleaseSystem(&channel.arrived[frame_.rank], step());
        this->Announce(peer);
      }
    }
  }

  // Wait until all peers have published the same op. False: they must not be read.
  __device__ bool WaitForArrivals() {
    if (!WaitForPeers<ForArrivals>(channel_.arrived)) return false;
    const int first = first_peer(), num_peers = end_peer() - first;
    for (int i = threadIdx.x; i < num_peers * kMaxOperands; i += blockDim.x) {
      const int rank = first + i / kMaxOperands, index = i % kMaxOperands;
      operands_[index][rank] = frame_.pool[rank] + channel_.published[rank].offsets[index];
    }
    __syncthreads();
    return true;
  }

  // This warp has written what it has of a part of this rank's rows. After the last warp of all
  // blocks peers may read it. Publish does so for the first part.
  __device__ void SignalPart(int part) {
    if (part == 0) return;
    bool is_last = false;
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      // Once per block: an order for the whole device waits for all stores of the SM.
      is_last = AddAcquireReleaseBlock(&parts_[part].num_written, 1) == blockDim.x / 32 - 1 &&
                AddAcquireRelease(&channel_.num_in_part[part], 1) >= gridDim.x - 1;
      if (is_last) channel_.num_in_part[part] = 0;
    }
    __syncwarp();
    if (!__any_sync(~0u, is_last)) return;
    for (int peer = first_peer() + threadIdx.x % 32; peer < end_peer(); peer += 32) {
      // Pairs with the acquire load in PollPart, on the peer. The counters order the other warps'
      // writes before it.
      StoreReleaseSystem(&frame_.ChannelOf(peer).part_ready[frame_.rank][part], step());
    }
  }

  // Wait until all ranks have written a part of their rows; by a warp. False: the op is lost. One
  // warp of a block polls the flags: if all did, they would delay those who write them.
  __device__ bool WaitForPart(int part) {
    uint32_t& found = parts_[part].found;
    uint32_t before = 0;
    if (threadIdx.x % 32 == 0) before = atomicCAS(&found, kNotSought, kSought);
    if (__shfl_sync(~0u, before, 0) == kNotSought) {
      const bool here = PollPart(part);
      if (threadIdx.x % 32 == 0) StoreReleaseBlock(&found, here ? kHere : kLost);
      __syncwarp();
      return here;
    }
    while ((before = LoadAcquireBlock(&found)) == kSought) Pause();
    return __all_sync(~0u, before == kHere);
  }

  // The operand `index` of a rank. Only after WaitForArrivals.
  template <typename T>
  __device__ const T* Operand(int rank, int index) const {
    return reinterpret_cast<const T*>(operands_[index][rank]);
  }

  // What a warp reads of peers, in one loop of an op.
  __device__ auto NewItems() const {
    if constexpr (kSeveralNodes) {
      return EvenItems();
    } else {
      return SharedItems(&channel_.num_items_taken);
    }
  }

  // Which of a source's lists of tokens is this rank's. Only for dispatch.
  __device__ int ListOf(int /*source*/) const { return frame_.rank; }
  // Which of a source's rows is that of a token.
  __device__ int IndexOfRow(int /*source*/, int token) const { return token; }

  // End the op: the last block, after all reads of this rank, calls succeed() or fail().
  template <typename Succeed, typename Fill>
  __device__ void Finish(Succeed succeed, Fill fail) {
    if (shared_.refused) {  // the counters belong to the other op
      fail();
      return;
    }
    if (!IsLastBlock(&channel_.num_finished)) return;
    if (threadIdx.x == 0) channel_.num_items_taken = 0;
    if (!Stopped()) {
      for (int peer = first_peer() + threadIdx.x; peer < end_peer(); peer += blockDim.x) {
        Channel& channel = frame_.ChannelOf(peer);
        channel.rows_taken[frame_.rank] =
            *static_cast<volatile uint64_t*>(&channel_.rows_pulled[peer]);
        // Pairs with the acquire load in WaitForAll, on the peer: this rank's reads come before.
        StoreReleaseSystem(&channel.left[frame_.rank], step());
      }
      WaitForPeers<ForPeersToLeave>(channel_.left);
    }
    // Pairs with the fence and the store in Fail, on a peer: if this rank has read what a peer
    // overwrote after aborting, then it sees here that the peer has aborted.
    FenceSystem();
    this->End(Stopped(), succeed, fail);
  }

 protected:
  __device__ bool PollPart(int part) {
    // A rank may itself wait for an earlier part of another one: that wait ends before.
    const uint64_t limit_ns = frame_.timeout_ns + frame_.timeout_ns / 4 * part / kMostParts;
    uint64_t began_ns = 0;
    for (int base = 0; base < num_ranks(); base += 32) {
      const int rank = base + static_cast<int>(threadIdx.x) % 32;
      bool here = rank >= num_ranks();
      while (true) {
        // Pairs with the release stores in SignalPart, on the peer.
        here = here || LoadAcquireSystem(&channel_.part_ready[rank][part]) >= step();
        if (__all_sync(~0u, here)) break;
        if (began_ns == 0) began_ns = NanosecondClock();
        if (__any_sync(~0u, !here && IsBroken())) return false;
        const bool late = !here && NanosecondClock() - began_ns > limit_ns;
        if (const uint32_t lanes = __ballot_sync(~0u, late); lanes != 0) {
          RankSet missing = {};
          missing.words[base / 32] = lanes;
          if (threadIdx.x % 32 == 0) Fail(Failure::kNotLeft, missing);  // they have arrived
          __syncwarp();
          return false;
        }
      }
    }
    __syncwarp();
    return true;
  }

  // Between nodes, a rank that has not left may wait for another node.
  struct ForPeersToLeave : ForLeaving {
    static constexpr bool kIndirect = Peers::kSeveralNodes;
  };

  template <typename For>
  __device__ bool WaitForPeers(const uint64_t* flags) {
    return WaitForPeers<For>(flags, step() - For::kOpsBefore);
  }
  template <typename For>
  __device__ bool WaitForPeers(const uint64_t* flags, uint64_t value) {
    const int first = first_peer(), end = end_peer();
    return WaitForAll<For>(flags, value, [=](int rank) { return rank >= first && rank < end; });
  }

  // Wait until the flags of all ranks with awaits(rank) have reached a value. Each arrival is
  // checked immediately: if a rank has arrived at another op, the wait ends.
  template <typename For, typename Awaits>
  __device__ bool WaitForAll(const uint64_t* flags, uint64_t value, Awaits awaits) {
    constexpr bool kArrivals = For::kArrivals;
    if (threadIdx.x < 32) {
      // A rank that has not left may also wait for a part.
      const bool is_indirect = For::kIndirect || (!kArrivals && frame_.parts.count > 1);
      const uint64_t limit_ns = frame_.timeout_ns + (is_indirect ? frame_.timeout_ns / 4 : 0);
      const uint64_t began_ns = NanosecondClock();
      RankSet missing = {};  // of lane 0
      int different = kNone;
      bool stopped = false, any_missing = false;
      for (int base = 0; base < num_ranks() && !stopped; base += 32) {
        const int rank = base + threadIdx.x;
        bool here = !(rank < num_ranks() && awaits(rank)), differs = false, late = false;
        while (true) {
          // Pairs with the release stores in Publish and Finish, on the peer.
          if (!here && LoadAcquireSystem(&flags[rank]) >= value && HasPublished<For>(rank)) {
            here = true;
            if (kArrivals) {
              differs = channel_.published[rank].op_hash != frame_.op_hash;
              if (!For::kByAllBlocks || blockIdx.x == 0)
                channel_.waited_ns[rank] += NanosecondClock() - began_ns;
            }
          }
          if (__all_sync(~0u, here) || __any_sync(~0u, differs)) break;
          if (!here) {
            stopped = IsBroken();
            late = NanosecondClock() - began_ns > limit_ns;
          }
          stopped = __any_sync(~0u, stopped);
          if (stopped || __any_sync(~0u, late)) break;
        }
        if (const uint32_t lanes = __ballot_sync(~0u, differs); lanes != 0) {
          different = base + __ffs(lanes) - 1;
          break;
        }
        const uint32_t lanes = __ballot_sync(~0u, !here && late);
        if (lanes != 0 && !stopped) {
          missing.words[base / 32] = lanes;
          any_missing = true;
        }
      }
      if (threadIdx.x == 0) {
        if (different != kNone) {
          Fail(Failure::kDifferentOps, {}, different);
        } else if (any_missing) {
          Fail(kArrivals ? Failure::kNotArrived : Failure::kNotLeft, missing);
        }
        shared_.flag = different == kNone && !any_missing && !stopped;
      }
    }
    return SharedFlag();
  }

  // A rank of another node that arrives in low-latency mode does not publish its op: when it waits
  // for this rank, it detects that this one is in another op, and aborts both.
  template <typename For>
  __device__ bool HasPublished(int rank) const {
    if constexpr (!For::kArrivals || For::kByAllBlocks) return true;
    return channel_.published[rank].step == step();
  }

  enum : uint32_t { kNotSought, kSought, kHere, kLost };  // of PartOfBlock::found

  const char* (*operands_)[kMaxRanks];
  PartOfBlock* parts_;
};

using GroupOp = GroupOpOf<WholeGroup>;

static_assert(sizeof(GroupOp::Shared) <= kStaticSharedBytes);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_GROUP_OP_CUH_
