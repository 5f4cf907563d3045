#include "cpu/local_group.h"

#include <algorithm>
#include <set>

namespace jax_deepep {
namespace {

std::set<int> ProcessesOf(const CommunicatorConfig& config, int group) {
  std::set<int> processes;
  for (const Location& location : config.locations) {
    if (location.group == group) processes.insert(location.process);
  }
  return processes;
}

}  // namespace

SegmentLayout::SegmentLayout(const CommunicatorConfig& config, int process) : shape_(config.shape) {
  const auto num_ranks = static_cast<size_t>(shape_.num_ranks);
  for (int group = 0; group < config.num_groups; ++group) {
    const std::set<int> processes = ProcessesOf(config, group);
    if (processes.size() < 2) continue;
    needed_ = true;
    if (processes.count(process) == 0) continue;
    control_bytes_ = Aligned(control_bytes_);
    control_[group] = control_bytes_;
    control_bytes_ +=
        Aligned(sizeof(ControlBlock)) + Aligned(num_ranks * num_ranks * sizeof(RowCounters));
    for (const Location& location : config.locations) {
      if (location.group != group || location.process != process) continue;
      windows_[{group, location.rank}] = window_bytes_;
      window_bytes_ += RankWindow::Bytes(shape_);
    }
  }
}

ControlBlock* SegmentLayout::Control(const SharedSegment& segment, int group) const {
  return reinterpret_cast<ControlBlock*>(segment.control() + control_.at(group));
}

RowCounters* SegmentLayout::Counters(const SharedSegment& segment, int group) const {
  return reinterpret_cast<RowCounters*>(segment.control() + control_.at(group) +
                                        Aligned(sizeof(ControlBlock)));
}

RankWindow SegmentLayout::Window(const SharedSegment& segment, int group, int rank) const {
  return RankWindow::At(segment.windows() + windows_.at({group, rank}), shape_);
}

LocalGroup::LocalGroup(const CommunicatorConfig& config, int group)
    : group(group), process_of(config.shape.num_ranks, 0) {
  const std::set<int> ordered = ProcessesOf(config, group);
  processes.assign(ordered.begin(), ordered.end());
  const auto index_of = [this](int process) {
    return static_cast<int>(std::find(processes.begin(), processes.end(), process) -
                            processes.begin());
  };
  self = index_of(config.process);
  for (const Location& location : config.locations) {
    if (location.group != group) continue;
    process_of[location.rank] = index_of(location.process);
  }
  const size_t num_counters = static_cast<size_t>(config.shape.num_ranks) * config.shape.num_ranks;
  taken_.rows_sent.assign(num_counters, 0);
  taken_.rows_received.assign(num_counters, 0);
  seconds_waited_.assign(num_counters, 0.0);
  if (spans_processes()) return;
  own_rows_received.emplace_back(new RowCounters[num_counters]());
  rows_received.push_back(own_rows_received.back().get());
}

void LocalGroup::Connect(const CommunicatorConfig& config,
                         const std::map<int, std::unique_ptr<SharedSegment>>& segments) {
  std::vector<ControlBlock*> blocks;
  windows.resize(process_of.size());
  for (size_t index = 0; index < processes.size(); ++index) {
    const SharedSegment& segment = *segments.at(processes[index]);
    const SegmentLayout layout(config, processes[index]);
    blocks.push_back(layout.Control(segment, group));
    rows_received.push_back(layout.Counters(segment, group));
    for (size_t rank = 0; rank < process_of.size(); ++rank) {
      if (process_of[rank] != static_cast<int>(index)) continue;
      windows[rank] = layout.Window(segment, group, static_cast<int>(rank));
    }
  }
  exchange = std::make_unique<GroupExchange>(std::move(blocks), self, process_of, config.timeout_s);
}

void LocalGroup::Disconnect() {
  std::lock_guard<std::mutex> lock(traffic_mutex_);
  if (exchange == nullptr) return;
  const size_t num_counters = process_of.size() * process_of.size();
  for (RowCounters*& counters : rows_received) {
    own_rows_received.emplace_back(new RowCounters[num_counters]());
    for (size_t i = 0; i < num_counters; ++i) own_rows_received.back()[i] = counters[i].load();
    counters = own_rows_received.back().get();
  }
  windows.clear();
  exchange.reset();
}

void LocalGroup::CountRows(int from, int to, int64_t rows) {
  rows_received[self][static_cast<size_t>(to) * process_of.size() + from].fetch_add(rows);
}

void LocalGroup::CountWaiting(const std::vector<GroupExchange::Clock::time_point>& arrivals) {
  std::lock_guard<std::mutex> lock(traffic_mutex_);
  const size_t num_ranks = process_of.size();
  for (size_t rank = 0; rank < num_ranks; ++rank) {
    if (!is_local(static_cast<int>(rank))) continue;
    for (size_t peer = 0; peer < num_ranks; ++peer) {
      const std::chrono::duration<double> waited = arrivals[peer] - arrivals[rank];
      seconds_waited_[rank * num_ranks + peer] += std::max(0.0, waited.count());
    }
  }
}

void LocalGroup::TakeTraffic(Traffic* traffic) {
  std::lock_guard<std::mutex> lock(traffic_mutex_);
  const size_t num_ranks = process_of.size();
  for (size_t rank = 0; rank < num_ranks; ++rank) {
    if (!is_local(static_cast<int>(rank))) continue;
    for (size_t peer = 0; peer < num_ranks; ++peer) {
      const size_t at = rank * num_ranks + peer;
      const size_t to = group * num_ranks * num_ranks + at;
      // Rows are counted by the receiver.
      const int64_t received = rows_received[self][at];
      const int64_t sent = rows_received[process_of[peer]][peer * num_ranks + rank];
      traffic->rows_received[to] = received - taken_.rows_received[at];
      traffic->rows_sent[to] = sent - taken_.rows_sent[at];
      traffic->seconds_waited[to] = seconds_waited_[at];
      taken_.rows_received[at] = received;
      taken_.rows_sent[at] = sent;
      seconds_waited_[at] = 0.0;
    }
  }
}

}  // namespace jax_deepep
