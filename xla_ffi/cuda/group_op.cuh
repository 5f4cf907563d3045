// How the ranks of a group go through one op together, on the device, without the host.
//
//     Begin | write what peers read | Publish | WaitForArrivals | read peers | Finish
//
// Begin, SyncGrid and WaitForArrivals are false where the op is lost: what follows is left out, up
// to Finish.
//
// 1. Publish: the last block of a rank to come tells every peer, after all writes of the rank.
// 2. WaitForArrivals: every block waits until all peers have published, so that it may read them.
// 3. Finish: the last block tells every peer that this rank has done its reads, and waits until all
//    peers have done theirs: only then may XLA reuse what they read.
//
// A step is an op of the communicator, counted in device memory: a replayed graph is as good as a
// fresh launch. Flags only grow, so that nothing is ever reset. Who waits longer than the timeout
// gives up: it tells all peers and its host why, and leaves. A peer that still reads then may read
// what XLA has reused; it looks for such word after its last load, in Finish, and fails too. It
// passes the word on before it leaves in turn: whoever leaves an op that failed has told all
// others.
//
// tests/unit/protocol_throughput.py has this protocol step by step, and tries all runs of a few
// ranks.
#ifndef JAX_DEEPEP_CUDA_GROUP_OP_CUH_
#define JAX_DEEPEP_CUDA_GROUP_OP_CUH_

#include <cstdint>

#include "cuda/memory_order.cuh"
#include "cuda/op_frame.h"

namespace jax_deepep {

class GroupOp {
 public:
  // Every method is called by all threads of the block. `shared` is the block's.
  struct Shared {
    uint64_t step;
    uint64_t began_ns;
    int flag;
    bool refused;  // another op of the communicator is running on this rank
    const char* operands[kMaxOperands][kMaxRanks];
  };

  __device__ GroupOp(const OpFrame& frame, Shared* shared)
      : frame_(frame), own_(*frame.control[frame.rank]), shared_(*shared) {}

  // False where the group was lost before this op: an earlier one has failed on this rank, a peer
  // has said so, or the communicator is closed and peers' pools are no longer mapped. A late peer
  // may still be in the op that failed, so that this rank must not touch what the peer takes from
  // its control block.
  __device__ bool Begin() {
    if (threadIdx.x == 0) {
      shared_.step = *static_cast<volatile uint64_t*>(&own_.step) + 1;
      bool lost = own_.failed != 0 || *static_cast<volatile uint64_t*>(&own_.broken) != 0;
      const bool mistaken = *frame_.believed_rank != frame_.rank;
      const uint64_t active = CompareAndSwap(&own_.active, 0, frame_.launch);
      shared_.began_ns = NanosecondClock();
      shared_.refused = active != 0 && active != frame_.launch;
      if (shared_.refused) Fail(Failure::kTwoAtOnce, 0);
      if (mistaken && blockIdx.x == 0) Fail(Failure::kWrongRank, 0);
      shared_.flag = !(lost || mistaken || shared_.refused);
    }
    return SharedFlag();
  }

  __device__ uint64_t step() const { return shared_.step; }
  __device__ DeviceControl& own() const { return own_; }

  // Wait for all blocks of this rank; what they wrote before is visible after.
  __device__ bool SyncGrid() {
    __syncthreads();
    if (threadIdx.x == 0) {
      shared_.flag = true;
      const uint32_t generation = LoadAcquireDevice(&own_.generation);
      if (AddAcquireRelease(&own_.num_waiting, 1) == gridDim.x - 1) {
        own_.num_waiting = 0;
        StoreReleaseDevice(&own_.generation, generation + 1);  // pairs with the load below
      } else {
        const uint64_t began_ns = NanosecondClock();
        // To look whether the op is lost takes longer than the other blocks do.
        constexpr int kLoadsBetweenLooks = 256;
        for (int i = 1; LoadAcquireDevice(&own_.generation) == generation; ++i) {
          if (i % kLoadsBetweenLooks != 0) continue;
          if (NanosecondClock() - began_ns > frame_.timeout_ns) Fail(Failure::kNoRoom, 0);
          if (IsBroken()) {
            shared_.flag = false;
            break;
          }
        }
      }
    }
    return SharedFlag();
  }

  // Let peers read what this rank's blocks have written with ordinary stores, here and before.
  __device__ void Publish() {
    if (!IsLastBlock(&own_.num_ready)) return;
    const int lane = threadIdx.x % 32;
    for (int peer = threadIdx.x / 32; peer < num_ranks(); peer += blockDim.x / 32) {
      DeviceControl& control = *frame_.control[peer];
      if (lane < Publication::kWords) {
        reinterpret_cast<uint64_t*>(&control.published[frame_.rank])[lane] = WordToPublish(lane);
      }
      __syncwarp();
      // Pairs with the acquire load in WaitForAll, on the peer. The other blocks' writes are
      // ordered before it by their ticket in IsLastBlock.
      if (lane == 0) StoreReleaseSystem(&control.arrived[frame_.rank], step());
    }
  }

  // Wait until all ranks have published the same op. False: nothing may be read.
  __device__ bool WaitForArrivals() {
    if (!WaitForAll<true>(own_.arrived)) return false;
    for (int i = threadIdx.x; i < num_ranks() * kMaxOperands; i += blockDim.x) {
      const int rank = i / kMaxOperands, index = i % kMaxOperands;
      shared_.operands[index][rank] = frame_.pool[rank] + own_.published[rank].offsets[index];
    }
    __syncthreads();
    return true;
  }

  // What a rank has published as its operand `index`. Only after WaitForArrivals.
  template <typename T>
  __device__ const T* Operand(int rank, int index) const {
    return reinterpret_cast<const T*>(shared_.operands[index][rank]);
  }

  // Count the pairs that this block has read from each rank, in shared memory [R].
  __device__ void CountTaken(const int32_t* taken) {
    __syncthreads();
    for (int rank = threadIdx.x; rank < num_ranks(); rank += blockDim.x) {
      atomicAdd(reinterpret_cast<unsigned long long*>(&own_.rows_received[rank]),
                static_cast<unsigned long long>(taken[rank]));
    }
  }

  // End the op: on the last block, after all reads of this rank, succeed() is called or fail().
  template <typename Succeed, typename Fill>
  __device__ void Finish(Succeed succeed, Fill fail) {
    if (shared_.refused) {  // the tickets are the other op's
      fail();
      return;
    }
    if (!IsLastBlock(&own_.num_finished)) return;
    if (!Stopped()) {
      for (int peer = threadIdx.x; peer < num_ranks(); peer += blockDim.x) {
        DeviceControl& control = *frame_.control[peer];
        control.rows_taken[frame_.rank] =
            *static_cast<volatile uint64_t*>(&own_.rows_received[peer]);
        // Pairs with the acquire load in WaitForAll, on the peer: this rank's reads come before.
        StoreReleaseSystem(&control.left[frame_.rank], step());
      }
      WaitForAll<false>(own_.left);
    }
    // Pairs with the fence and the store in Fail, on a peer: if this rank has read what a peer
    // overwrote after giving up, then it sees here that the peer gave up.
    FenceSystem();
    if (Stopped()) {
      if (threadIdx.x == 0) Fail(Failure::kNone, 0);
      fail();
    } else {
      succeed();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      own_.num_invalid = 0;
      own_.last_op_ns = NanosecondClock() - shared_.began_ns;
      own_.last_op_blocks = gridDim.x;
      own_.step = step();
      // Pairs with the compare-and-swap in Begin, of an op that runs at once with this one.
      StoreReleaseDevice(&own_.active, 0);
    }
  }

  // What the host lets a kernel of its own do, in place of an op: the rank cannot go on.
  __device__ void GiveUp(Failure failure) {
    shared_.step = *static_cast<volatile uint64_t*>(&own_.step) + 1;
    Fail(failure, 0);
  }

 private:
  __device__ int num_ranks() const { return frame_.shape.num_ranks; }

  // Whether the op is lost: this rank or a peer has given up. The same answer for all threads.
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

  __device__ uint64_t WordToPublish(int index) const {
    if (index == 0) return frame_.op_hash;
    if (index <= OpSignature::kWords) return frame_.op.words()[index - 1];
    return frame_.offsets[index - 1 - OpSignature::kWords];
  }

  __device__ bool IsBroken() const {
    // The second pairs with the release store in Fail, on a peer.
    return LoadAcquireDevice(&own_.failed) != 0 || LoadAcquireSystem(&own_.broken) != 0;
  }

  // Whether this block is the last of its rank to come here; the writes and reads of all blocks are
  // ordered before what it does then.
  __device__ bool IsLastBlock(uint32_t* counter) {
    __syncthreads();
    if (threadIdx.x == 0) {
      FenceSystem();
      // More have come where two ops have run at once, which has failed.
      shared_.flag = AddAcquireRelease(counter, 1) >= gridDim.x - 1;
      if (shared_.flag) *counter = 0;
    }
    return SharedFlag();
  }

  // Wait until the flags of all ranks have reached this step. Of arrivals, each is looked at as it
  // comes: who has come to another op is not waited for, and neither is anybody else then.
  template <bool kArrivals>
  __device__ bool WaitForAll(const uint64_t* flags) {
    if (threadIdx.x < 32) {
      // Where an op ended while this one began, some blocks have taken its step for theirs.
      const uint64_t last_step = *static_cast<volatile uint64_t*>(&own_.step);
      const uint64_t began_ns = NanosecondClock();
      uint64_t missing = 0;
      int different = kNone;
      bool stopped = false;
      for (int base = 0; base < num_ranks() && !stopped; base += 32) {
        const int rank = base + threadIdx.x;
        bool here = rank >= num_ranks(), differs = false, late = false;
        while (true) {
          // Pairs with the release stores in Publish and Finish, on the peer.
          if (!here && LoadAcquireSystem(&flags[rank]) >= step()) {
            here = true;
            if (kArrivals) {
              differs = own_.published[rank].op_hash != frame_.op_hash;
              if (blockIdx.x == 0) own_.waited_ns[rank] += NanosecondClock() - began_ns;
            }
          }
          if (__all_sync(~0u, here) || __any_sync(~0u, differs)) break;
          if (!here) {
            stopped = IsBroken();
            late = NanosecondClock() - began_ns > frame_.timeout_ns;
          }
          stopped = __any_sync(~0u, stopped);
          if (stopped || __any_sync(~0u, late)) break;
        }
        if (const uint32_t lanes = __ballot_sync(~0u, differs); lanes != 0) {
          different = base + __ffs(lanes) - 1;
          break;
        }
        missing |= static_cast<uint64_t>(__ballot_sync(~0u, !here && late)) << base;
      }
      if (threadIdx.x == 0) {
        const bool alone = last_step + 1 == step();
        if (!alone) {
          Fail(Failure::kTwoAtOnce, 0);
        } else if (different != kNone) {
          Fail(Failure::kDifferentOps, 0, different);
        } else if (missing != 0 && !stopped) {
          Fail(kArrivals ? Failure::kNotArrived : Failure::kNotLeft, missing);
        }
        shared_.flag = alone && different == kNone && missing == 0 && !stopped;
      }
    }
    return SharedFlag();
  }

  // Give up, once; called by one thread. A rank that nobody has told says why to its host and to
  // all peers; one that was told passes that on, to its peers as well: who told it may not have
  // come to them yet, and they may read this rank's operands, and succeed, after it has left.
  __device__ __noinline__ void Fail(Failure failure, uint64_t missing, int32_t other_rank = kNone) {
    if (atomicCAS(&own_.failed, 0u, kFailing) != 0u) {
      // Pairs with the release store below: who leaves this op leaves operands to XLA, and peers
      // that still read them must have been told. Who tells waits for nobody.
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
      if (other_rank != kNone) report.other_op = own_.published[other_rank].op;
#pragma unroll 1
      for (int rank = 0; rank < num_ranks(); ++rank) {
        report.seen[rank] = LoadAcquireSystem(&own_.arrived[rank]);
      }
    }
    CopyReport(&status.report, report);
    status.reporter = reporter;
    __threadfence_system();
    *static_cast<volatile uint32_t*>(&status.failed) = 1;
#pragma unroll 1
    for (int peer = 0; peer < num_ranks(); ++peer) {
      DeviceControl& control = *frame_.control[peer];
      // Several ranks may write a report to the same place: the same words.
      if (peer != frame_.rank && peer != reporter) CopyReport(&control.reports[reporter], report);
      StoreReleaseSystem(&control.broken, reporter + 1);  // pairs with IsBroken, on the peer
    }
    // Pairs with the fence in Finish, on a peer: it is told before anything that it reads is
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
  Shared& shared_;
};

static_assert(sizeof(GroupOp::Shared) <= kStaticSharedBytes);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_GROUP_OP_CUH_
