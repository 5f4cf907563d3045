// The native side of a communicator on CPU devices: where the ranks of an EP group arrive at ops.
#ifndef JAX_DEEPEP_CPU_COMMUNICATOR_H_
#define JAX_DEEPEP_CPU_COMMUNICATOR_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "cpu/local_group.h"
#include "cpu/op.h"
#include "interface/geometry.h"

namespace jax_deepep {

// One call of a program, in one run of it.
struct OpCall {
  const void* instruction;  // identifies the call in this process
  OpName op;
  int64_t num_calls;    // our calls in the program
  bool on_main_thread;  // the program was compiled there
};

class Communicator : public std::enable_shared_from_this<Communicator> {
 public:
  // If groups span processes, call AttachPeer for each of the others, then Start. Throws
  // std::runtime_error if memory cannot be shared.
  explicit Communicator(CommunicatorConfig config);
  ~Communicator();

  // Whether rows go to other processes, through shared memory.
  bool shares_memory() const { return shares_memory_; }

  // The descriptor of the memory that this process shares with its peers, or -1 if there is none.
  int segment_descriptor() const;

  // Take over the descriptor of a peer's memory; throws std::runtime_error if it does not fit.
  void AttachPeer(int process, int descriptor);

  // Take over a connection to a process on another node, which has ranks of a group.
  void AttachRemote(int group, int process, int descriptor);

  // Start serving the groups that span processes.
  void Start();

  const CommunicatorConfig& config() const { return config_; }
  const GroupShape& shape() const { return config_.shape; }

  // Where a device is, or null if it is not in the mesh.
  const Location* FindLocation(int64_t device) const;

  // Submit one rank's part of an op, and return at once. A loop submits the same call again, but
  // only after the device has completed it. The last rank to arrive starts the work; each part's
  // `done` is then called on a separate thread. If the communicator is broken, or a peer does not
  // arrive within timeout_s, parts are aborted: nothing of theirs is touched after `done`. Returns
  // false if the communicator is closed.
  bool Join(const OpCall& call, const Location& location, std::unique_ptr<Op> op);

  // Wait until no op has begun and not ended. Bounded, because every op is.
  void WaitForOps();

  // Wait for ops, then reject new ones, notify the peers, and free shared memory: compiled programs
  // may keep this object alive. Peers that still read have their own mappings. Idempotent.
  void Close();

  // Abort running ops: this process ends, because of `why`.
  void Leave(const std::string& why);

  // The error that broke the communicator, or empty.
  std::string broken() const;

  // Whether that was a peer that did not arrive in time.
  bool timed_out() const;

  // A description of the first op with invalid routing entries, or empty.
  std::string invalid_routing() const;
  void ReportInvalidRouting(int group, int rank, int64_t count);

  // Add rows that a rank of this process received, or sent to one on another node.
  void CountRows(int group, int from, int to, int64_t rows);
  void CountPuts(int group, int from, int to, int64_t rows);

  // Return what was counted since the last call.
  Traffic TakeTraffic();

  // Bytes of shared memory that this process has filled, until it closes.
  size_t buffer_bytes() const;

  // Parts of ops of this process that have begun and not ended.
  int64_t num_running_ops() const;

 private:
  using Clock = std::chrono::steady_clock;

  struct Key {
    int32_t group;
    OpName op;
    const void* instruction;  // distinguishes calls if all ranks are in this process, else null

    bool operator<(const Key& other) const {
      return std::tie(group, op, instruction) < std::tie(other.group, other.op, other.instruction);
    }
  };

  // An op at which some ranks of a group have arrived.
  struct Rendezvous {
    std::vector<std::unique_ptr<Op>> ranks;
    std::vector<Clock::time_point> arrivals;
    int num_arrived = 0;
    int first_rank = 0;
    OpNotice first;  // of the first rank
    Clock::time_point deadline;
    uint64_t num_taken = 0;  // scheduled ops that this process had taken when the deadline was set
  };

  void WatchDeadlines();
  void ServeGroup(LocalGroup& group);
  void Release();
  void EndPart();
  bool RunsBesideAnother(const Key& key) const;
  void Run(LocalGroup& group, Rendezvous rendezvous);
  void Finish(std::vector<std::unique_ptr<Op>> ops, bool abort);
  void EndWithoutThreads(std::vector<std::unique_ptr<Op>> ops);
  void Break(std::string message);
  void SetDeadline(const LocalGroup& group, Rendezvous* rendezvous);
  std::string DescribeMissing(const Key& key, const Rendezvous& rendezvous) const;
  std::string DescribeEndedRank(const LocalGroup& group) const;
  std::optional<OpNotice> WaitsIn(const LocalGroup& group, int rank) const;
  std::string Named(const std::string& failure, int group) const;
  int64_t StepOf(const LocalGroup& group, int rank) const;
  LocalGroup& GroupOf(int group) { return *groups_.at(group); }
  size_t Index(int group, int rank) const;

  const CommunicatorConfig config_;
  bool shares_memory_ = false;
  int num_devices_here_ = 0;
  std::unordered_map<int64_t, Location> locations_;
  std::map<int, std::unique_ptr<SharedSegment>> segments_;  // by process
  // Until Start: by group and process.
  std::map<int, std::map<int, std::unique_ptr<TcpMemory>>> connections_;
  std::map<int, std::unique_ptr<LocalGroup>> groups_;

  mutable std::mutex mutex_;
  std::condition_variable ops_ended_;
  std::condition_variable watchdog_wake_;
  std::map<Key, Rendezvous> rendezvous_;
  std::vector<int64_t>
      steps_;                // per (group, rank): ops at which ranks of this process have arrived
  int64_t num_running_ = 0;  // parts joined and not yet done
  bool closed_ = false;
  std::atomic<bool> stopping_{false};
  std::string broken_;
  std::string invalid_routing_;
  std::thread watchdog_;
  std::mutex release_mutex_;  // held while the communicator is torn down; acquired before mutex_
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CPU_COMMUNICATOR_H_
