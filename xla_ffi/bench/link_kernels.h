// The kernels of links.h, as the host launches them.
#ifndef JAX_DEEPEP_BENCH_LINK_KERNELS_H_
#define JAX_DEEPEP_BENCH_LINK_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/device_control.h"
#include "interface/host_device.h"

namespace jax_deepep {

// The kernels of a step of a chain.
enum class ChainStep : int {
  kNothing = 0,       // an empty kernel
  kFlag = 1,          // a flag to the next rank, and one from the rank before
  kPush = 2,          // rows to the peers, a flag with each
  kPull = 3,          // a flag to every peer, then rows from them
  kPushPullBack = 4,  // kPush, then the same rows pulled back and added to the own ones
  kPushPushBack = 5,  // kPush, then the peers push them back, where they are added
};

inline constexpr int kMaxLinkRows = 1 << 15;
// A block per row up to this many, all of which run at once on SM80 and newer: they wait for
// peers' blocks.
inline constexpr int kMaxRowBlocks = 320;
inline constexpr int kFlagStride = 8;  // 32-bit words: a flag has its own 32 bytes
// What a warp copies at a time: 14 words of 16 bytes in each lane.
inline constexpr int kPieceBytes = 14 * 32 * 16;

// Steps and flags, which only grow; peers write the flags.
struct LinkFlags {
  uint32_t step[kMaxRowBlocks];  // of each block
  uint32_t arrived[kMaxLinkRows * kFlagStride];
  uint32_t returned[kMaxLinkRows * kFlagStride];
  uint32_t ready[kMaxRanks * kFlagStride];  // by rank
  uint32_t next[kFlagStride];               // from the rank before
  uint32_t round_trip[kFlagStride];
};

// At the beginning of a rank's memory. Only `flags` is reset, while no rank writes there.
struct LinkControl {
  uint32_t timed_out;  // a wait of this rank has
  uint32_t rendezvous_step;
  uint32_t rendezvous[kMaxRanks * kFlagStride];  // by rank
  uint64_t round_trip_ns;
  LinkFlags flags;
};

// Behind it: arrays of rows, in which a row keeps its index on all ranks.
enum class LinkRows : int {
  kX = 0,         // what this rank sends
  kOwn = 1,       // a copy of it
  kReceived = 2,  // from peers
  kBack = 3,      // returned by peers
  kOut = 4,       // kOwn + what was returned
};
inline constexpr int kNumLinkRows = 5;
inline constexpr size_t kLinkControlBytes = (sizeof(LinkControl) + 511) / 512 * 512;

// What kernels get by value, the same layout on every rank.
struct LinkFrame {
  int32_t rank = 0;
  int32_t num_ranks = 0;
  int32_t max_rows = 0;
  int32_t row_words = 0;  // of 16 bytes
  char* memory[kMaxRanks] = {};

  JAX_DEEPEP_HOST_DEVICE LinkControl* Control(int owner) const {
    return reinterpret_cast<LinkControl*>(memory[owner]);
  }
  JAX_DEEPEP_HOST_DEVICE int64_t row_bytes() const { return int64_t{row_words} * 16; }
  JAX_DEEPEP_HOST_DEVICE char* Row(int owner, LinkRows rows, int row) const {
    const int64_t index = int64_t{max_rows} * static_cast<int>(rows) + row;
    return memory[owner] + kLinkControlBytes + index * row_bytes();
  }
  // Behind the rows: what copies read, and then what they write.
  JAX_DEEPEP_HOST_DEVICE char* CopySource(int owner) const {
    return Row(owner, LinkRows{kNumLinkRows}, 0);
  }
};

// All enqueue one kernel and return its error.
//
// A rendezvous of all ranks; then it waits, so that the host can enqueue more.
cudaError_t LaunchRendezvous(const LinkFrame& frame, uint64_t wait_ns, cudaStream_t stream);
// The kernels of a step, all on `rows` rows.
cudaError_t LaunchStep(const LinkFrame& frame, ChainStep step, int rows, cudaStream_t stream);
cudaError_t LaunchRoundTrips(const LinkFrame& frame, int partner, bool with_row, int count,
                             cudaStream_t stream);
// `bytes` is a multiple of kPieceBytes. Bulk copies take SM90.
cudaError_t LaunchCopy(char* to, const char* from, int64_t bytes, bool bulk, int num_sms,
                       cudaStream_t stream);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_BENCH_LINK_KERNELS_H_
