// How the ranks of a group go through one op together, on the device, without the host.
//
//     Begin | write what peers read | Publish | WaitForArrivals | read peers | Finish
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
// tests/unit/protocol_model.py has this protocol step by step, and tries all runs of a few ranks.
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
    bool failed_before;
    const char* operands[kMaxOperands][kMaxRanks];
  };

  __device__ GroupOp(const OpFrame& frame, Shared* shared)
      : frame_(frame), own_(*frame.control[frame.rank]), shared_(*shared) {}

  __device__ void Begin() {
    if (threadIdx.x == 0) {
      shared_.step = own_.step + 1;
      shared_.failed_before =
          own_.failed != 0 || *static_cast<volatile uint64_t*>(&own_.broken) != 0;
      shared_.began_ns = NanosecondClock();
      if (blockIdx.x == 0 && *frame_.believed_rank != frame_.rank) {
        Fail(Failure::kWrongRank, 0);
      }
    }
    __syncthreads();
  }

  __device__ uint64_t step() const { return shared_.step; }
  __device__ DeviceControl& own() const { return own_; }

  // Whether the group was lost before this op: an earlier one has failed on this rank, a peer has
  // said so, or the communicator is closed and peers' pools are no longer mapped. A late peer may
  // still be in the op that failed, so that this rank must not touch what the peer takes from its
  // control block.
  __device__ bool failed_before() const { return shared_.failed_before; }

  // Wait for all blocks of this rank; what they wrote before is visible after. Unbounded: they wait
  // for nobody else.
  __device__ void SyncGrid() {
    __syncthreads();
    if (threadIdx.x == 0) {
      const uint32_t generation = LoadAcquireDevice(&own_.generation);
      if (AddAcquireRelease(&own_.num_waiting, 1) == gridDim.x - 1) {
        own_.num_waiting = 0;
        StoreReleaseDevice(&own_.generation, generation + 1);  // pairs with the load below
      } else {
        while (LoadAcquireDevice(&own_.generation) == generation) {
        }
      }
    }
    __syncthreads();
  }

  // Let peers read what this rank's blocks have written with ordinary stores, here and before.
  __device__ void Publish() {
    if (!IsLastBlock(&own_.num_ready) || Stopped()) return;
    for (int peer = threadIdx.x; peer < num_ranks(); peer += blockDim.x) {
      DeviceControl& control = *frame_.control[peer];
      Publication& published = control.published[frame_.rank];
      published.what = frame_.what;
      for (int i = 0; i < kMaxOperands; ++i) published.offsets[i] = frame_.offsets[i];
      // Pairs with the acquire load in WaitForAll, on the peer. The other blocks' writes are
      // ordered before it by their ticket in IsLastBlock.
      StoreReleaseSystem(&control.arrived[frame_.rank], step());
    }
  }

  // Wait until all ranks have published. False: the op has failed, and nothing may be read.
  __device__ bool WaitForArrivals() {
    if (failed_before() || !WaitForAll(own_.arrived, Failure::kNotArrived)) return false;
    if (threadIdx.x < 32) {
      uint64_t different = 0;
      for (int base = 0; base < num_ranks(); base += 32) {
        const int rank = base + threadIdx.x;
        const bool differs = rank < num_ranks() && own_.published[rank].what != frame_.what;
        different |= static_cast<uint64_t>(__ballot_sync(~0u, differs)) << base;
      }
      if (threadIdx.x == 0) {
        if (different != 0) Fail(Failure::kDifferentOps, different);
        shared_.flag = different == 0;
      }
    }
    for (int i = threadIdx.x; i < num_ranks() * kMaxOperands; i += blockDim.x) {
      const int rank = i / kMaxOperands, index = i % kMaxOperands;
      shared_.operands[index][rank] = frame_.pool[rank] + own_.published[rank].offsets[index];
    }
    __syncthreads();
    const bool ok = shared_.flag != 0;
    __syncthreads();
    return ok;
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
    if (!IsLastBlock(&own_.num_finished)) return;
    if (!Stopped()) {
      for (int peer = threadIdx.x; peer < num_ranks(); peer += blockDim.x) {
        DeviceControl& control = *frame_.control[peer];
        control.rows_taken[frame_.rank] =
            *static_cast<volatile uint64_t*>(&own_.rows_received[peer]);
        // Pairs with the acquire load in WaitForAll, on the peer: this rank's reads come before.
        StoreReleaseSystem(&control.left[frame_.rank], step());
      }
      WaitForAll(own_.left, Failure::kNotLeft);
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
      own_.step = step();
    }
  }

 private:
  __device__ int num_ranks() const { return frame_.shape.num_ranks; }

  // Whether the op is lost: this rank or a peer has given up. The same answer for all threads.
  __device__ bool Stopped() {
    if (threadIdx.x == 0) shared_.flag = IsBroken();
    __syncthreads();
    const bool stopped = shared_.flag != 0;
    __syncthreads();
    return stopped;
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
      shared_.flag = AddAcquireRelease(counter, 1) == gridDim.x - 1;
      if (shared_.flag) *counter = 0;
    }
    __syncthreads();
    const bool last = shared_.flag != 0;
    __syncthreads();
    return last;
  }

  // Wait until the flags of all ranks have reached this step; leaves the answer in shared_.flag
  // too.
  __device__ bool WaitForAll(const uint64_t* flags, Failure failure) {
    if (threadIdx.x < 32) {
      const uint64_t began_ns = NanosecondClock();
      uint64_t missing = 0;
      bool stopped = false;
      for (int base = 0; base < num_ranks(); base += 32) {
        const int rank = base + threadIdx.x;
        bool late = false;
        if (rank < num_ranks()) {
          // Pairs with the release stores in Publish and Finish, on the peer.
          while (LoadAcquireSystem(&flags[rank]) < step() && !stopped && !late) {
            stopped = IsBroken();
            late = NanosecondClock() - began_ns > frame_.timeout_ns;
          }
          if (blockIdx.x == 0 && failure == Failure::kNotArrived) {
            own_.waited_ns[rank] += NanosecondClock() - began_ns;
          }
          late = late && !stopped;
        }
        missing |= static_cast<uint64_t>(__ballot_sync(~0u, late)) << base;
      }
      stopped = __any_sync(~0u, stopped);
      if (threadIdx.x == 0) {
        if (missing != 0 && !stopped) Fail(failure, missing);
        shared_.flag = missing == 0 && !stopped;
      }
    }
    __syncthreads();
    const bool ok = shared_.flag != 0;
    __syncthreads();
    return ok;
  }

  // Give up, once; called by one thread. A rank that nobody has told says why to its host and to
  // all peers; one that was told passes that on, to its peers as well: who told it may not have
  // come to them yet, and they may read this rank's operands, and succeed, after it has left.
  __device__ __noinline__ void Fail(Failure failure, uint64_t missing) {
    if (atomicCAS(&own_.failed, 0u, 1u) != 0u) return;
    HostStatus& status = *frame_.status;
    const uint64_t broken = LoadAcquireSystem(&own_.broken);
    const int reporter = broken != 0 ? static_cast<int>(broken - 1) : frame_.rank;
    FailureReport& report = own_.reports[reporter];
    if (broken == 0) {
      report.failure = failure;
      report.verb = frame_.verb;
      report.step = step();
      report.missing = missing;
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
