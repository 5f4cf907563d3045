// How the processes of one group agree on the order of ops, and meet inside an op.
//
// XLA:CPU runs independent ops in an order that differs between devices. So every rank announces
// the ops that it comes to; the group's first process, the leader, schedules an op once all ranks
// have announced it; and every process runs the scheduled ops one after the other, with the same
// sequence of barriers. All of it is counters and rings in shared memory, and a doorbell per
// process.
#ifndef JAX_DEEPEP_CPU_GROUP_EXCHANGE_H_
#define JAX_DEEPEP_CPU_GROUP_EXCHANGE_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "interface/geometry.h"
#include "interface/op_signature.h"
#include "transport/shared_memory.h"

namespace jax_deepep {

// Identifies an op: a run of a program, in which XLA hides a hash of the program, so that runs of
// different programs differ between processes; and the index of the call in the program.
struct OpName {
  int64_t run = 0;
  int64_t number = 0;

  std::tuple<int64_t, int64_t> AsTuple() const { return {run, number}; }
  bool operator<(const OpName& other) const { return AsTuple() < other.AsTuple(); }
  bool operator==(const OpName& other) const { return AsTuple() == other.AsTuple(); }
};

// What a rank tells of the op that it comes to.
struct OpNotice {
  OpSignature signature;
  int64_t step = 0;       // of the rank
  int64_t num_calls = 0;  // of ours in its program
};

// Where the op of one rank differs from what another came to, in words.
std::string DescribeDifference(const OpNotice& mine, int my_rank, const OpNotice& theirs,
                               int their_rank);

// Rounded up to whole cache lines: what processes share is laid out in these.
inline size_t Aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

// The memory of one rank that other processes read. All of it is written by the rank's own process.
struct RankWindow {
  char* x = nullptr;                 // [max_tokens] rows of up to max_row_bytes
  int32_t* entries = nullptr;        // [max_tokens, K] topk_idx, or destination
  float* entry_weights = nullptr;    // [max_tokens, K]
  char* sums = nullptr;              // [R, max_tokens, H] p_d of every rank's tokens
  float* entry_gradients = nullptr;  // [R, max_tokens, K]

  static size_t Bytes(const GroupShape& shape);
  static RankWindow At(char* memory, const GroupShape& shape);
};

// What the processes of a group write for each other, one per process and group.
struct ControlBlock {
  static constexpr int kRingSize = 4096;  // ops of a process, times its ranks, not yet taken up
  static constexpr int kMaxRanks = 1024;  // of one group
  static constexpr int kMessageBytes = 1 << 16;  // enough to name all ranks

  struct Announcement {
    OpName op;
    OpNotice notice;
    std::atomic<int32_t> rank;  // kTaken once its process has taken the op up
  };
  static constexpr int32_t kTaken = -1;

  Doorbell doorbell;
  std::atomic<uint64_t> num_announced;  // entries ever written to `announced`
  Announcement announced[kRingSize];
  std::atomic<uint64_t> num_scheduled;  // the leader's: entries ever written to `scheduled`
  OpName scheduled[kRingSize];
  std::atomic<uint64_t> barriers;               // barriers that this process has come to
  std::atomic<int64_t> steps[kMaxRanks];        // ops that each rank of this process has come to
  std::atomic<int64_t> arrivals_ns[kMaxRanks];  // when each came to the op that runs now
  std::atomic<uint32_t> out_of_order;           // see NoteOutOfOrder
  std::atomic<uint32_t> closed;                 // the process comes to no op any more
  std::atomic<uint32_t> broken;                 // set after `message`
  char message[kMessageBytes];
};

class GroupExchange {
 public:
  // `blocks` are those of the group's processes, the leader's first, and `self` is the index of
  // this one; `process_of` gives the index of each rank's process. All memory outlives the
  // exchange.
  GroupExchange(std::vector<ControlBlock*> blocks, int self, std::vector<int> process_of,
                double timeout_s);

  using Clock = std::chrono::steady_clock;

  // Announce that a rank of this process has come to an op. One caller at a time. Returns false if
  // there is no room, because too many ops are in flight.
  bool Announce(const OpName& op, int rank, const OpNotice& notice);

  // Tell that programs of this process may run beside each other, so that nothing follows from the
  // order in which it comes to ops of different programs.
  void NoteOutOfOrder();

  // Tell that this process has ended all ops that it came to, and comes to no other.
  void NoteClosed();

  // A rank of a process that has closed, if that keeps an op from being scheduled for good.
  std::optional<int> ClosedRank() const;

  // The leader: that ranks run different programs, in words, or nothing. Found by NextScheduled.
  const std::string& different_ops() const { return different_ops_; }

  // Wait for the next scheduled op, for at most a moment; the leader schedules meanwhile.
  std::optional<OpName> NextScheduled();

  // Wait until every process of the group has come here as often as this one; returns false and
  // fills `error` if one did not in time or broke the communicator. `op_name` is for the error.
  bool Meet(const char* op_name, int waiting_rank, std::string* error);

  // Tell all processes of the group that the communicator is broken.
  void Break(const std::string& message);

  // What a process of the group broke the communicator with, or nothing.
  std::string BrokenByPeer() const;

  // Note that this process takes up an op that was scheduled: a loop may announce the same name
  // again. Callers of this and of Announce exclude each other.
  void Take(const OpName& op);

  // How many scheduled ops this process has taken up.
  uint64_t num_taken() const { return num_taken_; }

  // Whether an op is scheduled that this process has not taken up.
  bool IsScheduled(const OpName& op) const;

  // Whether a rank has announced an op that its process has not taken up.
  bool HasAnnounced(const OpName& op, int rank) const;

  // The first op that a rank waits in, or nothing.
  std::optional<OpNotice> WaitsIn(int rank) const;

  // How many ops a rank has come to.
  int64_t StepOf(int rank) const;

  // When a rank came to the op that runs now, on the host's monotonic clock. Set before the first
  // barrier of an op, read after it.
  void SetArrival(int rank, Clock::time_point time);
  Clock::time_point Arrival(int rank) const;

  void Wake();

 private:
  struct Waiter {
    int rank;
    OpNotice notice;
  };

  void ScheduleReady();
  static std::string DescribeWaiters(const Waiter& one, const Waiter& other);
  std::string FindDifferentOps() const;
  void RingAll();

  // Call visit(announcement) for what a process has announced, of what its ring still holds, until
  // that returns true; returns whether it did.
  template <typename Visit>
  bool FindAnnouncement(int process, Visit visit) const;

  const std::vector<ControlBlock*> blocks_;
  const int self_;
  const std::vector<int> process_of_;
  const double timeout_s_;
  std::atomic<uint64_t> num_taken_{0};                 // of the leader's schedule
  std::multimap<OpName, uint64_t> own_announcements_;  // not taken up; their indices
  uint64_t num_barriers_ = 0;                          // that this process has come to
  std::vector<uint64_t> num_read_;                     // leader: of each process's announcements
  std::map<OpName, std::vector<Waiter>> pending_;      // leader: of ops not yet scheduled
  std::string different_ops_;
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CPU_GROUP_EXCHANGE_H_
