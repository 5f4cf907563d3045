// How the processes of one EP group agree on the order of ops, and synchronise inside an op.
//
// XLA:CPU runs independent ops in an order that differs between devices. So every rank announces
// its arrival at an op; the group's first process, the leader, schedules an op once all ranks
// have announced it; and every process runs the scheduled ops one after the other, with the same
// sequence of barriers. The state is counters and rings in shared memory, and a doorbell per
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

#include "cpu/windows.h"
#include "interface/op_signature.h"
#include "transport/shared_memory.h"
#include "transport/tcp_memory.h"

namespace jax_deepep {

// Identifies an op: a run of a program, which XLA derives from a hash of the program, so that runs
// of different programs differ; and the index of the call in the program.
struct OpName {
  int64_t run = 0;
  int64_t number = 0;

  std::tuple<int64_t, int64_t> AsTuple() const { return {run, number}; }
  bool operator<(const OpName& other) const { return AsTuple() < other.AsTuple(); }
  bool operator==(const OpName& other) const { return AsTuple() == other.AsTuple(); }
};

// What a rank announces about an op.
struct OpNotice {
  OpSignature signature;
  int64_t step = 0;       // of the rank
  int64_t num_calls = 0;  // our calls in its program
};

// Describe how the ops of two ranks differ.
std::string DescribeDifference(const OpNotice& mine, int my_rank, const OpNotice& theirs,
                               int their_rank);

// State that the processes of a group share, one per process and group. Other nodes have copies of
// it, which its process updates.
struct ControlBlock {
  static constexpr int kRingSize = 4096;         // ops of a process, times its ranks, not yet taken
  static constexpr int kMaxRanks = 1024;         // of one group
  static constexpr int kMessageBytes = 1 << 16;  // enough to name all ranks

  struct Announcement {
    OpName op;
    OpNotice notice;
    std::atomic<int64_t> rank;  // kTaken once its process has taken the op
  };
  static constexpr int64_t kTaken = -1;

  Doorbell doorbell;
  std::atomic<uint64_t> num_announced;  // entries ever written to `announced`
  Announcement announced[kRingSize];
  std::atomic<uint64_t> num_scheduled;  // the leader's: entries ever written to `scheduled`
  OpName scheduled[kRingSize];
  std::atomic<uint64_t> barriers;         // barriers at which this process has arrived
  std::atomic<int64_t> steps[kMaxRanks];  // ops at which each rank of this process has arrived
  std::atomic<int64_t> arrivals_ns[kMaxRanks];  // when each arrived at the running op
  std::atomic<int64_t> ages_ns[kMaxRanks];      // how long before the barrier that was
  std::atomic<uint64_t> out_of_order;           // see NoteOutOfOrder
  std::atomic<uint64_t> closed;                 // the process starts no more ops
  std::atomic<uint64_t> broken;                 // set after `message`
  std::atomic<uint64_t> lost;  // of a copy: it is not updated any more, because of `message`
  char message[kMessageBytes];
};

class GroupExchange {
 public:
  // `blocks` are those of the group's processes, the leader's first, and `self` is the index of
  // this one; `process_of` gives the index of each rank's process. All memory outlives the
  // exchange. Of a process on another node `blocks` has the copy on this one, which is not `here`;
  // `peers` have copies of the block of this one. By default all are on this node.
  GroupExchange(std::vector<ControlBlock*> blocks, int self, std::vector<int> process_of,
                double timeout_s, std::vector<bool> here = {}, std::vector<TcpMemory*> peers = {});

  using Clock = std::chrono::steady_clock;

  // Announce that a rank of this process has arrived at an op. One caller at a time. Returns false
  // if the ring is full, because too many ops are in flight.
  bool Announce(const OpName& op, int rank, const OpNotice& notice);

  // Note that programs of this process may run concurrently, so that the order in which it arrives
  // at ops of different programs proves nothing.
  void NoteOutOfOrder();

  // Note that this process has completed all its ops, and starts no more.
  void NoteClosed();

  // Note that the connection is lost through which the copy of a process's block is updated.
  void NoteLost(int process, const std::string& reason);

  // Why a process will never arrive at another op, as the end of "rank 1, ": it has closed, or
  // cannot be reached. Empty if it may.
  std::string WhyEnded(int process) const;

  // The first rank of a process that has ended, if any: ops that wait for it are never scheduled.
  std::optional<int> EndedRank() const;
  std::string WhyEndedRank(int rank) const { return WhyEnded(process_of_[rank]); }

  // On the leader: how the programs of ranks differ, or empty. Set by NextScheduled.
  const std::string& different_ops() const { return different_ops_; }

  // Wait briefly for the next scheduled op; the leader schedules meanwhile.
  std::optional<OpName> NextScheduled();

  // Wait until every process of the group has arrived at this barrier; returns false and sets
  // `error` if one did not in time or broke the communicator. `op_name` is for the error.
  bool Barrier(const char* op_name, int waiting_rank, std::string* error);

  // Notify all processes of the group that the communicator is broken.
  void Break(const std::string& message);

  // The error with which a process of the group broke the communicator, or empty.
  std::string BrokenByPeer() const;

  // Take a scheduled op: a loop may announce the same name again. Callers of this and of Announce
  // exclude each other.
  void Take(const OpName& op);

  // How many scheduled ops this process has taken.
  uint64_t num_taken() const { return num_taken_; }

  // Whether an op is scheduled that this process has not taken.
  bool IsScheduled(const OpName& op) const;

  // Whether a rank has announced an op that its process has not taken.
  bool HasAnnounced(const OpName& op, int rank) const;

  // The first op that a rank waits in, if any.
  std::optional<OpNotice> WaitsIn(int rank) const;

  // At how many ops a rank has arrived.
  int64_t StepOf(int rank) const;

  // When a rank arrived at the running op, on this host's monotonic clock; of one on
  // another node up to the time that a flag takes. Set before the first barrier of an op, read
  // after it.
  void SetArrival(int rank, Clock::time_point time);
  Clock::time_point Arrival(int rank) const;

  // Wake whatever waits in the processes of this node.
  void RingAll();

 private:
  struct Waiter {
    int rank;
    OpNotice notice;
  };

  void ScheduleReady();
  static std::string DescribeWaiters(const Waiter& one, const Waiter& other);
  std::string FindDifferentOps() const;

  // Set a word of the own block, also in its copies.
  template <typename T>
  void Set(std::atomic<T>* word, T value, std::memory_order order);
  // Update the copies of a part of the own block.
  void Copy(const void* part, size_t bytes);
  size_t OffsetInBlock(const void* part) const;

  // Call visit(announcement) for the announcements in a process's ring until it returns true;
  // returns whether it did.
  template <typename Visit>
  bool FindAnnouncement(int process, Visit visit) const;

  const std::vector<ControlBlock*> blocks_;
  const int self_;
  const std::vector<int> process_of_;
  const double timeout_s_;
  const std::vector<bool> here_;
  const std::vector<TcpMemory*> peers_;
  std::vector<Clock::time_point> arrived_;             // of each process, at the last barrier
  std::atomic<uint64_t> num_taken_{0};                 // of the leader's schedule
  std::multimap<OpName, uint64_t> own_announcements_;  // not taken; their indices
  uint64_t num_barriers_ = 0;                          // at which this process has arrived
  std::vector<uint64_t> num_read_;                     // leader: of each process's announcements
  std::map<OpName, std::vector<Waiter>> pending_;      // leader: of ops not yet scheduled
  std::string different_ops_;
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CPU_GROUP_EXCHANGE_H_
