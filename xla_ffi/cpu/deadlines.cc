// How long an op may wait, and which ranks it waits for.
#include <algorithm>
#include <utility>

#include "cpu/communicator.h"
#include "cpu/stop_detector.h"
#include "interface/error_text.h"

namespace jax_deepep {
namespace {

std::chrono::steady_clock::duration Seconds(double seconds) {
  return std::chrono::duration_cast<std::chrono::steady_clock::duration>(
      std::chrono::duration<double>(seconds));
}

}  // namespace

void Communicator::WatchDeadlines() {
  std::unique_lock<std::mutex> lock(mutex_);
  StopDetector stops(Clock::now());
  while (!stopping_) {
    const Clock::time_point now = Clock::now();
    const Clock::time_point earliest = stops.Look(now);
    const auto late =
        std::min_element(rendezvous_.begin(), rendezvous_.end(),
                         [](auto& a, auto& b) { return a.second.deadline < b.second.deadline; });
    const Clock::time_point deadline = late == rendezvous_.end()
                                           ? Clock::time_point::max()
                                           : std::max(late->second.deadline, earliest);
    if (now < deadline) {
      watchdog_wake_.wait_until(lock, std::min(deadline, now + StopDetector::kLongestSleep));
      continue;
    }
    const LocalGroup& group = GroupOf(late->first.group);
    const std::string missing = DescribeMissing(late->first, late->second);
    if (missing.empty()) {
      // The op waits behind others of this process, which have their own deadlines.
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

void Communicator::SetDeadline(const LocalGroup& group, Rendezvous* rendezvous) {
  // Between nodes, a rank that has not arrived may be inside the op before, and itself wait for the
  // missing one: it is the one to say so.
  const double longer = group.links != nullptr ? 1.25 : 1.0;
  rendezvous->deadline = Clock::now() + Seconds(longer * config_.timeout_s);
  if (group.exchange != nullptr) rendezvous->num_taken = group.exchange->num_taken();
}

// Describe the ranks that an op waits for; empty if it waits for other ops of this process.
std::string Communicator::DescribeMissing(const Key& key, const Rendezvous& rendezvous) const {
  const LocalGroup& group = *groups_.at(key.group);
  if (group.exchange != nullptr && group.exchange->IsScheduled(key.op)) return "";
  std::vector<int> missing;
  for (int rank = 0; rank < shape().num_ranks; ++rank) {
    const bool arrived = group.is_local(rank) ? rendezvous.ranks[rank] != nullptr
                                              : group.exchange->HasAnnounced(key.op, rank);
    if (!arrived) missing.push_back(rank);
  }
  bool stopped = false;
  if (missing.empty()) {
    // All have arrived, so that only the leader can be at fault: it has to schedule the op.
    if (group.runs_op || group.exchange->num_taken() != rendezvous.num_taken) return "";
    stopped = true;
    for (int rank = 0; rank < shape().num_ranks; ++rank) {
      if (group.process_of(rank) == 0) missing.push_back(rank);
    }
  }
  std::vector<MissingRank> ranks;
  for (const int rank : missing) {
    MissingRank late{rank, rendezvous.first.step, StepOf(group, rank), stopped};
    if (const auto other = stopped ? std::nullopt : WaitsIn(group, rank); other.has_value()) {
      late.instead = DescribeDifference(rendezvous.first, rendezvous.first_rank, *other, rank);
    }
    ranks.push_back(std::move(late));
  }
  return DescribeTimeout(rendezvous.ranks[rendezvous.first_rank]->name(), rendezvous.first_rank,
                         config_.timeout_s, "", ranks);
}

// The op that a rank waits in, if any is known.
std::optional<OpNotice> Communicator::WaitsIn(const LocalGroup& group, int rank) const {
  if (group.exchange != nullptr) return group.exchange->WaitsIn(rank);
  for (const auto& [key, rendezvous] : rendezvous_) {
    if (key.group != group.group || rendezvous.ranks[rank] == nullptr) continue;
    return OpNotice{rendezvous.ranks[rank]->signature(), steps_[Index(group.group, rank)],
                    rendezvous.first.num_calls};
  }
  return std::nullopt;
}

// Describe an op that waits for a rank whose process has ended; empty if there is none.
std::string Communicator::DescribeEndedRank(const LocalGroup& group) const {
  const std::optional<int> rank = group.exchange->EndedRank();
  if (!rank.has_value()) return "";
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [key, rendezvous] : rendezvous_) {
    if (key.group != group.group || group.exchange->IsScheduled(key.op)) continue;
    return DescribeEnded(rendezvous.ranks[rendezvous.first_rank]->name(), rendezvous.first_rank,
                         rendezvous.first.step, *rank, group.exchange->WhyEndedRank(*rank));
  }
  return "";
}

// Complete the description of a failure with its communicator and a remedy.
std::string Communicator::Named(const std::string& failure, int group) const {
  if (failure.find("(communicator #") != std::string::npos)
    return failure;  // a peer's, already complete
  const auto says = [&](const char* text) { return failure.find(text) != std::string::npos; };
  const char* advice = kRunSameProgram;
  if (IsTimeout(failure) && !says(kWaitsInOtherOp)) advice = kFindMissing;
  if (says(kHasClosed)) advice = kCloseLater;
  if (says(kConnectionLost)) advice = kFindFailed;
  return DescribeBroken(failure, config_, group, advice);
}

}  // namespace jax_deepep
