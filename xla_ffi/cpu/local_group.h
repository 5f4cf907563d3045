// An EP group with ranks in this process: its ranks, and the memory shared with other processes.
#ifndef JAX_DEEPEP_CPU_LOCAL_GROUP_H_
#define JAX_DEEPEP_CPU_LOCAL_GROUP_H_

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cpu/group_exchange.h"
#include "interface/communicator_config.h"
#include "interface/geometry.h"
#include "transport/shared_memory.h"

namespace jax_deepep {

// Rows that each rank received from each rank: [R to, R from], written by the process of `to`.
using RowCounters = std::atomic<int64_t>;

// The layout of a process's segment. Every process computes the same.
class SegmentLayout {
 public:
  SegmentLayout(const CommunicatorConfig& config, int process);

  size_t control_bytes() const { return control_bytes_; }
  size_t window_bytes() const { return window_bytes_; }
  // Whether any group of the communicator spans processes, in which case all processes share
  // memory.
  bool needed() const { return needed_; }

  ControlBlock* Control(const SharedSegment& segment, int group) const;
  RowCounters* Counters(const SharedSegment& segment, int group) const;
  RankWindow Window(const SharedSegment& segment, int group, int rank) const;

 private:
  GroupShape shape_;
  std::map<int, size_t> control_;                  // by group
  std::map<std::pair<int, int>, size_t> windows_;  // by group and rank
  bool needed_ = false;
  size_t control_bytes_ = 1;
  size_t window_bytes_ = 0;
};

struct LocalGroup {
  LocalGroup(const CommunicatorConfig& config, int group);

  // Set up shared memory, once all segments are attached.
  void Connect(const CommunicatorConfig& config,
               const std::map<int, std::unique_ptr<SharedSegment>>& segments);

  // Release shared memory, but keep a copy of the counters. No op may run or begin.
  void Disconnect();

  // Add rows that a rank of this process received.
  void CountRows(int from, int to, int64_t rows);

  // Add how long each rank of this process waited for each other, given their arrival times at an
  // op.
  void CountWaiting(const std::vector<GroupExchange::Clock::time_point>& arrivals);

  // Fill in this group's part of `traffic` with what was counted since the last call.
  void TakeTraffic(Traffic* traffic);

  bool spans_processes() const { return processes.size() > 1; }
  bool is_local(int rank) const { return process_of[rank] == self; }

  int group = 0;
  int self = 0;                 // index of this process among `processes`
  std::vector<int> processes;   // ascending; the first leads
  std::vector<int> process_of;  // of each rank, an index into `processes`

  std::unique_ptr<GroupExchange> exchange;  // if the group spans processes
  std::vector<RankWindow> windows;          // likewise, of every rank
  std::vector<RowCounters*> rows_received;  // of each of `processes`
  // The counters, if they are not shared (or no longer).
  std::vector<std::unique_ptr<RowCounters[]>> own_rows_received;
  std::thread worker;
  std::atomic<bool> runs_op{false};  // the worker is inside an op, whose waits have deadlines

 private:
  std::mutex traffic_mutex_;
  Traffic taken_;                       // counters [R, R] when they were last asked for
  std::vector<double> seconds_waited_;  // [R, R] since then
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CPU_LOCAL_GROUP_H_
