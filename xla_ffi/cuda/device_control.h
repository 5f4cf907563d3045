// The state that the ranks of an EP group share on GPUs: one control block of device memory per
// rank.
//
// Peers write to it, over NVLink or on the same GPU, and to no other memory of this rank: it
// belongs to the communicator alone, so that a late peer corrupts nothing. It is initialised with
// zeros.
#ifndef JAX_DEEPEP_CUDA_DEVICE_CONTROL_H_
#define JAX_DEEPEP_CUDA_DEVICE_CONTROL_H_

#include <cstddef>
#include <cstdint>

#include "interface/geometry.h"
#include "interface/op_signature.h"

namespace jax_deepep {

inline constexpr int kMaxRanks = 72;    // of one EP group: the largest NVLink domain
inline constexpr int kNumChannels = 2;  // ops of a communicator that may run at once
inline constexpr int kMaxTopk = 32;     // entries of a token: a lane of a warp each
inline constexpr int kMaxBlocks = 256;  // of one op
inline constexpr int kMaxOperands = 4;  // arrays of a rank that peers read in one op
inline constexpr int kMostParts = 8;    // in which a rank writes sums that peers read

// Why an op failed.
enum class Failure : uint32_t {
  kNone = 0,
  kNotArrived,    // peers did not arrive in time
  kNotLeft,       // peers arrived, but did not finish reading in time
  kDifferentOps,  // a peer arrived at another op
  kWrongRank,     // the program runs this device as another rank
  kClosed,        // the communicator was closed while a program still used it
  kLeft,          // the program of the rank ended with an error
  kNotLaunched,   // the host could not launch the op; its program has the reason
  kTwoAtOnce,     // another op of the communicator was running on the rank
  kNoRoom,        // not all blocks of the op found an SM in time
};

// Ranks of an EP group, a bit each. Warps find 32 at a time.
struct RankSet {
  static constexpr int kWords = (kMaxRanks + 31) / 32;
  uint32_t words[kWords];

  JAX_DEEPEP_HOST_DEVICE bool Has(int rank) const {
    return (words[rank / 32] >> rank % 32 & 1) != 0;
  }
};

// The report of a rank that aborted an op.
struct FailureReport {
  Failure failure = Failure::kNone;
  int32_t other_rank = kNone;  // one that arrived at another op
  uint64_t step = 0;           // of the channel: counts its ops, from 1
  RankSet missing = {};
  OpSignature op;
  OpSignature other_op;           // of other_rank
  uint64_t seen[kMaxRanks] = {};  // the last step of each rank that was seen
};

// What a rank publishes about its part of an op. Words, each written by a lane.
struct Publication {
  uint64_t step;  // of the channel
  uint64_t op_hash;
  OpSignature op;
  int64_t offsets[kMaxOperands];  // of its arrays in its pool

  static constexpr int kWords = 2 + OpSignature::kWords + kMaxOperands;
};
static_assert(sizeof(Publication) == Publication::kWords * sizeof(uint64_t));
static_assert(Publication::kWords <= 32);

// What Channel::state has: how many ops the channel has completed; whether one has been started,
// and waits for the call that ends it; and which op is running, by its mark. In one word, so that
// an op that takes the rank learns its step without an order of memory.
//
// A mark has ten of twenty bits. The blocks of an op set them, and look what was there: if another
// op is running, more than ten are set from then on, and no later block of either takes the rank
// for its own, until the last block of one of them ends. The rank aborts in any case.
struct ChannelState {
  static constexpr int kMarkBits = 20;
  static constexpr uint64_t kMark = (uint64_t{1} << kMarkBits) - 1;
  static constexpr uint64_t kInFlight = kMark + 1;
  uint64_t word;

  JAX_DEEPEP_HOST_DEVICE static ChannelState Of(uint64_t step, bool in_flight) {
    return {step << (kMarkBits + 1) | (in_flight ? kInFlight : 0)};
  }
  JAX_DEEPEP_HOST_DEVICE uint64_t step() const { return word >> (kMarkBits + 1); }
  JAX_DEEPEP_HOST_DEVICE bool in_flight() const { return (word & kInFlight) != 0; }
  JAX_DEEPEP_HOST_DEVICE uint64_t mark() const { return word & kMark; }
};

// How many sets of k of n bits there are.
struct Binomials {
  static constexpr int kBits = ChannelState::kMarkBits, kOnes = kBits / 2;
  uint32_t ways[kBits + 1][kOnes + 1] = {};

  constexpr Binomials() {
    for (int n = 0; n <= kBits; ++n) {
      ways[n][0] = 1;
      for (int k = 1; k <= kOnes && n > 0; ++k) ways[n][k] = ways[n - 1][k - 1] + ways[n - 1][k];
    }
  }
};
inline constexpr Binomials kBinomials;

// The mark of a launch. There are 184,756: 20 over 10.
inline uint64_t MarkOf(uint64_t launch) {
  uint64_t mark = 0;
  int ones = Binomials::kOnes;
  uint64_t index = launch % kBinomials.ways[Binomials::kBits][ones];  // in ascending order
  for (int bit = Binomials::kBits - 1; ones > 0; --bit) {
    const uint32_t have_it_clear = kBinomials.ways[bit][ones];
    if (index < have_it_clear) continue;
    index -= have_it_clear;
    mark |= uint64_t{1} << bit;
    --ones;
  }
  return mark;
}

inline constexpr uint32_t kFailing = 1;
inline constexpr uint32_t kFailed = 2;

// Which op a rank has arrived at. Stored at once: a peer that has both words of one op knows that
// the rank is in it, where one word of it and one of the next would look like another op.
struct alignas(16) Announcement {
  uint64_t op_hash;
  uint64_t step;
};

// The state of the ops of a channel, of which one runs at a time on a rank. Ops of different
// channels may run at once: they share nothing but failures.
struct Channel {
  // Written by peers: entry s by rank s alone.
  Announcement announced[kMaxRanks];
  uint64_t arrived[kMaxRanks];  // the last op for which the operands of s are ready
  uint64_t left[kMaxRanks];     // the last op in which s has completed its reads
  Publication published[kMaxRanks];
  uint64_t part_ready[kMaxRanks][kMostParts];  // the last op for which s has written a part
  uint64_t rows_taken[kMaxRanks];  // rows of this rank that s has read in total; set before left

  // Written by this rank.
  uint64_t state;                    // see ChannelState
  uint32_t num_waiting;              // blocks that wait in a grid barrier
  uint32_t generation;               // grid barriers completed
  uint32_t num_ready;                // blocks whose writes peers may read
  uint32_t num_finished;             // blocks whose reads are done
  uint32_t num_items_taken;          // see SharedItems
  uint32_t num_invalid;              // entries of topk_idx that this op ignored
  uint32_t num_in_part[kMostParts];  // shares of each part that are written
  uint64_t ended;        // blocks, lost blocks and invalid entries: see SignalledOp::Finish
  uint32_t num_written;  // blocks whose results are written: likewise
  uint64_t rows_pushed[kMaxRanks];    // rows that this rank has pushed to each peer, in total
  uint64_t rows_received[kMaxRanks];  // that each has pushed; entry s also by s, if on another node
  uint64_t rows_pulled[kMaxRanks];    // that this rank has read from each
  uint64_t waited_ns[kMaxRanks];

  // Between nodes: see internode/node_op.cuh and low_latency_nodes/signalled_node_op.cuh.
  uint64_t staged[kMaxRanks];         // by s of this node: what other nodes put there can be read
  uint32_t num_staged[2][kMaxRanks];  // by node: rows to be put there; of even chunks and of odd
  uint32_t num_put;                   // blocks that have written what is put to other nodes
  // Of chunks of rows or sums: see MarkOf in internode/node_op.cuh.
  uint64_t chunk_put[kMaxRanks];     // by s of another node: the last that is here
  uint64_t chunk_staged[kMaxRanks];  // by s of this node: the last that is there
  uint64_t chunk_taken[kMaxRanks];   // by s of this node: the last that s has read here
  uint64_t credit[kMaxRanks];        // by s of another node: the last that has been read there
  // Blocks that have written a chunk, and read one; of even chunks and of odd ones.
  uint32_t num_chunk_put[2], num_chunk_read[2];
};

// Where the puts of this rank to other nodes go, if their memory is not mapped here.
struct RemoteRoute {
  char* memory;                  // the transport's address of this rank's own memory
  int32_t processes[kMaxRanks];  // of the peer on each node
  bool signals;                  // whether a put may carry its flag: see cuda/remote_put.cuh
};

struct DeviceControl {
  // Written by peers, which forward the reports of others.
  FailureReport reports[kMaxRanks];
  uint64_t tests[kMaxRanks];  // of peer access, when the communicator starts
  uint64_t broken;            // 1 + the rank whose report has the reason; set after the report

  // Written by this rank.
  uint32_t failed;      // kFailing while peers and host are notified, then kFailed
  uint64_t last_op_ns;  // from the first instruction of the op that ended last, to its end
  uint64_t last_op_blocks;
  RemoteRoute route;  // when the communicator starts

  Channel channels[kNumChannels];
};

// What a device reports to its host, in pinned memory that the host may read at any time.
struct HostStatus {
  FailureReport report;
  uint32_t reporter;      // the rank that wrote the report
  uint32_t failed;        // set after the report
  uint32_t num_invalid;   // of the first op with invalid entries
  uint64_t invalid_step;  // set after that
  uint32_t unreachable;   // 1 + a rank whose memory reads back differently
};

// Counts of a rank's entries: one per expert, then one per destination rank.
JAX_DEEPEP_HOST_DEVICE constexpr int NumCountColumns(int num_experts, int num_ranks) {
  return num_experts + num_ranks;
}

// Behind the block, for each channel: counts [R][columns], entry s written by rank s; then this
// rank's own [kMaxBlocks][columns].
JAX_DEEPEP_HOST_DEVICE constexpr size_t NumCounts(const GroupShape& shape) {
  const size_t columns = NumCountColumns(shape.num_experts, shape.num_ranks);
  return (shape.num_ranks + kMaxBlocks) * columns;
}

inline size_t ControlBytes(const GroupShape& shape) {
  return sizeof(DeviceControl) + kNumChannels * NumCounts(shape) * sizeof(int32_t);
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_DEVICE_CONTROL_H_
