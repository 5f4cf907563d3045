// The native side of a communicator on CPU devices: where ops of a group meet.
#ifndef JAX_DEEPEP_CPU_COMMUNICATOR_H_
#define JAX_DEEPEP_CPU_COMMUNICATOR_H_

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "cpu/op.h"
#include "interface/geometry.h"

namespace jax_deepep {

// A device of the mesh.
struct Place {
  int64_t device = 0;  // JAX's id, which XLA's CPU client gives as the device ordinal
  int32_t group = 0;
  int32_t rank = 0;
};

struct CommunicatorConfig {
  int64_t id = 0;
  int64_t fingerprint = 0;
  GroupShape shape;
  int32_t num_groups = 0;
  double timeout_s = 0;
  std::vector<Place> places;
};

// Counters per (group, rank, peer), flattened in this order.
struct Traffic {
  std::vector<int64_t> rows_sent;
  std::vector<int64_t> rows_received;
  std::vector<double> seconds_waited;
};

class Communicator : public std::enable_shared_from_this<Communicator> {
 public:
  // Create and register; an id is used once in the life of a process.
  static std::shared_ptr<Communicator> Create(CommunicatorConfig config);

  // The communicator that a program names, or null with the reason in `why_not`.
  static std::shared_ptr<Communicator> Find(int64_t id, int64_t fingerprint, std::string* why_not);

  ~Communicator();

  const CommunicatorConfig& config() const { return config_; }
  const GroupShape& shape() const { return config_.shape; }

  // Where a device stands, or null if it is not in the mesh.
  const Place* FindPlace(int64_t device) const;

  // Identifies one op of one group: an instruction of one loaded program, in one run of it. A loop
  // comes back to the same key, but only after the device is through with it.
  using Key = std::tuple<const void* /*instruction*/, int64_t /*run*/, int32_t /*group*/>;

  // Hand in one rank's part. The last rank to come starts the work; each part's `done` is then
  // called on a thread of its own. Returns at once. On a broken communicator, and when a peer stays
  // away for timeout_s, parts are abandoned: nothing of theirs is touched after `done`.
  void Join(const Key& key, const Place& place, std::unique_ptr<Op> op);

  // Wait until no op has begun and not ended. Bounded, because every op is.
  void WaitForOps();

  // Wait for ops, then refuse new ones. May be repeated.
  void Close();
  bool closed() const;

  // The error that broke the communicator, or nothing.
  std::string broken() const;

  // The first op that met invalid routing entries, described, or nothing.
  std::string invalid_routing() const;
  void ReportInvalidRouting(int group, int rank, int64_t count);

  // Add rows that went from one rank to another.
  void CountRows(int group, int from, int to, int64_t rows);

  // Return the counters and start again from zero.
  Traffic TakeTraffic();

 private:
  using Clock = std::chrono::steady_clock;

  // An op that some ranks of a group have come to.
  struct Meeting {
    std::vector<std::unique_ptr<Op>> ranks;
    std::vector<Clock::time_point> arrivals;
    std::vector<int64_t> steps;  // of each rank that came: its how-manieth op this is
    int num_arrived = 0;
    int first_rank = 0;
    Clock::time_point deadline;
  };

  explicit Communicator(CommunicatorConfig config);

  void WatchDeadlines();
  void Start(const Key& key, Meeting meeting);
  void AbandonLater(std::unique_ptr<Op> op);
  void EndOps(int count);
  std::string DescribeTimeout(const Key& key, const Meeting& meeting) const;
  size_t Index(int group, int rank) const;
  size_t Index(int group, int rank, int peer) const;

  const CommunicatorConfig config_;
  std::unordered_map<int64_t, Place> places_;

  mutable std::mutex mutex_;
  std::condition_variable ops_ended_;
  std::condition_variable watchdog_wake_;
  std::map<Key, Meeting> meetings_;
  std::vector<int64_t> steps_;  // per (group, rank): ops joined
  int64_t num_running_ = 0;     // parts joined and not yet done
  bool closed_ = false;
  bool stopping_ = false;
  std::string broken_;
  std::string invalid_routing_;
  Traffic traffic_;
  std::thread watchdog_;
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CPU_COMMUNICATOR_H_
