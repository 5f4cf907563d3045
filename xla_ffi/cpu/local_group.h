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
#include "cpu/node_links.h"
#include "interface/communicator_config.h"
#include "interface/geometry.h"
#include "transport/shared_memory.h"

namespace jax_deepep {

// Rows that each rank received from each rank: [R to, R from], written by the process of `to`.
using RowCounters = std::atomic<int64_t>;

// The processes of an EP group, and their nodes.
class GroupProcesses {
 public:
  GroupProcesses(const CommunicatorConfig& config, int group);

  int size() const { return static_cast<int>(processes_.size()); }
  int process(int index) const { return processes_[index]; }
  // The index of a process, or -1 if it has no rank.
  int IndexOf(int process) const;
  // The index of each rank's process.
  const std::vector<int>& process_of() const { return process_of_; }
  std::vector<int> RanksOf(int index) const;

  // Whether rows go to other nodes by puts: no process has ranks of several nodes. Otherwise all
  // processes share memory, and nodes only determine how sums are rounded.
  bool are_between_nodes() const { return are_between_nodes_; }
  int NodeOf(int index) const { return shape_.NodeOf(RanksOf(index).front()); }
  bool AreOfOneNode(int a, int b) const { return !are_between_nodes_ || NodeOf(a) == NodeOf(b); }
  // The process with the same ranks on another node.
  int PeerOf(int index, int node) const;

 private:
  std::vector<int> processes_;  // ascending; the first leads
  std::vector<int> process_of_;
  const GroupShape shape_;
  bool are_between_nodes_;
};

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

  // For the process with the same ranks on another node: the copy of its block, and the NodeWindows
  // of these ranks.
  ControlBlock* ControlOf(const SharedSegment& segment, int group, int node) const;
  char* WindowsOf(const SharedSegment& segment, int group, int node) const;

 private:
  GroupShape shape_;
  std::map<int, size_t> control_;                                  // by group
  std::map<std::pair<int, int>, size_t> windows_;                  // by group and rank
  std::map<std::pair<int, int>, size_t> control_of_, windows_of_;  // by group and node
  bool needed_ = false;
  size_t control_bytes_ = 1;
  size_t window_bytes_ = 0;
};

struct LocalGroup {
  LocalGroup(const CommunicatorConfig& config, int group);

  // Set up shared memory, once the segments of this node's processes are attached, and take over
  // the `connections` to those of other nodes, by process.
  void Connect(const CommunicatorConfig& config,
               const std::map<int, std::unique_ptr<SharedSegment>>& segments,
               std::map<int, std::unique_ptr<TcpMemory>> connections);

  // Release shared memory, but keep a copy of the counters. No op may run or begin. What is queued
  // for other nodes is sent, unless they accept nothing for so long.
  void Disconnect(double longest_stall_s);

  // Add rows that a rank of this process received.
  void CountRows(int from, int to, int64_t rows);

  // Add how long each rank of this process waited for each other, given their arrival times at an
  // op.
  void CountWaiting(const std::vector<GroupExchange::Clock::time_point>& arrivals);

  // Fill in this group's part of `traffic` with what was counted since the last call.
  void TakeTraffic(Traffic* traffic);

  bool spans_processes() const { return processes.size() > 1; }
  int process_of(int rank) const { return processes.process_of()[rank]; }
  bool is_local(int rank) const { return process_of(rank) == self; }
  int num_ranks() const { return static_cast<int>(processes.process_of().size()); }

  // Add rows that a rank of this process sent to one on another node.
  void CountPuts(int from, int to, int64_t rows);

  int group = 0;
  const GroupProcesses processes;
  const int self;  // index of this process among them

  std::unique_ptr<GroupExchange> exchange;  // if the group spans processes
  std::vector<RankWindow> windows;          // likewise, of every rank
  std::unique_ptr<NodeLinks> links;         // if rows go between nodes by puts
  std::vector<RowCounters*> rows_received;  // of each process; null on other nodes
  // The counters, if they are not shared (or no longer).
  std::vector<std::unique_ptr<RowCounters[]>> own_rows_received;
  std::thread worker;
  std::atomic<bool> runs_op{false};  // the worker is inside an op, whose waits have deadlines

 private:
  std::mutex traffic_mutex_;
  std::unique_ptr<RowCounters[]> rows_put_;  // [R from, R to]
  Traffic taken_;                            // counters [R, R] when they were last asked for
  std::vector<double> seconds_waited_;       // [R, R] since then
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CPU_LOCAL_GROUP_H_
