#include "cpu/communicator.h"

#include <algorithm>
#include <functional>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <utility>

#include "cpu/threads.h"
#include "interface/error_text.h"

namespace jax_deepep {

Communicator::Communicator(CommunicatorConfig config) : config_(std::move(config)) {
  for (const Location& location : config_.locations) {
    locations_[location.device] = location;
    num_devices_here_ += location.process == config_.process;
    if (location.process == config_.process && groups_.count(location.group) == 0) {
      groups_[location.group] = std::make_unique<LocalGroup>(config_, location.group);
    }
  }
  const size_t num_members = static_cast<size_t>(config_.num_groups) * shape().num_ranks;
  steps_.assign(num_members, 0);
  const SegmentLayout layout(config_, config_.process);
  shares_memory_ = layout.needed();
  if (shares_memory_) {
    if (shape().num_ranks > ControlBlock::kMaxRanks) {
      throw std::runtime_error("EP groups that span processes: expected at most " +
                               std::to_string(ControlBlock::kMaxRanks) + " devices each, got " +
                               std::to_string(shape().num_ranks));
    }
    auto segment = std::make_unique<SharedSegment>();
    const std::string error = segment->Create(layout.control_bytes(), layout.window_bytes());
    if (!error.empty()) throw std::runtime_error(error);
    segments_[config_.process] = std::move(segment);
  }
  watchdog_ = MakeThread([this] { WatchDeadlines(); });
}

int Communicator::segment_descriptor() const {
  const auto own = segments_.find(config_.process);
  return own == segments_.end() ? -1 : own->second->descriptor();
}

void Communicator::AttachPeer(int process, int descriptor) {
  const SegmentLayout layout(config_, process);
  auto segment = std::make_unique<SharedSegment>();
  const std::string error =
      segment->Attach(descriptor, layout.control_bytes(), layout.window_bytes());
  if (!error.empty()) {
    throw std::runtime_error("memory of process " + std::to_string(process) + ": " + error);
  }
  segments_[process] = std::move(segment);
}

void Communicator::AttachRemote(int group, int process, int descriptor) {
  connections_[group][process] = std::make_unique<TcpMemory>(descriptor);
}

void Communicator::Start() {
  for (auto& [index, group] : groups_) {
    if (!group->spans_processes()) continue;
    group->Connect(config_, segments_, std::move(connections_[index]));
    group->worker = MakeThread([this, group = group.get()] { ServeGroup(*group); });
  }
}

Communicator::~Communicator() { Release(); }

void Communicator::Release() {
  std::lock_guard<std::mutex> releasing(release_mutex_);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  watchdog_wake_.notify_all();
  if (watchdog_.joinable()) watchdog_.join();
  for (auto& [index, group] : groups_) {
    if (group->exchange != nullptr) group->exchange->NoteClosed();
    if (group->worker.joinable()) group->worker.join();  // the note has woken it
  }
  // Afterwards, because the worker of one group breaks the others too.
  const double longest_stall_s = broken().empty() ? config_.timeout_s : 1.0;
  for (auto& [index, group] : groups_) group->Disconnect(std::min(longest_stall_s, 60.0));
  std::map<int, std::unique_ptr<SharedSegment>> segments;
  std::lock_guard<std::mutex> lock(mutex_);
  segments.swap(segments_);
}

size_t Communicator::Index(int group, int rank) const {
  return static_cast<size_t>(group) * shape().num_ranks + rank;
}

const Location* Communicator::FindLocation(int64_t device) const {
  const auto found = locations_.find(device);
  return found == locations_.end() ? nullptr : &found->second;
}

bool Communicator::Join(const OpCall& call, const Location& location, std::unique_ptr<Op> op) {
  LocalGroup& group = GroupOf(location.group);
  const Key key{location.group, call.op, group.spans_processes() ? nullptr : call.instruction};

  std::unique_lock<std::mutex> lock(mutex_);
  if (closed_) return false;
  ++num_running_;
  const int64_t step = ++steps_[Index(location.group, location.rank)];
  const auto found = rendezvous_.find(key);
  // A rank that arrives twice under one name would replace its own op, which must end too.
  const bool twice = found != rendezvous_.end() && found->second.ranks[location.rank] != nullptr;
  if (!broken_.empty() || twice) {
    lock.unlock();
    std::vector<std::unique_ptr<Op>> ops;
    ops.push_back(std::move(op));
    Finish(std::move(ops), /*abort=*/true);
    if (twice) Break(Named("two calls of one program have the same index", location.group));
    return true;
  }
  const OpNotice notice{op->signature(), step, call.num_calls};
  Rendezvous& rendezvous = rendezvous_[key];
  const Clock::time_point now = Clock::now();
  if (rendezvous.num_arrived == 0) {
    rendezvous.ranks.resize(shape().num_ranks);
    rendezvous.arrivals.resize(shape().num_ranks);
    rendezvous.first_rank = location.rank;
    rendezvous.first = notice;
    SetDeadline(group, &rendezvous);
    watchdog_wake_.notify_one();
  }
  rendezvous.ranks[location.rank] = std::move(op);
  rendezvous.arrivals[location.rank] = now;
  ++rendezvous.num_arrived;
  if (group.spans_processes()) {
    // XLA runs programs of several devices in sequence, and those of one device too if they are
    // launched from one thread.
    const bool in_order = num_devices_here_ > 1 || call.on_main_thread;
    if (!in_order || RunsBesideAnother(key)) group.exchange->NoteOutOfOrder();
    const bool announced = group.exchange->Announce(key.op, location.rank, notice);
    lock.unlock();
    if (!announced) {
      Break(DescribeBroken("more than " + std::to_string(ControlBlock::kRingSize) +
                               " ops of the devices of one process wait for other processes",
                           config_, location.group, kWaitBetween));
    }
    return true;
  }
  if (rendezvous.num_arrived < shape().num_ranks) return true;
  const auto complete = std::make_shared<Rendezvous>(std::move(rendezvous));
  rendezvous_.erase(key);
  lock.unlock();
  if (!RunOnOwnThreads({[comm = shared_from_this(), &group, complete] {
        comm->Run(group, std::move(*complete));
      }})) {
    EndWithoutThreads(std::move(complete->ranks));
  }
  return true;
}

// Whether an op of another run waits here, so that two programs are running.
bool Communicator::RunsBesideAnother(const Key& key) const {
  constexpr int64_t kFirst = std::numeric_limits<int64_t>::min();
  const auto begin = rendezvous_.lower_bound(Key{key.group, {kFirst, kFirst}, nullptr});
  const auto end = rendezvous_.lower_bound(Key{key.group + 1, {kFirst, kFirst}, nullptr});
  // Ordered by run; the op of `key` is among them.
  return begin->first.op.run != key.op.run || std::prev(end)->first.op.run != key.op.run;
}

// Run an op at which all ranks have arrived. On our own thread, which may block.
void Communicator::Run(LocalGroup& group, Rendezvous rendezvous) {
  GroupRun run{*this,         group.group,       std::move(rendezvous.ranks),
               group.windows, group.links.get(), nullptr};
  const Op& op = *run.ranks[rendezvous.first_rank];
  std::vector<Clock::time_point> arrivals = std::move(rendezvous.arrivals);
  std::string error;
  bool complete = true;
  if (group.spans_processes()) {
    run.barrier = [&] { return group.exchange->Barrier(op.name(), rendezvous.first_rank, &error); };
    for (int rank = 0; rank < shape().num_ranks; ++rank) {
      if (group.is_local(rank)) group.exchange->SetArrival(rank, arrivals[rank]);
    }
    // After this, every process has left the previous op, and windows may be written again.
    complete = run.barrier();
    for (int rank = 0; complete && rank < shape().num_ranks; ++rank) {
      arrivals[rank] = group.exchange->Arrival(rank);
    }
  }
  if (complete) {
    group.CountWaiting(arrivals);
    complete = op.RunGroup(run);
  }
  if (!complete) Break(Named(error, group.group));
  Finish(std::move(run.ranks), /*abort=*/!complete);
}

// Complete parts of ops, after filling their results as failed if `abort`. A completion continues
// XLA's program inline and may block there, in a collective that waits for the other devices: each
// part needs a separate thread.
void Communicator::Finish(std::vector<std::unique_ptr<Op>> ops, bool abort) {
  ops.erase(std::remove(ops.begin(), ops.end(), nullptr), ops.end());
  const auto parts = std::make_shared<std::vector<std::unique_ptr<Op>>>(std::move(ops));
  std::vector<std::function<void()>> tasks;
  for (const std::unique_ptr<Op>& op : *parts) {
    tasks.push_back([comm = shared_from_this(), parts, op = op.get(), abort] {
      if (abort) op->Abort(*comm);
      comm->EndPart();
      const FlushSubnormals as_xla_does;  // its program continues in this call
      op->done();
    });
  }
  if (!RunOnOwnThreads(std::move(tasks))) EndWithoutThreads(std::move(*parts));
}

// Complete parts of ops with an error, which ends XLA's programs: unlike results, it continues
// nothing that could block this thread.
void Communicator::EndWithoutThreads(std::vector<std::unique_ptr<Op>> ops) {
  const std::string why = DescribeBroken("no thread could be started to complete an op", config_,
                                         groups_.begin()->first, kMoreThreads);
  Break(why);
  for (auto& op : ops) {
    if (op == nullptr) continue;
    EndPart();
    const FlushSubnormals as_xla_does;
    op->fail(why);
  }
}

void Communicator::EndPart() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (--num_running_ == 0) ops_ended_.notify_all();
}

// Run the ops that span processes, in the order of the schedule.
void Communicator::ServeGroup(LocalGroup& group) {
  KeepSubnormals();
  while (!stopping_) {
    const std::optional<OpName> op = group.exchange->NextScheduled();
    if (std::string message = group.exchange->BrokenByPeer(); !message.empty()) {
      Break(std::move(message));
    }
    if (const std::string& different = group.exchange->different_ops(); !different.empty()) {
      Break(Named(different, group.group));
    }
    if (const std::string ended = DescribeEndedRank(group); !ended.empty()) {
      Break(Named(ended, group.group));
    }
    if (!op.has_value()) continue;
    std::unique_lock<std::mutex> lock(mutex_);
    group.exchange->Take(*op);
    const auto found = rendezvous_.find(Key{group.group, *op, nullptr});
    if (found == rendezvous_.end()) continue;          // aborted meanwhile
    Rendezvous rendezvous = std::move(found->second);  // complete: every rank announces an op once
    rendezvous_.erase(found);
    lock.unlock();
    group.runs_op = true;
    Run(group, std::move(rendezvous));
    group.runs_op = false;
  }
}

// Abort all ops that wait, and every later one. Under the lock, a rendezvous is taken either here
// or by the thread that runs it, so that nothing reads its buffers afterwards.
void Communicator::Break(std::string message) {
  // The first process that broke it reports the missing rank; later ones might blame ranks that it
  // stopped.
  for (const auto& [index, group] : groups_) {
    if (group->exchange == nullptr) continue;
    if (std::string first = group->exchange->BrokenByPeer(); !first.empty()) {
      message = std::move(first);
      break;
    }
  }
  std::map<Key, Rendezvous> aborted;
  bool first = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    first = broken_.empty();
    if (first) broken_ = std::move(message);
    message = broken_;
    aborted = std::move(rendezvous_);
    rendezvous_.clear();
  }
  if (first) PrintToStderr(message);
  for (auto& [index, group] : groups_) {
    if (group->exchange != nullptr) group->exchange->Break(message);
  }
  for (auto& [key, rendezvous] : aborted) Finish(std::move(rendezvous.ranks), /*abort=*/true);
}

void Communicator::WaitForOps() {
  std::unique_lock<std::mutex> lock(mutex_);
  ops_ended_.wait(lock, [this] { return num_running_ == 0; });
}

void Communicator::Close() {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    ops_ended_.wait(lock, [this] { return num_running_ == 0; });
    closed_ = true;
  }
  Release();
}

void Communicator::Leave(const std::string& why) {
  std::lock_guard<std::mutex> releasing(release_mutex_);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_ || num_running_ == 0) return;
  }
  const LocalGroup& group = *groups_.begin()->second;
  int rank = 0;
  while (!group.is_local(rank)) ++rank;
  Break(DescribeBroken(
      "the program of rank " + std::to_string(rank) + " ended while its ops ran: " + why, config_,
      group.group, kFindFailed));
}

std::string Communicator::broken() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return broken_;
}

bool Communicator::timed_out() const { return IsTimeout(broken()); }

std::string Communicator::invalid_routing() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return invalid_routing_;
}

void Communicator::ReportInvalidRouting(int group, int rank, int64_t count) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!invalid_routing_.empty()) return;
  invalid_routing_ =
      DescribeInvalidRouting(config_, group, rank, count, steps_[Index(group, rank)]);
}

void Communicator::CountRows(int group, int from, int to, int64_t rows) {
  GroupOf(group).CountRows(from, to, rows);
}

void Communicator::CountPuts(int group, int from, int to, int64_t rows) {
  GroupOf(group).CountPuts(from, to, rows);
}

Traffic Communicator::TakeTraffic() {
  const size_t size =
      static_cast<size_t>(config_.num_groups) * shape().num_ranks * shape().num_ranks;
  Traffic traffic{std::vector<int64_t>(size), std::vector<int64_t>(size),
                  std::vector<double>(size)};
  for (auto& [index, group] : groups_) group->TakeTraffic(&traffic);
  return traffic;
}

size_t Communicator::buffer_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto own = segments_.find(config_.process);
  return own == segments_.end() ? 0 : own->second->resident_bytes();
}

int64_t Communicator::num_running_ops() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return num_running_;
}

}  // namespace jax_deepep
