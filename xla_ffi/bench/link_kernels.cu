// Kernels that only move data over a link: the limits of the ops.
#include <cuda_runtime.h>

#include "bench/bulk_copy.cuh"
#include "bench/link_kernels.h"
#include "cuda/memory_order.cuh"

namespace jax_deepep {
namespace {

constexpr int kRowThreads = 448;  // two words of 16 bytes each make a row of 7168 bfloat16
constexpr int kRowWords = 2;      // in flight per thread
constexpr int kPolls = 4096;      // between checks whether this rank has timed out
constexpr int kMostPolls = 1 << 26;

// Wait, for a few seconds at most, until a peer has released `step` to a flag of this rank.
__device__ void WaitFor(const uint32_t* flag, uint32_t step, LinkControl* own) {
  for (int polls = 1; static_cast<int32_t>(LoadAcquireSystem(flag) - step) < 0; ++polls) {
    if (polls % kPolls != 0) continue;
    if (polls == kMostPolls || *static_cast<volatile uint32_t*>(&own->timed_out) != 0) {
      *static_cast<volatile uint32_t*>(&own->timed_out) = 1;
      return;
    }
  }
}

// The peer that a row is sent to, and the one that the row of that index comes from: round robin.
__device__ __forceinline__ int PeerOf(const LinkFrame& frame, int row) {
  return (frame.rank + 1 + row % (frame.num_ranks - 1)) % frame.num_ranks;
}
__device__ __forceinline__ int SourceOf(const LinkFrame& frame, int row) {
  return (frame.rank + frame.num_ranks - 1 - row % (frame.num_ranks - 1)) % frame.num_ranks;
}

// Call store(at, load(at)) for the words of a row, with the loads of two words in flight.
template <typename Load, typename Store>
__device__ __forceinline__ void ForRow(int row_words, Load load, Store store) {
  for (int base = threadIdx.x; base < row_words; base += kRowThreads * kRowWords) {
    decltype(load(0)) words[kRowWords];
#pragma unroll
    for (int i = 0; i < kRowWords; ++i) {
      if (base + i * kRowThreads < row_words) words[i] = load(base + i * kRowThreads);
    }
#pragma unroll
    for (int i = 0; i < kRowWords; ++i) {
      if (base + i * kRowThreads < row_words) store(base + i * kRowThreads, words[i]);
    }
  }
}

__device__ __forceinline__ uint4* Words(const LinkFrame& frame, int owner, LinkRows rows, int row) {
  return reinterpret_cast<uint4*>(frame.Row(owner, rows, row));
}

// A word of this rank's copy, and the same word as returned.
struct WordPair {
  uint4 own, back;
  __device__ uint4 Sum() const {
    return make_uint4(own.x + back.x, own.y + back.y, own.z + back.z, own.w + back.w);
  }
};

__global__ void RendezvousKernel(const __grid_constant__ LinkFrame frame, uint64_t wait_ns) {
  LinkControl* own = frame.Control(frame.rank);
  const uint32_t step = own->rendezvous_step + 1;
  const int peer = threadIdx.x;
  if (peer < frame.num_ranks) {
    StoreReleaseSystem(&frame.Control(peer)->rendezvous[frame.rank * kFlagStride], step);
    WaitFor(&own->rendezvous[peer * kFlagStride], step, own);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  own->rendezvous_step = step;
  for (const uint64_t begin = NanosecondClock(); NanosecondClock() - begin < wait_ns;) continue;
}

__global__ void NothingKernel() {}

__global__ void FlagKernel(const __grid_constant__ LinkFrame frame) {
  if (threadIdx.x != 0) return;
  LinkControl* own = frame.Control(frame.rank);
  const uint32_t step = own->flags.step[0] + 1;
  StoreReleaseSystem(frame.Control((frame.rank + 1) % frame.num_ranks)->flags.next, step);
  WaitFor(own->flags.next, step, own);
  own->flags.step[0] = step;
}

__global__ void __launch_bounds__(kRowThreads)
    PushKernel(const __grid_constant__ LinkFrame frame, int rows) {
  LinkControl* own = frame.Control(frame.rank);
  const uint32_t step = own->flags.step[blockIdx.x] + 1;
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const int peer = PeerOf(frame, row);
    const uint4* x = Words(frame, frame.rank, LinkRows::kX, row);
    uint4* to_peer = Words(frame, peer, LinkRows::kReceived, row);
    uint4* copy = Words(frame, frame.rank, LinkRows::kOwn, row);
    ForRow(
        frame.row_words, [&](int at) { return x[at]; },
        [&](int at, uint4 word) {
          to_peer[at] = word;
          copy[at] = word;
        });
    __syncthreads();
    if (threadIdx.x == 0)
      StoreReleaseSystem(&frame.Control(peer)->flags.arrived[row * kFlagStride], step);
  }
  if (threadIdx.x != 0) return;
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    WaitFor(&own->flags.arrived[row * kFlagStride], step, own);
  }
  own->flags.step[blockIdx.x] = step;
}

// Notify every peer that this rank's rows may be read, and wait for those that this block reads
// from.
__device__ void WaitForReaders(const LinkFrame& frame, int rows, uint32_t step) {
  if (threadIdx.x == 0) {
    LinkControl* own = frame.Control(frame.rank);
    for (int peer = 0; blockIdx.x == 0 && peer < frame.num_ranks; ++peer) {
      if (peer != frame.rank) {
        StoreReleaseSystem(&frame.Control(peer)->flags.ready[frame.rank * kFlagStride], step);
      }
    }
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
      WaitFor(&own->flags.ready[PeerOf(frame, row) * kFlagStride], step, own);
    }
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kRowThreads)
    PullKernel(const __grid_constant__ LinkFrame frame, int rows) {
  LinkControl* own = frame.Control(frame.rank);
  const uint32_t step = own->flags.step[blockIdx.x] + 1;
  WaitForReaders(frame, rows, step);
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const uint4* x = Words(frame, PeerOf(frame, row), LinkRows::kX, row);
    uint4* to = Words(frame, frame.rank, LinkRows::kReceived, row);
    ForRow(
        frame.row_words, [&](int at) { return LoadFresh(x + at); },
        [&](int at, uint4 word) { to[at] = word; });
    const uint4* mine = Words(frame, frame.rank, LinkRows::kX, row);
    uint4* copy = Words(frame, frame.rank, LinkRows::kOwn, row);
    ForRow(
        frame.row_words, [&](int at) { return mine[at]; },
        [&](int at, uint4 word) { copy[at] = word; });
  }
  if (threadIdx.x == 0) own->flags.step[blockIdx.x] = step;
}

// After PushKernel: what the peers have received is read there and added.
__global__ void __launch_bounds__(kRowThreads)
    PullBackKernel(const __grid_constant__ LinkFrame frame, int rows) {
  WaitForReaders(frame, rows, frame.Control(frame.rank)->flags.step[blockIdx.x]);
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const uint4* there = Words(frame, PeerOf(frame, row), LinkRows::kReceived, row);
    const uint4* here = Words(frame, frame.rank, LinkRows::kOwn, row);
    uint4* out = Words(frame, frame.rank, LinkRows::kOut, row);
    ForRow(
        frame.row_words, [&](int at) { return WordPair{here[at], LoadFresh(there + at)}; },
        [&](int at, WordPair words) { out[at] = words.Sum(); });
  }
}

// After PushKernel: what was received goes back to its source, which adds it.
__global__ void __launch_bounds__(kRowThreads)
    PushBackKernel(const __grid_constant__ LinkFrame frame, int rows) {
  LinkControl* own = frame.Control(frame.rank);
  const uint32_t step = own->flags.step[blockIdx.x];
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const int source = SourceOf(frame, row);
    const uint4* received = Words(frame, frame.rank, LinkRows::kReceived, row);
    uint4* back = Words(frame, source, LinkRows::kBack, row);
    ForRow(
        frame.row_words, [&](int at) { return received[at]; },
        [&](int at, uint4 word) { back[at] = word; });
    __syncthreads();
    if (threadIdx.x == 0)
      StoreReleaseSystem(&frame.Control(source)->flags.returned[row * kFlagStride], step);
  }
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    if (threadIdx.x == 0) WaitFor(&own->flags.returned[row * kFlagStride], step, own);
    __syncthreads();
    const uint4* here = Words(frame, frame.rank, LinkRows::kOwn, row);
    const uint4* back = Words(frame, frame.rank, LinkRows::kBack, row);
    uint4* out = Words(frame, frame.rank, LinkRows::kOut, row);
    ForRow(
        frame.row_words, [&](int at) { return WordPair{here[at], LoadFresh(back + at)}; },
        [&](int at, WordPair words) { out[at] = words.Sum(); });
  }
}

constexpr int kWarmUp = 100;  // discarded round trips

template <bool kWithRow>
__global__ void __launch_bounds__(1024)
    RoundTripKernel(const __grid_constant__ LinkFrame frame, int partner, int count) {
  LinkControl* own = frame.Control(frame.rank);
  uint32_t* mine = own->flags.round_trip;
  uint32_t* theirs = frame.Control(partner)->flags.round_trip;
  uint4* to = Words(frame, partner, LinkRows::kReceived, 0);
  const uint4* from = Words(frame, frame.rank, LinkRows::kReceived, 0);
  uint4 word = make_uint4(threadIdx.x, 1, 2, 3);
  uint64_t begin = 0;
  for (int i = 1; i <= count + kWarmUp; ++i) {
    if (i == kWarmUp + 1) begin = NanosecondClock();
    for (int half = 0; half < 2; ++half) {
      const bool sends = (half == 0) == (frame.rank < partner);
      if (sends) {
        if constexpr (kWithRow) {
          for (int at = threadIdx.x; at < frame.row_words; at += blockDim.x) to[at] = word;
          __syncthreads();
        }
        if (threadIdx.x == 0) StoreReleaseSystem(theirs, i);
      } else {
        if (threadIdx.x == 0) WaitFor(mine, i, own);
        if constexpr (kWithRow) {
          __syncthreads();
          for (int at = threadIdx.x; at < frame.row_words; at += blockDim.x) {
            word = LoadFresh(from + at);
          }
        }
      }
    }
  }
  if (threadIdx.x == 0) own->round_trip_ns = NanosecondClock() - begin;
}

// A warp per piece, all of whose loads are in flight at once.
__global__ void __launch_bounds__(1024, 1) CopyKernel(char* to, const char* from, int64_t pieces) {
  constexpr int kWords = kPieceBytes / 512;
  const int lane = threadIdx.x % 32;
  const int64_t stride = int64_t{gridDim.x} * (blockDim.x / 32);
  int64_t piece = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  for (; piece < pieces; piece += stride) {
    const auto* source = reinterpret_cast<const uint4*>(from + piece * kPieceBytes) + lane;
    auto* target = reinterpret_cast<uint4*>(to + piece * kPieceBytes) + lane;
    uint4 words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(words[i].x), "=r"(words[i].y), "=r"(words[i].z), "=r"(words[i].w)
                   : "l"(source + i * 32));
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) target[i * 32] = words[i];
  }
}

constexpr int kBulkWarps = 4, kBulkDepth = 6;  // pieces of each warp in shared memory
constexpr int kBulkBytes = kBulkWarps * kBulkDepth * kPieceBytes;

// Through shared memory by the bulk copy engine, issued by a lane of each warp: half of the pieces
// are being loaded while the other half are being stored.
__global__ void __launch_bounds__(kBulkWarps * 32, 1)
    BulkCopyKernel(char* to, const char* from, int64_t pieces) {
  extern __shared__ __align__(128) char memory[];
  __shared__ __align__(8) uint64_t barriers[kBulkWarps][kBulkDepth];
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 != 0) return;
  char* slots = memory + warp * kBulkDepth * kPieceBytes;
  for (int slot = 0; slot < kBulkDepth; ++slot) InitLoadBarrier(&barriers[warp][slot]);
  FenceBarrierInit();
  constexpr int kAhead = kBulkDepth / 2;
  const int64_t stride = int64_t{gridDim.x} * kBulkWarps;
  const int64_t first = int64_t{blockIdx.x} * kBulkWarps + warp;
  const int64_t count = first < pieces ? (pieces - first + stride - 1) / stride : 0;
  for (int64_t i = 0; i < count + kAhead; ++i) {
    if (i < count) {
      const int slot = i % kBulkDepth;
      // The slot is free once its last store has read it: all but the newest stores have.
      if (i >= kBulkDepth) WaitForStoresToRead<kAhead - 1>();
      ExpectLoads(&barriers[warp][slot], kPieceBytes);
      BulkLoad(slots + slot * kPieceBytes, from + (first + i * stride) * kPieceBytes, kPieceBytes,
               &barriers[warp][slot]);
    }
    if (i >= kAhead) {
      const int64_t loaded = i - kAhead;
      const int slot = loaded % kBulkDepth;
      WaitForLoads(&barriers[warp][slot], loaded / kBulkDepth % 2);
      BulkStore(to + (first + loaded * stride) * kPieceBytes, slots + slot * kPieceBytes,
                kPieceBytes);
      CommitStores();
    }
  }
  WaitForStores();
}

}  // namespace

cudaError_t LaunchRendezvous(const LinkFrame& frame, uint64_t wait_ns, cudaStream_t stream) {
  RendezvousKernel<<<1, kMaxRanks, 0, stream>>>(frame, wait_ns);
  return cudaGetLastError();
}

cudaError_t LaunchStep(const LinkFrame& frame, ChainStep step, int rows, cudaStream_t stream) {
  const int blocks = rows < kMaxRowBlocks ? rows : kMaxRowBlocks;
  switch (step) {
    case ChainStep::kNothing:
      NothingKernel<<<1, 32, 0, stream>>>();
      break;
    case ChainStep::kFlag:
      FlagKernel<<<1, 32, 0, stream>>>(frame);
      break;
    case ChainStep::kPull:
      PullKernel<<<blocks, kRowThreads, 0, stream>>>(frame, rows);
      break;
    default:
      PushKernel<<<blocks, kRowThreads, 0, stream>>>(frame, rows);
  }
  if (step == ChainStep::kPushPullBack) {
    PullBackKernel<<<blocks, kRowThreads, 0, stream>>>(frame, rows);
  } else if (step == ChainStep::kPushPushBack) {
    PushBackKernel<<<blocks, kRowThreads, 0, stream>>>(frame, rows);
  }
  return cudaGetLastError();
}

cudaError_t LaunchRoundTrips(const LinkFrame& frame, int partner, bool with_row, int count,
                             cudaStream_t stream) {
  if (with_row) {
    const int threads = frame.row_words < 1024 ? (frame.row_words + 31) / 32 * 32 : 1024;
    RoundTripKernel<true><<<1, threads, 0, stream>>>(frame, partner, count);
  } else {
    RoundTripKernel<false><<<1, 1, 0, stream>>>(frame, partner, count);
  }
  return cudaGetLastError();
}

cudaError_t LaunchCopy(char* to, const char* from, int64_t bytes, bool bulk, int num_sms,
                       cudaStream_t stream) {
  const int64_t pieces = bytes / kPieceBytes;
  if (!bulk) {
    CopyKernel<<<num_sms, 1024, 0, stream>>>(to, from, pieces);
    return cudaGetLastError();
  }
  const cudaError_t error =
      cudaFuncSetAttribute(BulkCopyKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBulkBytes);
  if (error != cudaSuccess) return error;
  BulkCopyKernel<<<num_sms, kBulkWarps * 32, kBulkBytes, stream>>>(to, from, pieces);
  return cudaGetLastError();
}

}  // namespace jax_deepep
