// How the ranks of an EP group on several nodes synchronise in low-latency mode.
//
//     Begin | push and stage rows | SendToNodes | ReceiveFromAll | Finish              dispatch
//     Begin | push sums | add those of the node | SendToNodes | WaitForSums | Finish   combine
//
// Inside a node ranks push to each other as in low_latency/signalled_op.cuh. To another node a rank
// puts, and only to the rank with its index there, its proxy: into its `received` area, in one
// message per op with a flag, `arrived` (put_areas.h). All blocks stage what the last one puts.
//
// 1. dispatch: the rows and entries of this rank's tokens. The proxy waits for those of all nodes,
//    pushes the entries to the windows of the ranks of its node, as if they were its own tokens',
//    and tells them so (`staged`). They read the rows in the memory of the proxy.
// 2. cached_dispatch: the same without entries.
// 3. combine: a rank pushes the sum of a token to the rank of its own node with the index of the
//    token's rank. That one adds up those of its node, and puts the results to the token's rank.
//
// A rank that ends op n has heard that all ranks have begun it: from those of its node and, through
// them, from all others. So two banks of each memory are enough, as on one node, also for puts that
// read their source after PutStaged has returned. The flag is one word: flags of several ops arrive
// in their order (nvshmem/put.cuh).
//
// A wait for what others must wait for in turn is longer, so that whoever waits for a missing rank
// itself reports it.
//
// tests/unit/protocol_low_latency_nodes.py models this protocol.
#ifndef JAX_DEEPEP_CUDA_LOW_LATENCY_NODES_SIGNALLED_NODE_OP_CUH_
#define JAX_DEEPEP_CUDA_LOW_LATENCY_NODES_SIGNALLED_NODE_OP_CUH_

#include <cstdint>

#include "cuda/low_latency/signalled_op.cuh"
#include "cuda/low_latency_nodes/put_areas.h"
#include "cuda/memory_order.cuh"
#include "cuda/op_frame.h"
#include "cuda/remote_put.cuh"
#include "cuda/warp_items.cuh"

namespace jax_deepep {

struct SignalledNodeFrame : SignalledFrame {
  PutAreas areas;
  int64_t values_offset = 0, rows_offset = 0;  // in a slot
  int32_t row_stride = 0;

  // A row has one place in a message, so that one warp has all of it.
  static SignalledNodeFrame Of(const OpFrame& frame, const RowFormat& rows, int num_tokens,
                               int64_t value_bytes, bool /*whole*/ = false) {
    const auto of_rank = SignalledFrame::Of(frame, rows, num_tokens, value_bytes, /*whole=*/true);
    return {of_rank, PutAreas(frame.shape, frame.window), PutAreas::ValuesOffset(of_rank.num_slots),
            PutAreas::RowsOffset(of_rank.num_slots, value_bytes),
            static_cast<int32_t>((rows.wire_bytes() + 15) / 16 * 16)};
  }
};

class SignalledNodeOp : public SignalledOpOf<RanksOfNode> {
  using OfNode = SignalledOpOf<RanksOfNode>;

 public:
  using Frame = SignalledNodeFrame;
  using OfRank::ForOtherNodes, OfRank::node, OfRank::num_nodes;

  __device__ SignalledNodeOp(const OpFrame& frame, const Frame& signalled, Shared* shared)
      : OfNode(frame, signalled, shared), areas_(signalled.areas), signalled_(signalled) {}

  // --- The areas.

  __device__ char* SlotOfNode(int owner, PutArea area, int of_node) const {
    return reinterpret_cast<char*>(frame_.control[owner]) +
           areas_.SlotOffset(frame_.channel, step(), area, of_node);
  }
  // Where this rank writes what it puts to a node: see remote_put.cuh.
  __device__ char* StagedFor(int to_node) const {
    return StagingOf(frame_, to_node, SlotOfNode(frame_.rank, PutArea::kReceived, node()),
                     SlotOfNode(frame_.rank, PutArea::kSent, to_node));
  }
  // What a slot has: in this op, by token.
  __device__ static int32_t* PlacesIn(char* slot) {
    return reinterpret_cast<int32_t*>(slot + sizeof(PutHeader));
  }
  template <typename T>
  __device__ T* ValuesIn(char* slot) const {
    return reinterpret_cast<T*>(slot + signalled_.values_offset);
  }
  __device__ char* RowIn(char* slot, int place) const {
    return slot + signalled_.rows_offset + int64_t{place} * signalled_.row_stride;
  }
  // The sum of this node for a token of this rank, which is not encoded.
  __device__ char* OwnSum(int token) const {
    return SlotOfNode(frame_.rank, PutArea::kReceived, node()) + signalled_.rows_offset +
           int64_t{token} * areas_.row_stride;
  }

  // --- What a rank sends.

  // As in SignalledOp, and stage it for all other nodes of the ranks.
  template <typename Part>
  __device__ __forceinline__ void PushRow(Part& from, int token, int part, int32_t rank,
                                          bool to_all, Sent* sent) const {
    const int32_t to = rank != kNone ? frame_.NodeOf(rank) : kNone;
    char* copy = this->LeadsTo(to) ? NewRowFor(to, token) : nullptr;
    OfNode::PushRow(from, token, part, to == node() ? rank : kNone, to_all, sent, copy);
  }
  // Where this rank writes the row of a token that it puts to a node. By one lane.
  __device__ char* NewRowFor(int to_node, int token) const {
    char* slot = StagedFor(to_node);
    const int place = this->TakePlace(to_node, 0);
    PlacesIn(slot)[token] = place;
    return RowIn(slot, place);
  }
  __device__ void StageEntry(int index, SlotEntry entry) const {
    ForOtherNodes([&](int to_node) { ValuesIn<SlotEntry>(StagedFor(to_node))[index] = entry; });
  }

  // After all that this block stages; every op calls it once. The last block sends.
  __device__ void SendToNodes() {
    if (!IsLastBlock(&channel_.num_put)) return;
    ForOtherNodes([&](int to_node) {
      const int count = this->EndPlaces(to_node, 0);
      auto* header = reinterpret_cast<PutHeader*>(StagedFor(to_node));
      const int thread = threadIdx.x;
      if (thread == 0) {
        header->step = step();
        header->num_rows =
            *static_cast<volatile uint64_t*>(&channel_.rows_pushed[frame_.RankOnNode(to_node)]);
      }
      if (thread < Publication::kWords) {
        reinterpret_cast<uint64_t*>(&header->published)[thread] = this->WordToPublish(thread);
      }
      __syncthreads();
      // Pairs with the acquire load in HasArrived, on the peer.
      PutStaged<ByBlock>(frame_, to_node, SlotOfNode(frame_.rank, PutArea::kReceived, node()),
                         SlotOfNode(frame_.rank, PutArea::kSent, to_node),
                         signalled_.rows_offset + int64_t{count} * signalled_.row_stride,
                         &channel_.arrived[frame_.rank], step());
    });
  }

  // --- What it receives.

  // Call receive(slots), as in SignalledOp. On the rank that they were put to, pass(source,
  // entry_of) passes on the entries of a rank of another node, by a block.
  template <typename Pass, typename Receive>
  __device__ __forceinline__ bool ReceiveFromAll(Pass pass, Receive receive) {
    const int before = first_peer() * signalled_.num_slots;
    const int here = (end_peer() - first_peer()) * signalled_.num_slots;
    const int others = num_ranks() * signalled_.num_slots - here;
    // What was pushed first: those who did not arrive are reported by those who wait for them.
    return PassOn(pass) && __syncthreads_and(receive(SlotsFrom{here, 0, before})) != 0 &&
           WaitUntilStaged() && receive(SlotsFrom{others, before, here});
  }
  __device__ bool IsPushed(int source) const { return frame_.NodeOf(source) == node(); }
  __device__ const char* RowFrom(const Slot& slot, int source, int token) const {
    if (IsPushed(source)) return slot.row();
    char* put = SlotOfNode(ProxyOf(source), PutArea::kReceived, frame_.NodeOf(source));
    const int place = LoadFresh(&PlacesIn(put)[token]);
    // After a failed dispatch, routes may name tokens that have not been sent.
    return RowIn(put, place >= 0 && place < signalled_.num_slots ? place : 0);
  }
  __device__ void CountReceived(int source) const {
    if (IsPushed(source)) {
      OfNode::CountReceived(source);
    } else {
      Add(&channel_.rows_pulled[ProxyOf(source)], 1);
    }
  }

  __device__ int AdderOf(int owner) const { return ProxyOf(owner); }
  __device__ int SourceForAdder(int owner) const { return frame_.RankOnNode(frame_.NodeOf(owner)); }
  // By every block: the sums of other nodes for this rank's tokens.
  __device__ bool WaitForSums() { return WaitForOtherNodes<ForSums>(); }

  template <typename Succeed, typename Fill>
  __device__ void Finish(bool lost, Succeed succeed, Fill fail) {
    OfNode::Finish(
        lost,
        [&](uint32_t num_invalid) {
          if (receives()) Leave();
          succeed(num_invalid);
        },
        fail);
  }

 private:
  // `count` slots, without `gap` of them from `first` on.
  struct SlotsFrom {
    int count, first, gap;
    __device__ int At(int index) const { return index < first ? index : index + gap; }
  };
  // A rank that has returned its sums may wait for those of its node.
  struct ForSums : ForSources {
    static constexpr bool kIndirect = true;
  };
  struct ForProxies : ForSums {
    static constexpr Failure kFailure = Failure::kNotLeft;  // they have arrived
  };

  // The rank of this node with the index of a rank.
  __device__ int ProxyOf(int rank) const { return first_peer() + rank % frame_.shape.node_size(); }

  // Whether all that a rank of another node puts to this one in this op is here.
  __device__ bool HasArrived(int source) const {
    if (LoadAcquireSystem(&channel_.arrived[source]) < step()) return false;
    const auto& header = *reinterpret_cast<const PutHeader*>(
        SlotOfNode(frame_.rank, PutArea::kReceived, frame_.NodeOf(source)));
    const bool in_this_mode = LoadAcquireSystem(&header.step) == step();
    if (in_this_mode && LoadAcquireSystem(&header.published.op_hash) == frame_.op_hash) {
      // By every block: the source may have put a later total meanwhile.
      RaiseTo(&channel_.rows_received[source], header.num_rows);
      return true;
    }
    // It is in another op. As if it had announced that here: see IsInOtherOp.
    Publication& published = channel_.published[source];  // in throughput mode by the source
    if (in_this_mode) published = header.published;
    StorePacket(reinterpret_cast<Packet*>(&channel_.announced[source]),
                {published.op_hash, step()});
    return false;
  }

  // By a block.
  template <typename For>
  __device__ bool WaitForOtherNodes() {
    bool all = true;
    if (threadIdx.x < 32) {
      for (int base = 0; base < num_nodes() && all; base += 32) {
        const int from = base + static_cast<int>(threadIdx.x);
        const bool waits = from < num_nodes() && from != node();
        const int source = waits ? frame_.RankOnNode(from) : kNone;
        all = WaitUntil<For>([&] { return waits && !HasArrived(source) ? source : kNone; });
      }
    }
    return __syncthreads_and(all) != 0;
  }

  // The block with the fewest items passes on what other nodes have put here.
  template <typename Pass>
  __device__ bool PassOn(Pass pass) {
    if (blockIdx.x != gridDim.x - 1) return true;
    if (!WaitForOtherNodes<ForSources>()) return false;
    ForOtherNodes([&](int from_node) {
      const auto* entries =
          ValuesIn<SlotEntry>(SlotOfNode(frame_.rank, PutArea::kReceived, from_node));
      pass(frame_.RankOnNode(from_node), [entries](int i) {
        return SlotEntry{LoadFresh(&entries[i].expert), LoadFresh(&entries[i].value)};
      });
    });
    __syncthreads();
    for (int peer = first_peer() + threadIdx.x; peer < end_peer(); peer += kThreads) {
      // Pairs with the acquire load in WaitUntilStaged, on the peer.
      StoreReleaseSystem(&frame_.ChannelOf(peer).staged[frame_.rank], step());
    }
    return true;
  }

  __device__ bool WaitUntilStaged() {
    bool all = true;
    if (threadIdx.x < 32) {
      for (int base = first_peer(); base < end_peer() && all; base += 32) {
        const int peer = base + static_cast<int>(threadIdx.x);
        all = WaitUntil<ForProxies>([&] {
          const bool waits = peer < end_peer();
          return waits && LoadAcquireSystem(&channel_.staged[peer]) < step() ? peer : kNone;
        });
      }
    }
    return __syncthreads_and(all) != 0;
  }

  // By the last block of an op that succeeds.
  __device__ void Leave() const {
    for (int to_node = threadIdx.x; to_node < num_nodes(); to_node += kThreads) {
      // All have begun this op, so that they have left those before it; and no op of this mode uses
      // the staging of throughput mode, in which a rank waits for this.
      if (to_node != node()) channel_.left[frame_.RankOnNode(to_node)] = step();
    }
    for (int peer = first_peer() + threadIdx.x; peer < end_peer(); peer += kThreads) {
      frame_.ChannelOf(peer).rows_taken[frame_.rank] =
          *static_cast<volatile uint64_t*>(&channel_.rows_pulled[peer]);
    }
  }

  const PutAreas& areas_;
  const Frame& signalled_;
};

static_assert(sizeof(SignalledNodeOp::Shared) <= kStaticSharedBytes);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_LOW_LATENCY_NODES_SIGNALLED_NODE_OP_CUH_
