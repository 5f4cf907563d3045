// What every kernel needs to know about its EP group, passed by value.
#ifndef JAX_DEEPEP_CUDA_OP_FRAME_H_
#define JAX_DEEPEP_CUDA_OP_FRAME_H_

#include <cstddef>
#include <cstdint>

#include "cuda/device_control.h"
#include "cuda/staging.h"
#include "interface/geometry.h"
#include "interface/host_device.h"

namespace jax_deepep {

// What low-latency ops of a communicator may push: each rank has memory for it.
struct WindowSize {
  int32_t num_tokens = 0;  // of each source; 0: none
  int32_t row_bytes = 0;
};

// The parts in which a rank writes sums while peers read earlier ones: of 2^log2_tokens tokens
// each. The same on all ranks.
struct TokenParts {
  int32_t count = 1;
  int32_t log2_tokens = 30;

  // With fewer tokens, reading parts early is worth less than waiting for them costs.
  static constexpr int32_t kLeastTokens = 256;
  static TokenParts Of(int32_t num_tokens, int32_t least_tokens) {
    TokenParts parts{1, 0};
    while (1 << parts.log2_tokens < least_tokens ||
           int64_t{kMostParts} << parts.log2_tokens < num_tokens) {
      ++parts.log2_tokens;
    }
    if (num_tokens > 0) parts.count = ((num_tokens - 1) >> parts.log2_tokens) + 1;
    return parts;
  }

  JAX_DEEPEP_HOST_DEVICE int32_t First(int part) const { return part << log2_tokens; }
  JAX_DEEPEP_HOST_DEVICE int32_t PartOf(int token) const { return token >> log2_tokens; }
  JAX_DEEPEP_HOST_DEVICE int32_t SizeOf(int part, int num_tokens) const {
    const int32_t left = num_tokens - First(part);
    return left < First(1) ? left : First(1);
  }
};

struct OpFrame {
  GroupShape shape;
  WindowSize window;
  StagingLayout staging;
  Chunks chunks;  // of the op's rows or sums between nodes
  TokenParts parts;
  int32_t least_part_tokens = TokenParts::kLeastTokens;
  int32_t rank = 0;
  int32_t channel = 0;
  Part part = Part::kWhole;  // in throughput mode always
  OpSignature op;            // what must be the same on all ranks
  uint64_t op_hash = 0;
  uint64_t mark = 0;                       // of the launch: see ChannelState
  uint64_t timeout_ns = 0;                 // the longest wait
  const int32_t* expected_rank = nullptr;  // the rank as which the program runs this device
  HostStatus* status = nullptr;
  int64_t offsets[kMaxOperands] = {};  // in its pool, of the arrays of this rank that peers read
  // Of every rank of this node, this one included; and of the ranks of other nodes with the same
  // index, for puts alone.
  DeviceControl* control[kMaxRanks] = {};
  const char* pool[kMaxRanks] = {};  // XLA's memory of every rank of this node, read-only

  JAX_DEEPEP_HOST_DEVICE int NodeOf(int of_rank) const { return shape.NodeOf(of_rank); }
  JAX_DEEPEP_HOST_DEVICE int first_of_node() const { return rank - rank % shape.node_size(); }
  // The rank of a node with this rank's index: the only one of another node to which it puts.
  JAX_DEEPEP_HOST_DEVICE int RankOnNode(int node) const { return shape.RankOnNode(rank, node); }

  // What the op uses of a rank's control block.
  JAX_DEEPEP_HOST_DEVICE Channel& ChannelOf(int owner) const {
    return control[owner]->channels[channel];
  }
  // The counts behind this rank's control block, and behind a peer's.
  JAX_DEEPEP_HOST_DEVICE int32_t* Counts(int owner, int source) const {
    return reinterpret_cast<int32_t*>(control[owner] + 1) + channel * NumCounts(shape) +
           static_cast<size_t>(source) * NumCountColumns(shape.num_experts, shape.num_ranks);
  }
  JAX_DEEPEP_HOST_DEVICE int32_t* BlockCounts(int block) const {
    return Counts(rank, shape.num_ranks + block);
  }
};

// Threads per block; one block runs on an SM. Few enough for a thread to have registers for many
// loads in flight.
inline constexpr int kThreads = 512;
inline constexpr int kWarps = kThreads / 32;

// Static shared memory that a kernel with dynamic shared memory may use.
inline constexpr int kStaticSharedBytes =
    kMaxOperands * kMaxRanks * sizeof(void*) + 2 * kMaxRanks * sizeof(int32_t) + 512;

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_OP_FRAME_H_
