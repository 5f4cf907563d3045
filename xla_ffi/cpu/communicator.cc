#include "cpu/communicator.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "cpu/threads.h"
#include "interface/error_text.h"

namespace jax_deepep {
namespace {

std::chrono::steady_clock::duration Seconds(double seconds) {
  return std::chrono::duration_cast<std::chrono::steady_clock::duration>(
      std::chrono::duration<double>(seconds));
}

}  // namespace

Communicator::Communicator(CommunicatorConfig config) : config_(std::move(config)) {
  for (const Place& place : config_.places) {
    places_[place.device] = place;
    if (place.process == config_.process && groups_.count(place.group) == 0) {
      groups_[place.group] = std::make_unique<LocalGroup>(config_, place.group);
    }
  }
  const size_t num_places = static_cast<size_t>(config_.num_groups) * shape().num_ranks;
  steps_.assign(num_places, 0);
  const SegmentLayout layout(config_, config_.process);
  if (layout.needed()) {
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
  watchdog_ = std::thread([this] { WatchDeadlines(); });
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
    group->worker = std::thread([this, group = group.get()] { ServeGroup(*group); });
  }
}

Communicator::~Communicator() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  watchdog_wake_.notify_all();
  watchdog_.join();
  for (auto& [index, group] : groups_) {
    if (!group->worker.joinable()) continue;
    group->exchange->Wake();
    group->worker.join();
  }
}

size_t Communicator::Index(int group, int rank) const {
  return static_cast<size_t>(group) * shape().num_ranks + rank;
}

const Place* Communicator::FindPlace(int64_t device) const {
  const auto found = places_.find(device);
  return found == places_.end() ? nullptr : &found->second;
}

void Communicator::Join(const void* instruction, int64_t call, int64_t run, const Place& place,
                        std::unique_ptr<Op> op) {
  LocalGroup& group = GroupOf(place.group);
  Key key{place.group, {run, call, op->signature().Hash()}, instruction};
  if (group.spans_processes()) key.instruction = nullptr;

  std::unique_lock<std::mutex> lock(mutex_);
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
    return;
  }
  Meeting& meeting = meetings_[key];
  const Clock::time_point now = Clock::now();
  if (meeting.num_arrived == 0) {
    meeting.ranks.resize(shape().num_ranks);
    meeting.arrivals.resize(shape().num_ranks);
    meeting.first_rank = place.rank;
    meeting.step = step;
    SetDeadline(group, &meeting);
    watchdog_wake_.notify_one();
  }
  meeting.ranks[place.rank] = std::move(op);
  meeting.arrivals[place.rank] = now;
  ++meeting.num_arrived;
  if (group.spans_processes()) {
    const bool announced = group.exchange->Announce(key.op, place.rank, step);
    lock.unlock();
    if (!announced) {
      Break(DescribeBroken("more than " + std::to_string(ControlBlock::kRingSize) +
                               " ops of the devices of one process wait for other processes",
                           config_, place.group, kWaitBetween));
    }
    return;
  }
  if (meeting.num_arrived < shape().num_ranks) return;
  Meeting complete = std::move(meeting);
  meetings_.erase(key);
  lock.unlock();
  RunOnOwnThread([comm = shared_from_this(), &group,
                  meeting = std::make_shared<Meeting>(std::move(complete))] {
    comm->Run(group, std::move(*meeting));
  });
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
  for (auto& op : ops) {
    if (op == nullptr) continue;
    RunOnOwnThread([comm = shared_from_this(), op = std::shared_ptr<Op>(std::move(op)), abandon] {
      if (abandon) op->Abandon(*comm);
      {
        std::lock_guard<std::mutex> lock(comm->mutex_);
        if (--comm->num_running_ == 0) comm->ops_ended_.notify_all();
      }
      const FlushSubnormals as_xla_does;  // its program goes on in this call
      op->done();
    });
  }
}

// Run the ops that span processes, in the order on which all of them agree.
void Communicator::ServeGroup(LocalGroup& group) {
  KeepSubnormals();
  while (!stopping_) {
    const std::optional<OpName> op = group.exchange->NextScheduled();
    if (std::string message = group.exchange->BrokenByPeer(); !message.empty()) {
      Break(std::move(message));
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
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (broken_.empty()) broken_ = std::move(message);
    message = broken_;
    abandoned = std::move(meetings_);
    meetings_.clear();
  }
  for (auto& [index, group] : groups_) {
    if (group->exchange != nullptr) group->exchange->Break(message);
  }
  for (auto& [key, meeting] : abandoned) Finish(std::move(meeting.ranks), /*abandon=*/true);
}

void Communicator::WatchDeadlines() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stopping_) {
    if (meetings_.empty()) {
      watchdog_wake_.wait(lock);
      continue;
    }
    auto late = std::min_element(meetings_.begin(), meetings_.end(), [](auto& a, auto& b) {
      return a.second.deadline < b.second.deadline;
    });
    if (const Clock::time_point deadline = late->second.deadline; Clock::now() < deadline) {
      watchdog_wake_.wait_until(lock, deadline);
      continue;
    }
    const LocalGroup& group = GroupOf(late->first.group);
    const std::string missing = DescribeMissing(late->first, late->second);
    if (missing.empty()) {
      // The op waits behind others of this process, which have deadlines themselves.
      SetDeadline(group, &late->second);
      continue;
    }
    lock.unlock();
    Break(Named(missing, group.group));
    lock.lock();
  }
}

int64_t Communicator::StepOf(const LocalGroup& group, int rank) const {
  return group.is_local(rank) ? steps_[Index(group.group, rank)] : group.exchange->StepOf(rank);
}

void Communicator::SetDeadline(const LocalGroup& group, Meeting* meeting) {
  meeting->deadline = Clock::now() + Seconds(config_.timeout_s);
  if (group.exchange != nullptr) meeting->num_taken = group.exchange->num_taken();
}

// Who keeps an op from running, or nothing if it is other ops of this process.
std::string Communicator::DescribeMissing(const Key& key, const Meeting& meeting) const {
  const LocalGroup& group = *groups_.at(key.group);
  if (group.exchange != nullptr && group.exchange->IsScheduled(key.op)) return "";
  std::vector<int> missing;
  for (int rank = 0; rank < shape().num_ranks; ++rank) {
    const bool came = group.is_local(rank) ? meeting.ranks[rank] != nullptr
                                           : group.exchange->HasAnnounced(key.op, rank);
    if (!came) missing.push_back(rank);
  }
  bool stopped = false;
  if (missing.empty()) {
    // All have come, so that only the leader can be at fault: it has to schedule the op.
    if (group.runs_op || group.exchange->num_taken() != meeting.num_taken) return "";
    stopped = true;
    for (int rank = 0; rank < shape().num_ranks; ++rank) {
      if (group.process_of[rank] == 0) missing.push_back(rank);
    }
  }
  std::vector<MissingRank> ranks;
  for (const int rank : missing) {
    ranks.push_back({rank, meeting.step, StepOf(group, rank), stopped});
  }
  return DescribeTimeout(meeting.ranks[meeting.first_rank]->name(), meeting.first_rank,
                         config_.timeout_s, "", ranks);
}

// Complete the description of a failure with where it was and what to do.
std::string Communicator::Named(const std::string& failure, int group) const {
  if (failure.find("(communicator #") != std::string::npos) return failure;  // a peer's, complete
  return DescribeBroken(failure, config_, group,
                        IsTimeout(failure) ? kFindMissing : kRunSameProgram);
}

void Communicator::WaitForOps() {
  std::unique_lock<std::mutex> lock(mutex_);
  ops_ended_.wait(lock, [this] { return num_running_ == 0; });
}

void Communicator::Close() {
  WaitForOps();
  std::lock_guard<std::mutex> lock(mutex_);
  closed_ = true;
}

bool Communicator::closed() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return closed_;
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
  const auto own = segments_.find(config_.process);
  return own == segments_.end() ? 0 : own->second->resident_bytes();
}

}  // namespace jax_deepep
