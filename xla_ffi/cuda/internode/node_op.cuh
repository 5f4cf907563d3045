// How the ranks of an EP group on several nodes synchronise in one op, on the device.
//
//     Begin | write what peers read | Publish | WaitUntilFree | PutRows | Exchange
//           | WaitForArrivals | read peers [| PutRow | Return | WaitForSums | read sums] | Finish
//
// Inside a node, ranks read each other as in group_op.cuh. Between nodes they put, and only to the
// rank of the other node with the same index in it: its control block and its staging. What a
// source of another node has put, a rank reads in the staging of the rank of its own node that has
// the source's index.
//
// 1. WaitUntilFree: nobody reads what this rank has put in the op before. If puts are asynchronous,
//    Begin waits for that: they may read what this rank is about to overwrite.
// 2. Exchange: the last block tells the other nodes (`arrived`) that all rows have been put, waits
//    for theirs, passes on what the ranks of its node need at hand (the counts of dispatch), and
//    tells them (`staged`).
// 3. WaitForArrivals: of the node, and until each of its ranks has staged.
// 4. Return, in combine: a rank has put sums to another node (`returned`). First it checks for
//    failed peers, because that node cannot: otherwise its op might succeed with sums of memory
//    that XLA has reused.
// 5. Finish: at the end of a successful op, `left` tells the other nodes that the staging is free.
//
// tests/unit/protocol_internode.py models this protocol.
#ifndef JAX_DEEPEP_CUDA_INTERNODE_NODE_OP_CUH_
#define JAX_DEEPEP_CUDA_INTERNODE_NODE_OP_CUH_

#include <cstdint>

#include "cuda/group_op.cuh"
#include "cuda/memory_order.cuh"
#include "cuda/op_frame.h"
#include "cuda/remote_put.cuh"
#include "cuda/staging.h"
#include "cuda/warp_items.cuh"

namespace jax_deepep {

class NodeOp : public GroupOpOf<RanksOfNode> {
  using OfNode = GroupOpOf<RanksOfNode>;

 public:
  struct Shared {
    OfNode::Shared of_node;
    int32_t pushed[kMaxRanks];  // rows that this block has put to each node
  };

  __device__ NodeOp(const OpFrame& frame, Shared* shared)
      : OfNode(frame, &shared->of_node), pushed_(shared->pushed) {
    for (int node = threadIdx.x; node < kMaxRanks; node += blockDim.x) pushed_[node] = 0;
  }

  // As in RankOp.
  __device__ bool Begin() { return OfNode::Begin() && (!kPutsAreAsynchronous || WaitUntilFree()); }

  // --- Staging.

  // Where this rank puts an array for `node`, as an address for Put.
  template <typename T>
  __device__ T* At(int to_node, Staged array) const {
    return reinterpret_cast<T*>(SlotOf(frame_.rank, to_node, node(), array));
  }
  // What `source`, a rank of another node, has put there.
  template <typename T>
  __device__ const T* From(int source, Staged array) const {
    return reinterpret_cast<const T*>(SlotOf(PeerOf(source), node(), frame_.NodeOf(source), array));
  }
  // The rank of this node whose memory has the rows of a source.
  __device__ int PeerOf(int source) const {
    return first_peer() + source % frame_.shape.node_size();
  }

  // --- Between nodes.

  __device__ bool WaitUntilFree() { return WaitForAll<ForStagingToBeFree>(channel_.left, Puts()); }

  template <typename By>
  __device__ void Put(int to_node, void* to, const void* from, int64_t bytes) const {
    PutFlag<By>(frame_, to_node, to, from, bytes);
  }
  // By a warp.
  __device__ void PutRow(int to_node, int64_t offset, const char* row, int64_t bytes) const {
    Put<ByWarp>(to_node, At<char>(to_node, Staged::kRows) + offset, row, bytes);
    if (threadIdx.x % 32 == 0) atomicAdd(&pushed_[to_node], 1);
  }

  // Put rows of this rank's tokens, once to every other node that node_of(token, k) names for one
  // of the token's entries.
  template <typename NodeOf>
  __device__ void PutRows(const char* rows, int64_t row_bytes, int num_tokens, NodeOf node_of) {
    const int lane = threadIdx.x % 32;
    for (int token = FirstItem(); token < num_tokens; token += NumWarps()) {
      const int to = lane < frame_.shape.num_topk ? node_of(int64_t{token}, lane) : kNone;
      for (int base = 0; base < num_nodes(); base += 32) {
        for (uint32_t nodes = RanksOfLanes(to, base); nodes != 0; nodes &= nodes - 1) {
          const int to_node = base + __ffs(nodes) - 1;
          if (to_node == node()) continue;
          PutRow(to_node, token * row_bytes, rows + token * row_bytes, row_bytes);
        }
      }
    }
  }

  // The last block calls put(node) for every other node, and pass_on() once all have arrived here.
  template <typename PutLast, typename PassOn>
  __device__ void Exchange(PutLast put, PassOn pass_on) {
    CountPushed();
    // A block that has failed has put nothing.
    if (!IsLastBlock(&channel_.num_put) || Stopped() || !WaitUntilFree()) return;
    ForOtherNodes([&](int to_node) {
      put(to_node);
      Publication* published = &channel_.published[frame_.rank];  // by this rank in Publish
      Put<ByBlock>(to_node, published, published, sizeof(Publication));
      PutTotalAndFlag(to_node, channel_.arrived);
    });
    if (!WaitForAll<ForOtherNodesToArrive>(channel_.arrived, Puts())) return;
    pass_on();
    __syncthreads();
    for (int peer = first_peer() + threadIdx.x; peer < end_peer(); peer += blockDim.x) {
      // Pairs with the acquire load of the wait below, on the peer.
      StoreReleaseSystem(&frame_.ChannelOf(peer).staged[frame_.rank], step());
    }
  }

  // By the last block: let the ranks of this node have the counts that other nodes have put here.
  __device__ void PassOnCounts() const {
    const int columns = NumCountColumns(frame_.shape.num_experts, frame_.shape.num_ranks);
    ForOtherNodes([&](int from_node) {
      const int source = frame_.RankOnNode(from_node);
      for (int column = threadIdx.x; column < columns; column += blockDim.x) {
        const int32_t count = LoadFresh(frame_.Counts(frame_.rank, source) + column);
        for (int peer = first_peer(); peer < end_peer(); ++peer) {
          if (peer != frame_.rank) frame_.Counts(peer, source)[column] = count;
        }
      }
    });
  }

  // Wait until the ranks of this node can be read, and all that was put there. False: they must
  // not.
  __device__ bool WaitForArrivals() {
    if (!OfNode::WaitForArrivals()) return false;
    if (!WaitForPeers<ForPeersToStage>(channel_.staged)) return false;
    for (int rank = threadIdx.x; rank < num_ranks(); rank += blockDim.x) {
      if (rank >= first_peer() && rank < end_peer()) continue;
      operands_[kStagedRows][rank] = From<char>(rank, Staged::kRows);
      operands_[kStagedRecords][rank] = From<char>(rank, Staged::kSecond);
      operands_[kStagedLists][rank] = From<char>(rank, Staged::kFirst);
    }
    __syncthreads();
    return true;
  }
  // The operands of a source of another node, by their indices in dispatch and cached_dispatch.
  enum { kStagedRows, kStagedRecords, kStagedLists };

  // As in GroupOp: a source of another node has put the lists of this node's ranks.
  __device__ int ListOf(int source) const {
    return frame_.NodeOf(source) == node() ? frame_.rank : frame_.rank - first_peer();
  }

  // After the last PutRow of sums: the last block calls put(node) for every other node.
  template <typename PutLast>
  __device__ void Return(PutLast put) {
    CountPushed();
    // Pairs with the fence in Fail, on a peer: see Finish.
    if (!IsLastBlock(&channel_.num_returned) || Stopped()) return;
    ForOtherNodes([&](int to_node) {
      put(to_node);
      PutTotalAndFlag(to_node, channel_.returned);
    });
  }
  __device__ bool WaitForSums() { return WaitForAll<ForSums>(channel_.returned, Puts()); }

  // As RankOp::CountTaken; by the rank whose memory was read.
  __device__ void CountTaken(const int32_t* taken) const {
    __syncthreads();
    for (int rank = threadIdx.x; rank < num_ranks(); rank += blockDim.x) {
      AddTo(&channel_.rows_pulled[PeerOf(rank)], taken[rank]);
    }
  }

  template <typename Succeed, typename Fill>
  __device__ void Finish(Succeed succeed, Fill fail) {
    OfNode::Finish(
        [&] {
          // All readers of this rank's staging have left.
          if (threadIdx.x == 0) {
            ForOtherNodes([&](int to_node) {
              PutFlag<ByThread>(frame_, to_node, nullptr, nullptr, 0, &channel_.left[frame_.rank],
                                step());
            });
          }
          succeed();
        },
        fail);
  }

 private:
  struct ForStagingToBeFree : ForLeaving {
    static constexpr int kOpsBefore = 1;
    static constexpr bool kIndirect = true;
  };
  struct ForOtherNodesToArrive : ForArrivals {
    static constexpr bool kByAllBlocks = false;
  };
  struct ForPeersToStage : ForLeaving {
    static constexpr bool kIndirect = true;
  };
  struct ForSums : ForPeersToStage {};

  // Whether a rank puts to this one.
  struct FromOtherNodes {
    int rank, ranks_per_node;
    __device__ bool operator()(int other) const {
      return other != rank && other % ranks_per_node == rank % ranks_per_node;
    }
  };
  __device__ FromOtherNodes Puts() const { return {frame_.rank, frame_.shape.node_size()}; }

  __device__ char* SlotOf(int owner, int of_node, int from_node, Staged array) const {
    const int64_t offset =
        frame_.staging.SlotOffset(frame_.channel, of_node, from_node) + frame_.staging.In(array);
    return reinterpret_cast<char*>(frame_.control[owner]) + offset;
  }

  __device__ void CountPushed() const {
    __syncthreads();
    for (int to_node = threadIdx.x; to_node < num_nodes(); to_node += blockDim.x) {
      if (pushed_[to_node] == 0) continue;
      AddTo(&channel_.rows_pushed[frame_.RankOnNode(to_node)], pushed_[to_node]);
      pushed_[to_node] = 0;
    }
  }

  int32_t* pushed_;
};

static_assert(sizeof(NodeOp::Shared) <= kStaticSharedBytes);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_INTERNODE_NODE_OP_CUH_
