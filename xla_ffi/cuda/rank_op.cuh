// The part of an op on one rank that all modes share: how it begins, aborts, and learns that others
// have aborted.
#ifndef JAX_DEEPEP_CUDA_RANK_OP_CUH_
#define JAX_DEEPEP_CUDA_RANK_OP_CUH_

#include <cstdint>

#include "cuda/memory_order.cuh"
#include "cuda/op_frame.h"
#include "cuda/remote_put.cuh"

namespace jax_deepep {

// The ranks that read each other in an op, or push to each other: all of the EP group, or those of
// a node of it.
struct WholeGroup {
  static constexpr bool kSeveralNodes = false;
  __device__ static int First(const OpFrame&) { return 0; }
  __device__ static int End(const OpFrame& frame) { return frame.shape.num_ranks; }
};
struct RanksOfNode {
  static constexpr bool kSeveralNodes = true;
  __device__ static int First(const OpFrame& frame) { return frame.first_of_node(); }
  __device__ static int End(const OpFrame& frame) { return First(frame) + frame.shape.node_size(); }
};

// With kSeveralNodes, a rank that aborts also notifies the ranks of other nodes with its index.
template <bool kSeveralNodes>
class RankOpOf {
 public:
  // Every method is called by all threads of the block. `shared` is the block's.
  struct Shared {
    uint64_t step;
    uint64_t began_ns;
    int flag;
    bool refused;          // another op of the channel is running on this rank
    uint32_t num_invalid;  // entries of topk_idx that this block has ignored
    uint64_t ended;
  };

  __device__ RankOpOf(const OpFrame& frame, Shared* shared)
      : frame_(frame),
        own_(*frame.control[frame.rank]),
        channel_(frame.ChannelOf(frame.rank)),
        shared_(*shared) {}

  // False if the communicator was broken before this op: an earlier one has failed on this rank or
  // a peer, or the communicator is closed and peers' pools are no longer mapped. A late peer may
  // still be in the failed op, so this rank must not write what the peer reads from its control
  // block.
  __device__ bool Begin() {
    Enter();
    return Entered();
  }

  // The two halves of Begin: one thread, of the warp with the fewest items, takes the rank while
  // others load their operands; then all learn the result.
  __device__ void Enter() {
    if (threadIdx.x == blockDim.x - 1) {
      // From then on no other op of this channel ends, so that the step is this op's alone.
      const ChannelState before = {SetBits(&channel_.state, frame_.mark)};
      const bool lost = (*static_cast<volatile uint32_t*>(&own_.failed) |
                         *static_cast<volatile uint64_t*>(&own_.broken)) != 0;
      const bool mistaken = *frame_.expected_rank != frame_.rank;
      shared_.began_ns = NanosecondClock();
      shared_.step = before.step() + 1;
      shared_.refused = before.in_flight() != (frame_.part == Part::kDone) ||
                        (before.mark() != 0 && before.mark() != frame_.mark);
      if (shared_.refused) Fail(Failure::kTwoAtOnce);
      if (mistaken && blockIdx.x == 0) Fail(Failure::kWrongRank);
      shared_.flag = !(lost || mistaken || shared_.refused);
      shared_.num_invalid = 0;
    }
  }
  __device__ bool Entered() { return SharedFlag(); }

  __device__ uint64_t step() const { return shared_.step; }
  // Of this rank.
  __device__ Channel& channel() const { return channel_; }

  // Count the pairs that this block has read from each rank, in shared memory [R].
  __device__ void CountTaken(const int32_t* taken) {
    __syncthreads();
    for (int rank = threadIdx.x; rank < num_ranks(); rank += blockDim.x) {
      Add(&channel_.rows_pulled[rank], taken[rank]);
    }
  }

  // --- Between nodes.

  __device__ int num_nodes() const { return frame_.shape.num_nodes(); }
  __device__ int node() const { return frame_.NodeOf(frame_.rank); }

  // Call use(node), the next node first, so that no two nodes put to the same one at once.
  template <typename Use>
  __device__ void ForOtherNodes(Use use) const {
    for (int i = 1; i < num_nodes(); ++i) {
      const int after = node() + i;
      use(after < num_nodes() ? after : after - num_nodes());
    }
  }

  // In a separate kernel that the host launches in place of an op: the rank cannot continue.
  __device__ void Abort(Failure failure) {
    shared_.step = ChannelState{*static_cast<volatile uint64_t*>(&channel_.state)}.step() + 1;
    Fail(failure);
  }

 protected:
  // On the last block, after all reads of this rank: call succeed(), or fail() if the op is lost.
  // A started op goes on, unless it is lost.
  template <typename Succeed, typename Fill>
  __device__ void End(bool lost, Succeed succeed, Fill fail) {
    if (lost) {
      if (threadIdx.x == 0) Fail(Failure::kNone);
      fail();
    } else {
      succeed();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      const bool goes_on = frame_.part == Part::kStart && !lost;
      channel_.num_invalid = 0;
      own_.last_op_ns = NanosecondClock() - shared_.began_ns;
      own_.last_op_blocks = gridDim.x;
      *static_cast<volatile uint64_t*>(&channel_.state) =
          ChannelState::Of(goes_on ? step() - 1 : step(), goes_on).word;
    }
  }

  __device__ int num_ranks() const { return frame_.shape.num_ranks; }

  // Whether this lane stands for those of its warp with the same node, which is another one.
  __device__ bool LeadsTo(int to_node) const {
    const uint32_t same = __match_any_sync(~0u, to_node);
    return to_node != kNone && to_node != node() &&
           __ffs(same) - 1 == static_cast<int>(threadIdx.x) % 32;
  }

  // The place of another row among those of an op, or of a chunk of it, that are put to a node in
  // one message.
  __device__ int TakePlace(int to_node, int chunk) const {
    return static_cast<int>(atomicAdd(&channel_.num_staged[chunk % 2][to_node], 1u));
  }
  // By a block, after all of them: return how many were taken, and count these rows as pushed.
  __device__ int EndPlaces(int to_node, int chunk) const {
    uint32_t* num_staged = &channel_.num_staged[chunk % 2][to_node];
    const uint32_t count = *static_cast<volatile uint32_t*>(num_staged);
    __syncthreads();
    if (threadIdx.x == 0) {
      *num_staged = 0;
      Add(&channel_.rows_pushed[frame_.RankOnNode(to_node)], count);
    }
    return static_cast<int>(count);
  }

  // By a block: put to a node how many rows this rank has put there in total, then the flag.
  __device__ void PutTotalAndFlag(int to_node, uint64_t* flags, uint64_t value) const {
    __syncthreads();
    if (threadIdx.x == 0) {
      PutFlag<ByThread>(frame_, to_node, &channel_.rows_received[frame_.rank],
                        &channel_.rows_pushed[frame_.RankOnNode(to_node)], sizeof(uint64_t),
                        &flags[frame_.rank], value);
    }
  }

  // Whether the op is lost: this rank or a peer has aborted. The same answer for all threads.
  __device__ bool Stopped() {
    if (threadIdx.x == 0) shared_.flag = IsBroken();
    return SharedFlag();
  }

  // What the first thread has written to shared_.flag, for all threads.
  __device__ bool SharedFlag() {
    __syncthreads();
    const bool flag = shared_.flag != 0;
    __syncthreads();
    return flag;
  }

  // Let a peer that waits for this rank see whether it does so in the same op.
  __device__ void Announce(int peer) const {
    static_assert(sizeof(Announcement) == sizeof(Packet));
    Announcement& to = frame_.ChannelOf(peer).announced[frame_.rank];
    StorePacket(reinterpret_cast<Packet*>(&to), {frame_.op_hash, step()});
  }
  // Whether a peer is in another op at this step. A peer at a later step was in this op.
  __device__ bool IsInOtherOp(int peer) const {
    const Packet found = LoadPacket(reinterpret_cast<const Packet*>(&channel_.announced[peer]));
    return found.tag == step() && found.value != frame_.op_hash;
  }

  __device__ uint64_t WordToPublish(int index) const {
    if (index == 0) return step();
    if (index == 1) return frame_.op_hash;
    if (index < 2 + OpSignature::kWords) return frame_.op.words()[index - 2];
    return frame_.offsets[index - 2 - OpSignature::kWords];
  }

  __device__ bool IsBroken() const {
    // The second load pairs with the release store in Fail, on a peer.
    return LoadAcquireDevice(&own_.failed) != 0 || LoadAcquireSystem(&own_.broken) != 0;
  }

  // Whether this block is the last of its rank to arrive here; the writes and reads of all blocks
  // are ordered before what it does next.
  __device__ bool IsLastBlock(uint32_t* counter) {
    __syncthreads();
    if (threadIdx.x == 0) {
      FenceSystem();
      // More arrive if two ops run at once, which fails.
      shared_.flag = AddAcquireRelease(counter, 1) >= gridDim.x - 1;
      if (shared_.flag) *counter = 0;
    }
    return SharedFlag();
  }

  // Abort, once; called by one thread. A rank reports the failure to its host and to all peers; a
  // rank that was notified by a peer forwards that report, to its peers as well: the reporter may
  // not have notified them yet, and they could read this rank's operands after it has left, and
  // succeed.
  __device__ __noinline__ void Fail(Failure failure, const RankSet& missing = {},
                                    int32_t other_rank = kNone) {
    if (atomicCAS(&own_.failed, 0u, kFailing) != 0u) {
      // Pairs with the release store below: once this op ends, XLA reuses its operands, and peers
      // that still read them must have been notified. The notifying thread waits for nothing.
      while (LoadAcquireDevice(&own_.failed) == kFailing) {
      }
      return;
    }
    HostStatus& status = *frame_.status;
    const uint64_t broken = LoadAcquireSystem(&own_.broken);
    const int reporter = broken != 0 ? static_cast<int>(broken - 1) : frame_.rank;
    FailureReport& report = own_.reports[reporter];
    if (broken == 0) {
      report.failure = failure;
      report.step = step();
      report.missing = missing;
      report.op = frame_.op;
      report.other_rank = other_rank;
      if (other_rank != kNone) report.other_op = channel_.published[other_rank].op;
#pragma unroll 1
      for (int rank = 0; rank < num_ranks(); ++rank) {
        report.seen[rank] = LoadAcquireSystem(&channel_.arrived[rank]);
      }
    }
    CopyReport(&status.report, report);
    status.reporter = reporter;
    __threadfence_system();
    *static_cast<volatile uint32_t*>(&status.failed) = 1;
    const int first = kSeveralNodes ? frame_.first_of_node() : 0;
    const int end = kSeveralNodes ? first + frame_.shape.node_size() : num_ranks();
#pragma unroll 1
    for (int peer = first; peer < end; ++peer) {
      DeviceControl& control = *frame_.control[peer];
      // Several ranks may write a report to the same address: the same words.
      if (peer != frame_.rank && peer != reporter) CopyReport(&control.reports[reporter], report);
      StoreReleaseSystem(&control.broken, reporter + 1);  // pairs with IsBroken, on the peer
    }
    if constexpr (kSeveralNodes) {
#pragma unroll 1
      for (int node = 0; node < frame_.shape.num_nodes(); ++node) {
        const int peer = frame_.RankOnNode(node);
        if (peer == frame_.rank) continue;
        PutFlag<ByThread>(frame_, node, &report, &report, peer == reporter ? 0 : sizeof(report),
                          &own_.broken, reporter + 1);
      }
    }
    // Pairs with the fence in Finish, on a peer: it is notified before anything that it reads is
    // overwritten.
    FenceSystem();
    StoreReleaseDevice(&own_.failed, kFailed);
  }

  __device__ static void CopyReport(FailureReport* to, const FailureReport& from) {
    constexpr int kWords = sizeof(FailureReport) / sizeof(uint64_t);
    const auto* in = reinterpret_cast<const volatile uint64_t*>(&from);
    auto* out = reinterpret_cast<volatile uint64_t*>(to);
#pragma unroll 1
    for (int i = 0; i < kWords; ++i) out[i] = in[i];
  }

  const OpFrame& frame_;
  DeviceControl& own_;
  Channel& channel_;  // of own_
  Shared& shared_;
};

using RankOp = RankOpOf<false>;

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_RANK_OP_CUH_
