// How the ranks of an EP group on several nodes synchronise in one op, on the device.
//
//     Begin | write what peers read | Publish | WaitUntilFree | StageRows | Exchange
//           | WaitForArrivals | read peers [| stage sums | SendChunk | wait | read sums] | Finish
//
// Inside a node, ranks read each other as in group_op.cuh. Between nodes they put, and only to the
// rank of the other node with the same index in it: its control block and its staging. What a
// source of another node has put, a rank reads in the staging of the rank of its own node that has
// the source's index. All blocks of a rank stage what it puts, one after another without gaps; the
// last one puts that, in one message per array and node.
//
// 1. WaitUntilFree: nobody reads what this rank has put in the op before. If puts are asynchronous,
//    Begin waits for that: they may read what this rank is about to overwrite.
// 2. Exchange: the last block puts all that has been staged, tells the other nodes so (`arrived`),
//    waits for theirs, passes on what the ranks of its node need at hand (the counts of dispatch),
//    and tells them (`staged`).
// 3. WaitForArrivals: of the node, and until each of its ranks has staged.
// 4. SendChunk, in combine: a rank puts sums to another node. First it checks for failed peers,
//    because that node cannot: otherwise its op might succeed with sums of memory that XLA has
//    reused.
// 5. Finish: at the end of a successful op, `left` tells the other nodes that the staging is free.
//
// Rows that have no room in the staging together cross in chunks (ForChunks, ForChunksOfSums),
// which take two parts of it in turn. A chunk is put when the peer has returned the credit of the
// chunk before the last: when all who read that one have. The last two need none: that is `left`.
// All rows that have room are one chunk, with the flags above alone.
//
// tests/unit/protocol_internode.py and protocol_chunks.py model this protocol.
#ifndef JAX_DEEPEP_CUDA_INTERNODE_NODE_OP_CUH_
#define JAX_DEEPEP_CUDA_INTERNODE_NODE_OP_CUH_

#include <cstdint>

#include "cuda/chunk_pairs.cuh"
#include "cuda/group_op.cuh"
#include "cuda/memory_order.cuh"
#include "cuda/op_frame.h"
#include "cuda/remote_put.cuh"
#include "cuda/staging.h"
#include "cuda/warp_items.cuh"

namespace jax_deepep {

// With kChunked, rows or sums may cross in several chunks; kernels of ops of one are compiled
// without, and take no registers for that.
template <bool kChunked>
class NodeOpOf : public GroupOpOf<RanksOfNode> {
  using OfNode = GroupOpOf<RanksOfNode>;

 public:
  static constexpr bool kInChunks = kChunked;

  struct Shared {
    OfNode::Shared of_node;
    // Of the pairs of a chunk: how many are of earlier sources, and the first one of each.
    int32_t pairs_before[kMaxRanks + 1], first_pair[kMaxRanks];
  };

  __device__ NodeOpOf(const OpFrame& frame, Shared* shared)
      : OfNode(frame, &shared->of_node),
        pairs_before_(shared->pairs_before),
        first_pair_(shared->first_pair) {}

  // As in RankOp.
  __device__ bool Begin() { return OfNode::Begin() && (!kPutsAreAsynchronous || WaitUntilFree()); }

  // --- Staging.

  // Where this rank writes an array that it puts to a node: see PutArray.
  template <typename T>
  __device__ T* StagedFor(int to_node, StagedArray array) const {
    return reinterpret_cast<T*>(
        StagingOf(frame_, to_node, SlotFor(to_node, array), SentFor(to_node, array)));
  }
  // What `source`, a rank of another node, has put there.
  template <typename T>
  __device__ const T* From(int source, StagedArray array) const {
    return reinterpret_cast<const T*>(SlotOf(PeerOf(source), node(), frame_.NodeOf(source), array));
  }
  // The rank of this node whose memory has the rows of a source.
  __device__ int PeerOf(int source) const {
    return first_peer() + source % frame_.shape.node_size();
  }

  // --- Between nodes.

  __device__ bool WaitUntilFree() {
    return WaitForAll<ForStagingToBeFree>(channel_.left, step() - 1, Puts());
  }

  // Stage an array, or this block's part of it, from element `first` on.
  template <typename T>
  __device__ void Stage(int to_node, StagedArray array, int64_t first, const T* from,
                        int64_t count) const {
    CopyBytes<ByBlock>(reinterpret_cast<char*>(StagedFor<T>(to_node, array) + first),
                       reinterpret_cast<const char*>(from + first), count * sizeof(T));
  }
  // By a block: put what has been staged.
  __device__ void PutArray(int to_node, StagedArray array, int64_t offset, int64_t bytes) const {
    __syncthreads();
    PutStaged<ByBlock>(frame_, to_node, SlotFor(to_node, array) + offset,
                       SentFor(to_node, array) + offset, bytes);
  }

  // Where this rank writes the row of a token that it puts to a node. By one lane.
  __device__ char* NewRowFor(int to_node, int chunk, int token) const {
    const int place = this->TakePlace(to_node, chunk);
    char* at = StagedFor<char>(to_node, StagedArray::kRows) + frame_.chunks.OffsetOf(chunk);
    reinterpret_cast<int32_t*>(at)[token - frame_.chunks.First(chunk)] = place;
    return at + frame_.chunks.OffsetOfRow(place);
  }

  // Stage rows of a chunk of this rank's tokens, once for every other node that node_of(token, k)
  // names for one of the token's entries. Of the first chunk a warp stages the rows that it has
  // encoded itself (EncodeRows): others may still encode theirs.
  template <typename NodeOf>
  __device__ void StageRows(int chunk, const char* rows, int num_tokens, NodeOf node_of) const {
    const int lane = threadIdx.x % 32, end = EndOf(chunk, num_tokens);
    const int64_t row_bytes = frame_.chunks.row_bytes;
    for (int token = frame_.chunks.First(chunk) + FirstItem(); token < end; token += NumWarps()) {
      const int to_node = lane < frame_.shape.num_topk ? node_of(int64_t{token}, lane) : kNone;
      const bool leads = this->LeadsTo(to_node);
      char* to = leads ? NewRowFor(to_node, chunk, token) : nullptr;
      for (uint32_t lanes = __ballot_sync(~0u, leads); lanes != 0; lanes &= lanes - 1) {
        CopyBytes<ByWarp>(PointerOfLane(to, __ffs(lanes) - 1), rows + token * row_bytes, row_bytes);
      }
    }
  }
  // By a block, after all of a chunk have been staged: put it.
  __device__ void PutChunk(int to_node, int chunk) const {
    const int64_t count = this->EndPlaces(to_node, chunk);
    const int64_t bytes = count > 0 ? frame_.chunks.OffsetOfRow(count) : 0;
    PutArray(to_node, StagedArray::kRows, frame_.chunks.OffsetOf(chunk), bytes);
  }
  // The row of a token that a source of another node has put.
  __device__ const char* RowFrom(int source, int chunk, int token) const {
    const char* at = From<char>(source, StagedArray::kRows) + frame_.chunks.OffsetOf(chunk);
    return at + frame_.chunks.OffsetOfRow(PlaceIn(at, token - frame_.chunks.First(chunk)));
  }

  // The last block calls put(node) for every other node, and pass_on() once all have arrived here.
  template <typename PutLast, typename PassOn>
  __device__ void Exchange(PutLast put, PassOn pass_on) {
    // A block that has failed has staged nothing.
    if (!IsLastBlock(&channel_.num_put) || Stopped() || !WaitUntilFree()) return;
    ForOtherNodes([&](int to_node) {
      put(to_node);
      Publication* published = &channel_.published[frame_.rank];  // by this rank in Publish
      PutFlag<ByBlock>(frame_, to_node, published, published, sizeof(Publication));
      PutTotalAndFlag(to_node, channel_.arrived, step());
    });
    if (!WaitForAll<ForOtherNodesToArrive>(channel_.arrived, step(), Puts())) return;
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
      operands_[kStagedRows][rank] = From<char>(rank, StagedArray::kRows) + FirstRow();
      operands_[kStagedRecords][rank] = From<char>(rank, StagedArray::kSecond);
      operands_[kStagedLists][rank] = From<char>(rank, StagedArray::kFirst);
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
  // Likewise: of another node, in the chunk that can be read.
  __device__ int IndexOfRow(int source, int token) const {
    if (frame_.NodeOf(source) == node()) return token;
    return PlaceIn(operands_[kStagedRows][source] - FirstRow(),
                   token - frame_.chunks.First(kChunked ? chunk_ : 0));
  }

  // --- Chunks of tokens.

  __device__ int num_chunks() const { return kChunked ? frame_.chunks.count : 1; }
  // The end of a chunk's tokens.
  __device__ int EndOf(int chunk, int num_tokens) const {
    if (!kChunked) return num_tokens;
    return min(frame_.chunks.First(chunk + 1), num_tokens);
  }

  // Call use(chunk) when a chunk of the sources' rows can be read, in order. The first one has been
  // put in Exchange; stage(chunk) is called for the others. False: the op is lost.
  template <typename StageRowsOf, typename Use>
  __device__ bool ForChunks(StageRowsOf stage, Use use) {
    const int count = num_chunks();
    for (int chunk = 0; chunk < count; ++chunk) {
      // While the ranks of the node read this one.
      if (chunk + 1 < count) {
        if (!WaitForCredit(chunk + 1)) return false;
        stage(chunk + 1);
        SendChunk(chunk + 1, [](int) {});
      }
      if (chunk > 0 && !WaitForRows(chunk)) return false;
      use(chunk);
      if (NeedsCredit(chunk) && IsLastReader(chunk)) {
        for (int peer = first_peer() + threadIdx.x; peer < end_peer(); peer += blockDim.x) {
          // Pairs with the acquire load of the wait below, on the peer.
          StoreReleaseSystem(&frame_.ChannelOf(peer).chunk_taken[frame_.rank], MarkOf(chunk));
        }
        if (!WaitForPeers<ForChunk>(channel_.chunk_taken, MarkOf(chunk))) return false;
        PutFlags(channel_.credit, MarkOf(chunk));
      }
    }
    return true;
  }

  // The same for sums: put(chunk) stages this node's, and ends with SendChunk. use(chunk) is called
  // when those of the other nodes are here; work(chunk) before that. In line: a function of its own
  // would take more registers than the kernel has.
  template <typename PutSums, typename Work, typename Use>
  __device__ __forceinline__ bool ForChunksOfSums(PutSums put, Work work, Use use) {
    const int count = num_chunks();
    put(0);
    for (int chunk = 0; chunk < count; ++chunk) {
      if (chunk + 1 < count) {
        if (!WaitForCredit(chunk + 1)) return false;
        put(chunk + 1);
      }
      work(chunk);
      if (!WaitForAll<ForChunk>(channel_.chunk_put, MarkOf(chunk), Puts())) return false;
      use(chunk);
      if (NeedsCredit(chunk) && IsLastReader(chunk)) PutFlags(channel_.credit, MarkOf(chunk));
    }
    return true;
  }

  // After all rows or sums of a chunk have been staged: the last block puts it to every other node,
  // and what belongs to it, by put(node), and tells it.
  template <typename PutMore>
  __device__ void SendChunk(int chunk, PutMore put) {
    // Pairs with the fence in Fail, on a peer: see Finish.
    if (!IsLastBlock(&channel_.num_chunk_put[chunk % 2]) || Stopped()) return;
    ForOtherNodes([&](int to_node) {
      PutChunk(to_node, chunk);
      put(to_node);
      PutTotalAndFlag(to_node, channel_.chunk_put, MarkOf(chunk));
    });
  }

  // The pairs that this rank reads in a chunk; only once use(chunk) of ForChunks is called.
  // range_of(source, begin, end): those of a source's tokens [begin, end). What this node's ranks
  // have is read with the first chunk.
  template <typename RangeOf>
  __device__ ChunkPairs PairsOf(int chunk, int num_tokens, RangeOf range_of) const {
    return MakeChunkPairs(
        pairs_before_, first_pair_, num_ranks(), frame_.rank, [&](int source) -> PairRange {
          if (frame_.NodeOf(source) != node()) {
            return range_of(source, frame_.chunks.First(chunk), EndOf(chunk, num_tokens));
          }
          return chunk == 0 ? range_of(source, 0, num_tokens) : PairRange{0, 0};
        });
  }

  // As RankOp::CountTaken; by the rank whose memory was read.
  __device__ void CountTaken(const int32_t* taken) const {
    __syncthreads();
    for (int rank = threadIdx.x; rank < num_ranks(); rank += blockDim.x) {
      Add(&channel_.rows_pulled[PeerOf(rank)], taken[rank]);
    }
  }

  template <typename Succeed, typename Fill>
  __device__ void Finish(Succeed succeed, Fill fail) {
    OfNode::Finish(
        [&] {
          // All readers of this rank's staging have left.
          PutFlags(channel_.left, step());
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

  struct ForChunk : ForPeersToStage {};

  // The value of flags of a chunk of this op.
  __device__ uint64_t MarkOf(int chunk) const { return step() * kMostChunks + chunk; }
  // The last two chunks are followed by `left`.
  __device__ bool NeedsCredit(int chunk) const { return chunk + 2 < num_chunks(); }

  // Wait until the part of the staging that a chunk takes is free on other nodes.
  __device__ bool WaitForCredit(int chunk) {
    return chunk < 2 || WaitForAll<ForChunk>(channel_.credit, MarkOf(chunk - 2), Puts());
  }

  // Wait until a later chunk of rows can be read, in the memory of all ranks of this node.
  __device__ bool WaitForRows(int chunk) {
    if (blockIdx.x == 0) {
      if (!WaitForAll<ForChunk>(channel_.chunk_put, MarkOf(chunk), Puts())) return false;
      for (int peer = first_peer() + threadIdx.x; peer < end_peer(); peer += blockDim.x) {
        // Pairs with the acquire load of the wait below, on the peer.
        StoreReleaseSystem(&frame_.ChannelOf(peer).chunk_staged[frame_.rank], MarkOf(chunk));
      }
    }
    if (!WaitForPeers<ForChunk>(channel_.chunk_staged, MarkOf(chunk))) return false;
    for (int rank = threadIdx.x; rank < num_ranks(); rank += blockDim.x) {
      if (frame_.NodeOf(rank) == node()) continue;
      operands_[kStagedRows][rank] =
          From<char>(rank, StagedArray::kRows) + frame_.chunks.OffsetOf(chunk) + FirstRow();
    }
    chunk_ = chunk;
    __syncthreads();
    return true;
  }

  // Whether this block is the last of its rank to have read a chunk. Blocks are at most one chunk
  // apart here, and where they put: the one after needs a credit that all blocks have a part in.
  __device__ bool IsLastReader(int chunk) {
    return IsLastBlock(&channel_.num_chunk_read[chunk % 2]);
  }

  // By a block: tell the ranks of the other nodes.
  __device__ void PutFlags(uint64_t* flags, uint64_t value) const {
    if (threadIdx.x != 0) return;
    ForOtherNodes([&](int to_node) {
      PutFlag<ByThread>(frame_, to_node, nullptr, nullptr, 0, &flags[frame_.rank], value);
    });
  }

  // Whether a rank puts to this one.
  struct FromOtherNodes {
    int rank, ranks_per_node;
    __device__ bool operator()(int other) const {
      return other != rank && other % ranks_per_node == rank % ranks_per_node;
    }
  };
  __device__ FromOtherNodes Puts() const { return {frame_.rank, frame_.shape.node_size()}; }

  __device__ char* SlotOf(int owner, int of_node, int from_node, StagedArray array) const {
    const int64_t offset =
        frame_.staging.SlotOffset(frame_.channel, of_node, from_node) + frame_.staging.In(array);
    return reinterpret_cast<char*>(frame_.control[owner]) + offset;
  }
  // On this rank: what stands for the slot of its peer on a node, and from where it puts there.
  __device__ char* SlotFor(int to_node, StagedArray array) const {
    return SlotOf(frame_.rank, to_node, node(), array);
  }
  __device__ char* SentFor(int to_node, StagedArray array) const {
    return reinterpret_cast<char*>(frame_.control[frame_.rank]) +
           frame_.staging.SendOffset(frame_.channel, node(), to_node) + frame_.staging.In(array);
  }

  // From the beginning of a chunk.
  __device__ int64_t FirstRow() const { return frame_.chunks.OffsetOfRow(0); }
  __device__ static int PlaceIn(const char* chunk, int index) {
    return LoadFresh(reinterpret_cast<const int32_t*>(chunk) + index);
  }

  int32_t *pairs_before_, *first_pair_;
  int chunk_ = 0;  // whose rows can be read
};

using NodeOp = NodeOpOf<false>;
using ChunkedNodeOp = NodeOpOf<true>;

static_assert(sizeof(NodeOp::Shared) <= kStaticSharedBytes);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_INTERNODE_NODE_OP_CUH_
