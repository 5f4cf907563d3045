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
  for (const Place& place : config_.places) {
    places_[place.device] = place;
    num_devices_here_ += place.process == config_.process;
    if (place.process == config_.process && groups_.count(place.group) == 0) {
      groups_[place.group] = std::make_unique<LocalGroup>(config_, place.group);
    }
  }
  const size_t num_places = static_cast<size_t>(config_.num_groups) * shape().num_ranks;
  steps_.assign(num_places, 0);
  const SegmentLayout layout(config_, config_.process);
  shares_memory_ = layout.needed();
  if (shares_memory_) {
    if (shape().num_ranks > ControlBlock::kMaxRanks) {
      throw std::runtime_error("a group has " + std::to_string(shape().num_ranks) +
                               " devices, and takes at most " +
                               std::to_string(ControlBlock::kMaxRanks) + " in several processes");
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

void Communicator::Start() {
  for (auto& [index, group] : groups_) {
    if (!group->spans_processes()) continue;
    group->Connect(config_, segments_);
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
    group->Disconnect();
  }
  std::map<int, std::unique_ptr<SharedSegment>> segments;
  std::lock_guard<std::mutex> lock(mutex_);
  segments.swap(segments_);
}

size_t Communicator::Index(int group, int rank) const {
  return static_cast<size_t>(group) * shape().num_ranks + rank;
}

const Place* Communicator::FindPlace(int64_t device) const {
  const auto found = places_.find(device);
  return found == places_.end() ? nullptr : &found->second;
}

bool Communicator::Join(const OpCall& call, const Place& place, std::unique_ptr<Op> op) {
  LocalGroup& group = GroupOf(place.group);
  const Key key{place.group, call.op, group.spans_processes() ? nullptr : call.instruction};

  std::unique_lock<std::mutex> lock(mutex_);
  if (closed_) return false;
  ++num_running_;
  const int64_t step = ++steps_[Index(place.group, place.rank)];
  const auto found = meetings_.find(key);
  // A rank that comes twice under one name would take the place of its own op, which must end too.
  const bool twice = found != meetings_.end() && found->second.ranks[place.rank] != nullptr;
  if (!broken_.empty() || twice) {
    lock.unlock();
    std::vector<std::unique_ptr<Op>> ops;
    ops.push_back(std::move(op));
    Finish(std::move(ops), /*abandon=*/true);
    if (twice) Break(Named("two calls of one program bear the same number", place.group));
    return true;
  }
  const OpNotice notice{op->signature(), step, call.num_calls};
  Meeting& meeting = meetings_[key];
  const Clock::time_point now = Clock::now();
  if (meeting.num_arrived == 0) {
    meeting.ranks.resize(shape().num_ranks);
    meeting.arrivals.resize(shape().num_ranks);
    meeting.first_rank = place.rank;
    meeting.first = notice;
    SetDeadline(group, &meeting);
    watchdog_wake_.notify_one();
  }
  meeting.ranks[place.rank] = std::move(op);
  meeting.arrivals[place.rank] = now;
  ++meeting.num_arrived;
  if (group.spans_processes()) {
    // XLA runs programs of several devices one after the other, and those of one device if they
    // are launched from one thread.
    const bool in_order = num_devices_here_ > 1 || call.on_main_thread;
    if (!in_order || RunsBesideAnother(key)) group.exchange->NoteOutOfOrder();
    const bool announced = group.exchange->Announce(key.op, place.rank, notice);
    lock.unlock();
    if (!announced) {
      Break(DescribeBroken("more than " + std::to_string(ControlBlock::kRingSize) +
                               " ops of the devices of one process wait for other processes",
                           config_, place.group, kWaitBetween));
    }
    return true;
  }
  if (meeting.num_arrived < shape().num_ranks) return true;
  const auto complete = std::make_shared<Meeting>(std::move(meeting));
  meetings_.erase(key);
  lock.unlock();
  if (!RunOnOwnThreads({[comm = shared_from_this(), &group, complete] {
        comm->Run(group, std::move(*complete));
      }})) {
    EndWithoutThreads(std::move(complete->ranks));
  }
  return true;
}

// Whether an op waits here that is of another run, and so of a program that has not ended.
bool Communicator::RunsBesideAnother(const Key& key) const {
  constexpr int64_t kFirst = std::numeric_limits<int64_t>::min();
  const auto begin = meetings_.lower_bound(Key{key.group, {kFirst, kFirst}, nullptr});
  const auto end = meetings_.lower_bound(Key{key.group + 1, {kFirst, kFirst}, nullptr});
  // In the order of their runs, and the one of `key` is among them.
  return begin->first.op.run != key.op.run || std::prev(end)->first.op.run != key.op.run;
}

// Do the work of an op that all ranks have come to. On a thread of ours, which may block.
void Communicator::Run(LocalGroup& group, Meeting meeting) {
  GroupRun run{*this, group.group, std::move(meeting.ranks), group.windows, nullptr};
  const Op& op = *run.ranks[meeting.first_rank];
  std::vector<Clock::time_point> arrivals = std::move(meeting.arrivals);
  std::string error;
  bool complete = true;
  if (group.spans_processes()) {
    run.meet = [&] { return group.exchange->Meet(op.name(), meeting.first_rank, &error); };
    for (int rank = 0; rank < shape().num_ranks; ++rank) {
      if (group.is_local(rank)) group.exchange->SetArrival(rank, arrivals[rank]);
    }
    // Only now has every process left the op before, so that windows may be written again.
    complete = run.meet();
    for (int rank = 0; complete && rank < shape().num_ranks; ++rank) {
      arrivals[rank] = group.exchange->Arrival(rank);
    }
  }
  if (complete) {
    group.CountWaiting(arrivals);
    complete = op.RunGroup(run);
  }
  if (!complete) Break(Named(error, group.group));
  Finish(std::move(run.ranks), /*abandon=*/!complete);
}

// End parts of ops, after giving up their results if `abandon`. A completion continues XLA's
// program inline and may block there, in a collective that waits for the other devices: each part
// needs a thread of its own.
void Communicator::Finish(std::vector<std::unique_ptr<Op>> ops, bool abandon) {
  ops.erase(std::remove(ops.begin(), ops.end(), nullptr), ops.end());
  const auto parts = std::make_shared<std::vector<std::unique_ptr<Op>>>(std::move(ops));
  std::vector<std::function<void()>> tasks;
  for (const std::unique_ptr<Op>& op : *parts) {
    tasks.push_back([comm = shared_from_this(), parts, op = op.get(), abandon] {
      if (abandon) op->Abandon(*comm);
      comm->EndPart();
      const FlushSubnormals as_xla_does;  // its program goes on in this call
      op->done();
    });
  }
  if (!RunOnOwnThreads(std::move(tasks))) EndWithoutThreads(std::move(*parts));
}

// End parts of ops with an error, which ends XLA's programs as well: unlike results, it continues
// nothing that could block this thread.
void Communicator::EndWithoutThreads(std::vector<std::unique_ptr<Op>> ops) {
  const std::string why = DescribeBroken("no thread could be made on which an op ends", config_,
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

// Run the ops that span processes, in the order on which all of them agree.
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
    if (const std::string closed = DescribeClosed(group); !closed.empty()) {
      Break(DescribeBroken(closed, config_, group.group, kCloseLater));
    }
    if (!op.has_value()) continue;
    std::unique_lock<std::mutex> lock(mutex_);
    group.exchange->Take(*op);
    const auto found = meetings_.find(Key{group.group, *op, nullptr});
    if (found == meetings_.end()) continue;      // abandoned meanwhile
    Meeting meeting = std::move(found->second);  // complete: every rank announces an op once
    meetings_.erase(found);
    lock.unlock();
    group.runs_op = true;
    Run(group, std::move(meeting));
    group.runs_op = false;
  }
}

// Give up: end all ops that wait, and every later one at once. Under the lock, a meeting is either
// taken here or by the one who runs it, never both: no one begins to read its buffers afterwards.
void Communicator::Break(std::string message) {
  // Who broke it first knows best who was missing: one that was stopped itself would blame others.
  for (const auto& [index, group] : groups_) {
    if (group->exchange == nullptr) continue;
    if (std::string first = group->exchange->BrokenByPeer(); !first.empty()) {
      message = std::move(first);
      break;
    }
  }
  std::map<Key, Meeting> abandoned;
  bool first = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    first = broken_.empty();
    if (first) broken_ = std::move(message);
    message = broken_;
    abandoned = std::move(meetings_);
    meetings_.clear();
  }
  if (first) TellOnStderr(message);
  for (auto& [index, group] : groups_) {
    if (group->exchange != nullptr) group->exchange->Break(message);
  }
  for (auto& [key, meeting] : abandoned) Finish(std::move(meeting.ranks), /*abandon=*/true);
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
