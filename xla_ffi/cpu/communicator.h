// The native side of a communicator on CPU devices: where ops of a group meet.
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
  const void* instruction;  // its name in this process
  OpName op;
  int64_t num_calls;    // of ours in the program
  bool on_main_thread;  // the program was compiled there
};

class Communicator : public std::enable_shared_from_this<Communicator> {
 public:
  // Where groups span processes, AttachPeer for each of the others and Start must follow. Throws
  // std::runtime_error if there is no memory to share.
  explicit Communicator(CommunicatorConfig config);
  ~Communicator();

  // Whether rows go to other processes, through memory that is shared with them.
  bool shares_memory() const { return shares_memory_; }

  // The descriptor of the memory that this process shares with its peers, or -1 if there is none.
  int segment_descriptor() const;

  // Take over the descriptor of a peer's memory; throws std::runtime_error if it does not fit.
  void AttachPeer(int process, int descriptor);

  // Begin to serve the groups that span processes.
  void Start();

  const CommunicatorConfig& config() const { return config_; }
  const GroupShape& shape() const { return config_.shape; }

  // Where a device stands, or null if it is not in the mesh.
  const Place* FindPlace(int64_t device) const;

  // Hand in one rank's part of an op. A loop comes back to the same call, but only after the device
  // is through with it. The last rank to come starts the work; each part's `done` is then called on
  // a thread of its own. Returns at once. On a broken communicator, and when a peer stays away for
  // timeout_s, parts are abandoned: nothing of theirs is touched after `done`. Returns false if the
  // communicator is closed.
  bool Join(const OpCall& call, const Place& place, std::unique_ptr<Op> op);

  // Wait until no op has begun and not ended. Bounded, because every op is.
  void WaitForOps();

  // Wait for ops, then refuse new ones, tell the peers, and free what is shared: compiled programs
  // may hold this object for long. Peers that still read keep their own mappings. May be repeated.
  void Close();

  // Give up ops that run: this process ends, because of `why`.
  void Leave(const std::string& why);

  // The error that broke the communicator, or nothing.
  std::string broken() const;

  // Whether that was a peer that did not come in time.
  bool timed_out() const;

  // The first op that met invalid routing entries, described, or nothing.
  std::string invalid_routing() const;
  void ReportInvalidRouting(int group, int rank, int64_t count);

  // Add rows that a rank of this process received.
  void CountRows(int group, int from, int to, int64_t rows);

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
    const void* instruction;  // tells calls apart where all ranks are of this process, else null

    bool operator<(const Key& other) const {
      return std::tie(group, op, instruction) < std::tie(other.group, other.op, other.instruction);
    }
  };

  // An op that some ranks of a group have come to.
  struct Meeting {
    std::vector<std::unique_ptr<Op>> ranks;
    std::vector<Clock::time_point> arrivals;
    int num_arrived = 0;
    int first_rank = 0;
    OpNotice first;  // what the first rank told
    Clock::time_point deadline;
    uint64_t num_taken = 0;  // scheduled ops that this process had taken up when that was set
  };

  void WatchDeadlines();
  void ServeGroup(LocalGroup& group);
  void Release();
  void EndPart();
  bool RunsBesideAnother(const Key& key) const;
  void Run(LocalGroup& group, Meeting meeting);
  void Finish(std::vector<std::unique_ptr<Op>> ops, bool abandon);
  void EndWithoutThreads(std::vector<std::unique_ptr<Op>> ops);
  void Break(std::string message);
  void SetDeadline(const LocalGroup& group, Meeting* meeting);
  std::string DescribeMissing(const Key& key, const Meeting& meeting) const;
  std::string DescribeClosed(const LocalGroup& group) const;
  std::optional<OpNotice> WaitsIn(const LocalGroup& group, int rank) const;
  std::string Named(const std::string& failure, int group) const;
  int64_t StepOf(const LocalGroup& group, int rank) const;
  LocalGroup& GroupOf(int group) { return *groups_.at(group); }
  size_t Index(int group, int rank) const;

  const CommunicatorConfig config_;
  bool shares_memory_ = false;
  int num_devices_here_ = 0;
  std::unordered_map<int64_t, Place> places_;
  std::map<int, std::unique_ptr<SharedSegment>> segments_;  // by process
  std::map<int, std::unique_ptr<LocalGroup>> groups_;

  mutable std::mutex mutex_;
  std::condition_variable ops_ended_;
  std::condition_variable watchdog_wake_;
  std::map<Key, Meeting> meetings_;
  std::vector<int64_t> steps_;  // per (group, rank): ops that ranks of this process have come to
  int64_t num_running_ = 0;     // parts joined and not yet done
  bool closed_ = false;
  std::atomic<bool> stopping_{false};
  std::string broken_;
  std::string invalid_routing_;
  std::thread watchdog_;
  std::mutex release_mutex_;  // held while the communicator is taken apart; taken before mutex_
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CPU_COMMUNICATOR_H_
