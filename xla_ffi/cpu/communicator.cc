#include "cpu/communicator.h"

#include <algorithm>
#include <sstream>
#include <utility>

#include "cpu/threads.h"

namespace jax_deepep {
namespace {

// From ids in programs to communicators. Weak, so that a closed communicator goes away; an id is
// never used again, so that an old program cannot meet a new communicator.
struct Registry {
  std::mutex mutex;
  std::unordered_map<int64_t, std::weak_ptr<Communicator>> by_id;
};

Registry& TheRegistry() {
  static Registry* const registry = new Registry;  // outlives every thread
  return *registry;
}

}  // namespace

std::shared_ptr<Communicator> Communicator::Create(CommunicatorConfig config) {
  const int64_t id = config.id;
  std::shared_ptr<Communicator> comm(new Communicator(std::move(config)));
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  registry.by_id[id] = comm;
  return comm;
}

std::shared_ptr<Communicator> Communicator::Find(int64_t id, int64_t fingerprint,
                                                 std::string* why_not) {
  std::shared_ptr<Communicator> comm;
  {
    Registry& registry = TheRegistry();
    std::lock_guard<std::mutex> lock(registry.mutex);
    if (const auto found = registry.by_id.find(id); found != registry.by_id.end()) {
      comm = found->second.lock();
    }
  }
  const std::string name = "communicator #" + std::to_string(id);
  if (comm == nullptr) {
    *why_not = "this program uses " + name +
               ", which does not exist in this process (any more); make the same communicators in "
               "the same order as the process that traced the program did";
  } else if (comm->config().fingerprint != fingerprint) {
    *why_not = "this program uses " + name +
               ", which was made with other arguments here than where the program was traced; make "
               "the same communicators in the same order";
    comm = nullptr;
  }
  return comm;
}

Communicator::Communicator(CommunicatorConfig config) : config_(std::move(config)) {
  for (const Place& place : config_.places) places_[place.device] = place;
  const size_t num_ranks = shape().num_ranks;
  const size_t num_places = config_.num_groups * num_ranks;
  steps_.assign(num_places, 0);
  traffic_.rows_sent.assign(num_places * num_ranks, 0);
  traffic_.rows_received.assign(num_places * num_ranks, 0);
  traffic_.seconds_waited.assign(num_places * num_ranks, 0.0);
  watchdog_ = std::thread([this] { WatchDeadlines(); });
}

Communicator::~Communicator() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  watchdog_wake_.notify_all();
  watchdog_.join();
}

size_t Communicator::Index(int group, int rank) const {
  return static_cast<size_t>(group) * shape().num_ranks + rank;
}

size_t Communicator::Index(int group, int rank, int peer) const {
  return Index(group, rank) * shape().num_ranks + peer;
}

const Place* Communicator::FindPlace(int64_t device) const {
  const auto found = places_.find(device);
  return found == places_.end() ? nullptr : &found->second;
}

void Communicator::Join(const Key& key, const Place& place, std::unique_ptr<Op> op) {
  std::unique_lock<std::mutex> lock(mutex_);
  ++num_running_;
  const int64_t step = ++steps_[Index(place.group, place.rank)];
  if (!broken_.empty()) {
    lock.unlock();
    AbandonLater(std::move(op));
    return;
  }
  Meeting& meeting = meetings_[key];
  const Clock::time_point now = Clock::now();
  if (meeting.num_arrived == 0) {
    meeting.ranks.resize(shape().num_ranks);
    meeting.arrivals.resize(shape().num_ranks);
    meeting.steps.assign(shape().num_ranks, 0);
    meeting.first_rank = place.rank;
    meeting.deadline = now + std::chrono::duration_cast<Clock::duration>(
                                 std::chrono::duration<double>(config_.timeout_s));
    watchdog_wake_.notify_one();
  }
  meeting.ranks[place.rank] = std::move(op);
  meeting.arrivals[place.rank] = now;
  meeting.steps[place.rank] = step;
  if (++meeting.num_arrived < shape().num_ranks) return;

  Meeting complete = std::move(meeting);
  meetings_.erase(key);
  for (int rank = 0; rank < shape().num_ranks; ++rank) {
    for (int peer = 0; peer < shape().num_ranks; ++peer) {
      const std::chrono::duration<double> waited = complete.arrivals[peer] - complete.arrivals[rank];
      double& total = traffic_.seconds_waited[Index(place.group, rank, peer)];
      total += std::max(0.0, waited.count());
    }
  }
  lock.unlock();
  Start(key, std::move(complete));
}

void Communicator::Start(const Key& key, Meeting meeting) {
  auto ranks = std::make_shared<std::vector<std::unique_ptr<Op>>>(std::move(meeting.ranks));
  const int32_t group = std::get<int32_t>(key);
  RunOnOwnThread([comm = shared_from_this(), ranks, group] {
    ranks->front()->RunGroup(*comm, group, *ranks);
    // A completion continues XLA's program inline and may block there, in a collective that waits
    // for the other devices: each needs a thread of its own.
    for (size_t rank = 1; rank < ranks->size(); ++rank) {
      RunOnOwnThread([comm, op = std::shared_ptr<Op>(std::move((*ranks)[rank]))] {
        comm->EndOps(1);
        op->done();
      });
    }
    comm->EndOps(1);
    ranks->front()->done();
  });
}

void Communicator::AbandonLater(std::unique_ptr<Op> op) {
  RunOnOwnThread([comm = shared_from_this(), op = std::shared_ptr<Op>(std::move(op))] {
    op->Abandon(*comm);
    comm->EndOps(1);
    op->done();
  });
}

void Communicator::EndOps(int count) {
  std::lock_guard<std::mutex> lock(mutex_);
  num_running_ -= count;
  if (num_running_ == 0) ops_ended_.notify_all();
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
    // Under the lock, a meeting is either taken here or completed in Join, never both: from here on
    // no one can begin to read these buffers.
    broken_ = DescribeTimeout(late->first, late->second);
    std::map<Key, Meeting> abandoned = std::move(meetings_);
    meetings_.clear();
    lock.unlock();
    for (auto& [key, meeting] : abandoned) {
      for (auto& op : meeting.ranks) {
        if (op != nullptr) AbandonLater(std::move(op));
      }
    }
    lock.lock();
  }
}

std::string Communicator::DescribeTimeout(const Key& key, const Meeting& meeting) const {
  const int32_t group = std::get<int32_t>(key);
  const int waiting = meeting.first_rank;
  std::ostringstream text;
  text << meeting.ranks[waiting]->name() << " on rank " << waiting;
  if (config_.num_groups > 1) text << " of group " << group;
  text << " (communicator #" << config_.id << ") waited " << config_.timeout_s
       << " s (timeout_s) for ";
  std::ostringstream missing;
  int num_missing = 0;
  for (int rank = 0; rank < shape().num_ranks; ++rank) {
    if (meeting.ranks[rank] != nullptr) continue;
    missing << (num_missing++ ? ", " : "") << rank << " (expected at step " << meeting.steps[waiting]
            << ", seen at step " << steps_[Index(group, rank)] << ")";
  }
  text << (num_missing == 1 ? "rank " : "ranks ") << missing.str()
       << ". The communicator is broken: its ops return NaN and zero counts from now on. Find out "
          "why the missing device did not come, then make a new Communicator; raise timeout_s if it "
          "was only slow.";
  return text.str();
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

std::string Communicator::invalid_routing() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return invalid_routing_;
}

void Communicator::ReportInvalidRouting(int group, int rank, int64_t count) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!invalid_routing_.empty()) return;
  std::ostringstream text;
  text << "dispatch on rank " << rank;
  if (config_.num_groups > 1) text << " of group " << group;
  text << " (communicator #" << config_.id << ") ignored " << count
       << " entries of topk_idx, at step " << steps_[Index(group, rank)]
       << " or before: they were outside [-1, " << shape().num_experts
       << "), or named an expert for the second time in their row. Use -1 for \"no expert\"; "
          "handle.num_invalid has the count of each dispatch.";
  invalid_routing_ = text.str();
}

void Communicator::CountRows(int group, int from, int to, int64_t rows) {
  std::lock_guard<std::mutex> lock(mutex_);
  traffic_.rows_sent[Index(group, from, to)] += rows;
  traffic_.rows_received[Index(group, to, from)] += rows;
}

Traffic Communicator::TakeTraffic() {
  std::lock_guard<std::mutex> lock(mutex_);
  Traffic taken = traffic_;
  std::fill(traffic_.rows_sent.begin(), traffic_.rows_sent.end(), 0);
  std::fill(traffic_.rows_received.begin(), traffic_.rows_received.end(), 0);
  std::fill(traffic_.seconds_waited.begin(), traffic_.seconds_waited.end(), 0.0);
  return taken;
}

}  // namespace jax_deepep
