#include "cpu/local_group.h"

#include <algorithm>
#include <set>
#include <utility>

namespace jax_deepep {
namespace {

// Where memory of one kind begins, while a layout is made.
size_t Take(size_t* end, size_t bytes) {
  const size_t begin = Aligned(*end);
  *end = begin + bytes;
  return begin;
}

}  // namespace

GroupProcesses::GroupProcesses(const CommunicatorConfig& config, int group)
    : process_of_(config.shape.num_ranks, 0), shape_(config.shape) {
  std::set<int> ordered;
  for (const Location& location : config.locations) {
    if (location.group == group) ordered.insert(location.process);
  }
  processes_.assign(ordered.begin(), ordered.end());
  for (const Location& location : config.locations) {
    if (location.group == group) process_of_[location.rank] = IndexOf(location.process);
  }
  are_between_nodes_ = config.shape.num_nodes() > 1 && size() > 1;
  for (int index = 0; index < size(); ++index) {
    const std::vector<int> ranks = RanksOf(index);
    are_between_nodes_ =
        are_between_nodes_ && shape_.NodeOf(ranks.front()) == shape_.NodeOf(ranks.back());
  }
}

int GroupProcesses::IndexOf(int process) const {
  const auto found = std::find(processes_.begin(), processes_.end(), process);
  return found == processes_.end() ? -1 : static_cast<int>(found - processes_.begin());
}

std::vector<int> GroupProcesses::RanksOf(int index) const {
  std::vector<int> ranks;
  for (size_t rank = 0; rank < process_of_.size(); ++rank) {
    if (process_of_[rank] == index) ranks.push_back(static_cast<int>(rank));
  }
  return ranks;
}

int GroupProcesses::PeerOf(int index, int node) const {
  return process_of_[shape_.RankOnNode(RanksOf(index).front(), node)];
}

SegmentLayout::SegmentLayout(const CommunicatorConfig& config, int process) : shape_(config.shape) {
  const auto num_ranks = static_cast<size_t>(shape_.num_ranks);
  for (int group = 0; group < config.num_groups; ++group) {
    const GroupProcesses processes(config, group);
    if (processes.size() < 2) continue;
    needed_ = true;
    const int self = processes.IndexOf(process);
    if (self < 0) continue;
    control_[group] = Take(&control_bytes_, Aligned(sizeof(ControlBlock)) +
                                                num_ranks * num_ranks * sizeof(RowCounters));
    const std::vector<int> ranks = processes.RanksOf(self);
    for (const int rank : ranks) {
      windows_[{group, rank}] = Take(&window_bytes_, RankWindow::Bytes(shape_));
    }
    if (!processes.are_between_nodes()) continue;
    for (int node = 0; node < shape_.num_nodes(); ++node) {
      if (node == processes.NodeOf(self)) continue;
      control_of_[{group, node}] = Take(&control_bytes_, sizeof(ControlBlock));
      windows_of_[{group, node}] = Take(&window_bytes_, ranks.size() * NodeWindow::Bytes(shape_));
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

ControlBlock* SegmentLayout::ControlOf(const SharedSegment& segment, int group, int node) const {
  return reinterpret_cast<ControlBlock*>(segment.control() + control_of_.at({group, node}));
}

char* SegmentLayout::WindowsOf(const SharedSegment& segment, int group, int node) const {
  return segment.windows() + windows_of_.at({group, node});
}

LocalGroup::LocalGroup(const CommunicatorConfig& config, int group)
    : group(group), processes(config, group), self(processes.IndexOf(config.process)) {
  const size_t num_counters = static_cast<size_t>(config.shape.num_ranks) * config.shape.num_ranks;
  taken_.rows_sent.assign(num_counters, 0);
  taken_.rows_received.assign(num_counters, 0);
  seconds_waited_.assign(num_counters, 0.0);
  rows_put_.reset(new RowCounters[num_counters]());
  if (spans_processes()) return;
  own_rows_received.emplace_back(new RowCounters[num_counters]());
  rows_received.push_back(own_rows_received.back().get());
}

void LocalGroup::Connect(const CommunicatorConfig& config,
                         const std::map<int, std::unique_ptr<SharedSegment>>& segments,
                         std::map<int, std::unique_ptr<TcpMemory>> connections) {
  const GroupShape& shape = config.shape;
  std::vector<ControlBlock*> blocks;
  std::vector<bool> here;
  windows.resize(num_ranks());
  if (processes.are_between_nodes()) {
    links = std::make_unique<NodeLinks>(shape, processes.RanksOf(self));
  }
  for (int index = 0; index < processes.size(); ++index) {
    const std::vector<int> ranks = processes.RanksOf(index);
    here.push_back(processes.AreOfOneNode(index, self));
    if (here.back()) {
      const SharedSegment& segment = *segments.at(processes.process(index));
      const SegmentLayout layout(config, processes.process(index));
      blocks.push_back(layout.Control(segment, group));
      rows_received.push_back(layout.Counters(segment, group));
      for (const int rank : ranks) windows[rank] = layout.Window(segment, group, rank);
      continue;
    }
    // What the process on the other node has written to its peer on this one.
    const int node = processes.NodeOf(index);
    const int holder = processes.process(processes.PeerOf(index, processes.NodeOf(self)));
    const SharedSegment& segment = *segments.at(holder);
    const SegmentLayout layout(config, holder);
    blocks.push_back(layout.ControlOf(segment, group, node));
    rows_received.push_back(nullptr);
    char* memory = layout.WindowsOf(segment, group, node);
    for (size_t i = 0; i < ranks.size(); ++i) {
      const NodeWindow window = NodeWindow::At(memory + i * NodeWindow::Bytes(shape), shape);
      links->SetWindow(ranks[i], window);
      windows[ranks[i]] = window.tokens;
    }
  }
  std::vector<int> remote;  // processes with connections, as indices
  for (auto& [process, connection] : connections) {
    remote.push_back(processes.IndexOf(process));
    links->AddConnection(processes.NodeOf(remote.back()), std::move(connection));
  }
  exchange = std::make_unique<GroupExchange>(
      blocks, self, processes.process_of(), config.timeout_s, here,
      links == nullptr ? std::vector<TcpMemory*>() : links->connections());
  const SegmentLayout layout(config, config.process);
  const SharedSegment& own = *segments.at(config.process);
  const size_t window_bytes = processes.RanksOf(self).size() * NodeWindow::Bytes(shape);
  for (const int index : remote) {
    const int node = processes.NodeOf(index);
    links->Start(
        node,
        {{reinterpret_cast<char*>(blocks[index]), sizeof(ControlBlock)},
         {layout.WindowsOf(own, group, node), window_bytes}},
        [this] { exchange->RingAll(); },
        [this, index](const std::string& why) { exchange->NoteLost(index, why); });
  }
}

void LocalGroup::Disconnect(double longest_stall_s) {
  if (links != nullptr) links->Close(longest_stall_s);  // no thread writes here any more
  std::lock_guard<std::mutex> lock(traffic_mutex_);
  if (exchange == nullptr) return;
  const size_t num_counters = static_cast<size_t>(num_ranks()) * num_ranks();
  for (RowCounters*& counters : rows_received) {
    if (counters == nullptr) continue;
    own_rows_received.emplace_back(new RowCounters[num_counters]());
    for (size_t i = 0; i < num_counters; ++i) own_rows_received.back()[i] = counters[i].load();
    counters = own_rows_received.back().get();
  }
  windows.clear();
  exchange.reset();
  links.reset();
}

void LocalGroup::CountRows(int from, int to, int64_t rows) {
  rows_received[self][static_cast<size_t>(to) * num_ranks() + from].fetch_add(rows);
}

void LocalGroup::CountPuts(int from, int to, int64_t rows) {
  rows_put_[static_cast<size_t>(from) * num_ranks() + to].fetch_add(rows);
}

void LocalGroup::CountWaiting(const std::vector<GroupExchange::Clock::time_point>& arrivals) {
  std::lock_guard<std::mutex> lock(traffic_mutex_);
  const size_t num_ranks = this->num_ranks();
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
  const size_t num_ranks = this->num_ranks();
  for (size_t rank = 0; rank < num_ranks; ++rank) {
    if (!is_local(static_cast<int>(rank))) continue;
    for (size_t peer = 0; peer < num_ranks; ++peer) {
      const size_t at = rank * num_ranks + peer;
      const size_t to = group * num_ranks * num_ranks + at;
      // Rows are counted by the receiver, where its counters can be read.
      const int64_t received = rows_received[self][at];
      const RowCounters* of_peer = rows_received[process_of(static_cast<int>(peer))];
      const int64_t sent = of_peer != nullptr ? of_peer[peer * num_ranks + rank] : rows_put_[at];
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
