#include "cpu/group_exchange.h"

#include <algorithm>
#include <cstring>

#include "cpu/stop_detector.h"
#include "interface/error_text.h"

namespace jax_deepep {
namespace {

// Also the cost of a lost wake-up, which is not expected.
constexpr std::chrono::milliseconds kLongestSleep = StopDetector::kLongestSleep;

// Returns the length, without the zero at the end.
size_t SetMessage(ControlBlock* block, const std::string& message) {
  const size_t length = std::min<size_t>(message.size(), ControlBlock::kMessageBytes - 1);
  std::memcpy(block->message, message.data(), length);
  block->message[length] = '\0';
  return length;
}

}  // namespace

std::string DescribeDifference(const OpNotice& mine, int my_rank, const OpNotice& theirs,
                               int their_rank) {
  std::string text = DescribeDifference(mine.signature, my_rank, theirs.signature, their_rank);
  if (mine.num_calls != theirs.num_calls) {
    if (!text.empty()) text += "; ";
    text += "the number of ops in the program is " + std::to_string(mine.num_calls) + " on rank " +
            std::to_string(my_rank) + " and " + std::to_string(theirs.num_calls) + " on rank " +
            std::to_string(their_rank);
  }
  if (text.empty()) text = "the ops are equal, but the programs around them differ";
  return text;
}

GroupExchange::GroupExchange(std::vector<ControlBlock*> blocks, int self,
                             std::vector<int> process_of, double timeout_s, std::vector<bool> here,
                             std::vector<TcpMemory*> peers)
    : blocks_(std::move(blocks)),
      self_(self),
      process_of_(std::move(process_of)),
      timeout_s_(timeout_s),
      here_(here.empty() ? std::vector<bool>(blocks_.size(), true) : std::move(here)),
      peers_(std::move(peers)),
      arrived_(blocks_.size()),
      num_read_(blocks_.size(), 0) {}

void GroupExchange::RingAll() {
  for (size_t process = 0; process < blocks_.size(); ++process) {
    if (here_[process]) Ring(&blocks_[process]->doorbell);
  }
}

size_t GroupExchange::OffsetInBlock(const void* part) const {
  return static_cast<const char*>(part) - reinterpret_cast<const char*>(blocks_[self_]);
}

template <typename T>
void GroupExchange::Set(std::atomic<T>* word, T value, std::memory_order order) {
  static_assert(sizeof(std::atomic<T>) == sizeof(uint64_t), "a flag is a 64-bit word");
  word->store(value, order);
  for (TcpMemory* peer : peers_) {
    peer->PutFlag(kControlRegion, OffsetInBlock(word), static_cast<uint64_t>(value));
  }
}

void GroupExchange::Copy(const void* part, size_t bytes) {
  for (TcpMemory* peer : peers_) peer->PutCopy(kControlRegion, OffsetInBlock(part), part, bytes);
}

bool GroupExchange::Announce(const OpName& op, int rank, const OpNotice& notice) {
  ControlBlock& own = *blocks_[self_];
  Set(&own.steps[rank], notice.step, std::memory_order_relaxed);
  const uint64_t index = own.num_announced.load(std::memory_order_relaxed);
  // Each rank has announced every op that this process took. With at most a ring of others, neither
  // ring overflows: the leader has read the announcements of ops that were taken, and an op is
  // scheduled only once every process has announced it.
  const auto ranks_here = std::count(process_of_.begin(), process_of_.end(), self_);
  if (index - num_taken_ * ranks_here >= ControlBlock::kRingSize) return false;
  ControlBlock::Announcement& entry = own.announced[index % ControlBlock::kRingSize];
  entry.op = op;
  entry.notice = notice;
  entry.rank.store(rank, std::memory_order_relaxed);
  Copy(&entry, sizeof(entry));
  own_announcements_.emplace(op, index);
  // Pairs with the acquire load in ScheduleReady: the entry is visible before its index.
  Set(&own.num_announced, index + 1, std::memory_order_release);
  if (here_[0]) Ring(&blocks_[0]->doorbell);
  return true;
}

void GroupExchange::ScheduleReady() {
  ControlBlock& own = *blocks_[0];
  bool rang = false;
  for (size_t process = 0; process < blocks_.size(); ++process) {
    const ControlBlock& peer = *blocks_[process];
    // Pairs with the release store in Announce.
    const uint64_t end = peer.num_announced.load(std::memory_order_acquire);
    for (; num_read_[process] < end; ++num_read_[process]) {
      const auto& entry = peer.announced[num_read_[process] % ControlBlock::kRingSize];
      const OpName op = entry.op;
      // A process takes only scheduled ops, so the rank is not kTaken yet.
      const int64_t rank = entry.rank.load(std::memory_order_relaxed);
      if (rank < 0 || rank >= static_cast<int64_t>(process_of_.size())) continue;  // a peer's fault
      const Waiter arrival{static_cast<int>(rank), entry.notice};
      std::vector<Waiter>& arrivals = pending_[op];
      arrivals.push_back(arrival);
      const Waiter& first = arrivals.front();
      if (!(first.notice.signature == arrival.notice.signature) && different_ops_.empty()) {
        different_ops_ = DescribeWaiters(first, arrival);
      }
      if (arrivals.size() < process_of_.size() || !different_ops_.empty()) continue;
      pending_.erase(op);
      const uint64_t index = own.num_scheduled.load(std::memory_order_relaxed);
      OpName& scheduled = own.scheduled[index % ControlBlock::kRingSize];
      scheduled = op;
      Copy(&scheduled, sizeof(scheduled));
      // Pairs with the acquire load in NextScheduled.
      Set(&own.num_scheduled, index + 1, std::memory_order_release);
      rang = true;
    }
  }
  if (rang) RingAll();
  if (different_ops_.empty()) different_ops_ = FindDifferentOps();
}

std::string GroupExchange::DescribeWaiters(const Waiter& one, const Waiter& other) {
  const auto& [mine, theirs] =
      std::minmax(one, other, [](const Waiter& a, const Waiter& b) { return a.rank < b.rank; });
  return DescribeDifferentOps(
      mine.notice.signature, mine.rank, mine.notice.step, theirs.rank,
      DescribeDifference(mine.notice, mine.rank, theirs.notice, theirs.rank));
}

// Two processes that each wait in a run of a program that the other has not reached. If a process
// ends a run before it begins the next one, and all of them begin runs in one order, that is a
// deadlock: each would have to end its run first. See xla_ffi/README.md.
std::string GroupExchange::FindDifferentOps() const {
  if (pending_.empty() || pending_.begin()->first.run == pending_.rbegin()->first.run) return "";
  for (const ControlBlock* block : blocks_) {
    // Read after the announcements; set before the first one that it applies to.
    if (block->out_of_order.load(std::memory_order_relaxed) != 0) return "";
  }
  struct Waiting {
    OpName op;
    const Waiter* arrival = nullptr;
    bool one_run = true;
  };
  std::vector<Waiting> waiting(blocks_.size());
  for (const auto& [op, arrivals] : pending_) {
    for (const Waiter& arrival : arrivals) {
      Waiting& process = waiting[process_of_[arrival.rank]];
      if (process.arrival == nullptr) {
        process.op = op;
        process.arrival = &arrival;
      }
      process.one_run = process.one_run && process.op.run == op.run;
    }
  }
  const Waiting* first = nullptr;
  for (const Waiting& process : waiting) {
    if (process.arrival == nullptr || !process.one_run) continue;
    if (first == nullptr) first = &process;
    if (process.op.run == first->op.run) continue;
    // Prefer the call with the same index, if the process waits there too.
    const auto same_call = pending_.find({process.op.run, first->op.number});
    return DescribeWaiters(*first->arrival, same_call == pending_.end()
                                                ? *process.arrival
                                                : same_call->second.front());
  }
  return "";
}

void GroupExchange::NoteOutOfOrder() {
  Set<uint64_t>(&blocks_[self_]->out_of_order, 1, std::memory_order_relaxed);
}

void GroupExchange::NoteClosed() {
  // Pairs with the acquire load in WhyEnded: all ops scheduled for this process are visible.
  Set<uint64_t>(&blocks_[self_]->closed, 1, std::memory_order_release);
  RingAll();
}

void GroupExchange::NoteLost(int process, const std::string& reason) {
  ControlBlock& copy = *blocks_[process];
  // Called on the thread that would have updated the copy.
  if (copy.closed.load(std::memory_order_relaxed) != 0) return;
  if (copy.broken.load(std::memory_order_relaxed) != 0) return;  // which has a better message
  SetMessage(&copy, reason);
  // Pairs with the acquire load in WhyEnded.
  copy.lost.store(1, std::memory_order_release);
  RingAll();
}

std::string GroupExchange::WhyEnded(int process) const {
  if (process == self_) return "";
  // Pairs with the release stores in NoteClosed and NoteLost.
  const ControlBlock& block = *blocks_[process];
  if (block.closed.load(std::memory_order_acquire) != 0) {
    return kHasClosed;
  }
  if (block.lost.load(std::memory_order_acquire) == 0) return "";
  return kConnectionLost + std::string(block.message) +
         "): its process ended, or the network failed";
}

std::optional<int> GroupExchange::EndedRank() const {
  for (size_t rank = 0; rank < process_of_.size(); ++rank) {
    if (!WhyEnded(process_of_[rank]).empty()) return rank;
  }
  return std::nullopt;
}

std::optional<OpName> GroupExchange::NextScheduled() {
  // Pairs with the release in Ring: earlier changes are visible in the checks below, and a later
  // ring makes the wait return at once.
  const uint32_t seen = blocks_[self_]->doorbell.load(std::memory_order_acquire);
  if (self_ == 0) ScheduleReady();
  const ControlBlock& leader = *blocks_[0];
  // Pairs with the release store in ScheduleReady.
  if (num_taken_ < leader.num_scheduled.load(std::memory_order_acquire)) {
    const OpName op = leader.scheduled[num_taken_ % ControlBlock::kRingSize];
    ++num_taken_;  // its slot may be reused: see Announce
    return op;
  }
  WaitForRing(&blocks_[self_]->doorbell, seen, Clock::now() + kLongestSleep);
  return std::nullopt;
}

bool GroupExchange::Barrier(const char* op_name, int waiting_rank, std::string* error) {
  ++num_barriers_;
  // Pairs with the acquire loads below, in the peers: what this process wrote to its windows before
  // the barrier, they read after it.
  Set(&blocks_[self_]->barriers, num_barriers_, std::memory_order_release);
  RingAll();
  const auto begin = Clock::now();
  const auto timeout = std::chrono::duration<double>(timeout_s_);
  auto deadline = begin + std::chrono::duration_cast<Clock::duration>(timeout);
  StopDetector stops(begin);
  std::vector<bool> seen_here(blocks_.size(), false);
  while (true) {
    deadline = std::max(deadline, stops.Look(Clock::now()));
    const uint32_t seen = blocks_[self_]->doorbell.load(std::memory_order_acquire);
    std::vector<int> late;
    for (size_t process = 0; process < blocks_.size(); ++process) {
      // Pairs with the release store above, in the peer.
      if (blocks_[process]->barriers.load(std::memory_order_acquire) < num_barriers_) {
        late.push_back(static_cast<int>(process));
      } else if (!seen_here[process]) {
        seen_here[process] = true;
        arrived_[process] = Clock::now();
      }
    }
    if (late.empty()) return true;
    if (*error = BrokenByPeer(); !error->empty()) return false;
    for (size_t rank = 0; rank < process_of_.size(); ++rank) {
      const auto process = std::find(late.begin(), late.end(), process_of_[rank]);
      const std::string why = process == late.end() ? "" : WhyEnded(*process);
      if (why.empty() || blocks_[*process]->lost == 0) continue;  // who closes ends its ops before
      *error =
          DescribeEnded(op_name, waiting_rank, StepOf(waiting_rank), static_cast<int>(rank), why);
      return false;
    }
    if (Clock::now() >= deadline) {
      std::vector<MissingRank> missing;
      for (size_t rank = 0; rank < process_of_.size(); ++rank) {
        if (std::find(late.begin(), late.end(), process_of_[rank]) == late.end()) continue;
        missing.push_back({static_cast<int>(rank), StepOf(waiting_rank),
                           StepOf(static_cast<int>(rank)), /*stopped=*/true});
      }
      *error = DescribeTimeout(op_name, waiting_rank, timeout_s_, " inside the op", missing);
      return false;
    }
    WaitForRing(&blocks_[self_]->doorbell, seen, std::min(deadline, Clock::now() + kLongestSleep));
  }
}

void GroupExchange::Break(const std::string& message) {
  ControlBlock& own = *blocks_[self_];
  if (own.broken.load(std::memory_order_relaxed) != 0) return;
  const size_t length = SetMessage(&own, message);
  Copy(own.message, length + 1);
  // Pairs with the acquire load in BrokenByPeer.
  Set<uint64_t>(&own.broken, 1, std::memory_order_release);
  RingAll();
}

std::string GroupExchange::BrokenByPeer() const {
  for (const ControlBlock* block : blocks_) {
    // Pairs with the release store in Break.
    if (block->broken.load(std::memory_order_acquire) != 0) return block->message;
  }
  return "";
}

void GroupExchange::Take(const OpName& op) {
  const auto [begin, end] = own_announcements_.equal_range(op);
  for (auto it = begin; it != end; ++it) {
    ControlBlock::Announcement& entry =
        blocks_[self_]->announced[it->second % ControlBlock::kRingSize];
    Set(&entry.rank, ControlBlock::kTaken, std::memory_order_relaxed);
  }
  own_announcements_.erase(begin, end);
}

bool GroupExchange::IsScheduled(const OpName& op) const {
  const ControlBlock& leader = *blocks_[0];
  const uint64_t end = leader.num_scheduled.load(std::memory_order_acquire);
  for (uint64_t index = num_taken_; index < end; ++index) {
    if (leader.scheduled[index % ControlBlock::kRingSize] == op) return true;
  }
  return false;
}

template <typename Visit>
bool GroupExchange::FindAnnouncement(int process, Visit visit) const {
  const ControlBlock& block = *blocks_[process];
  const uint64_t end = block.num_announced.load(std::memory_order_acquire);
  const uint64_t begin = end < ControlBlock::kRingSize ? 0 : end - ControlBlock::kRingSize;
  for (uint64_t index = begin; index < end; ++index) {
    if (visit(block.announced[index % ControlBlock::kRingSize])) return true;
  }
  return false;
}

bool GroupExchange::HasAnnounced(const OpName& op, int rank) const {
  return FindAnnouncement(process_of_[rank], [&](const ControlBlock::Announcement& entry) {
    return entry.rank.load(std::memory_order_relaxed) == rank && entry.op == op;
  });
}

std::optional<OpNotice> GroupExchange::WaitsIn(int rank) const {
  std::optional<OpNotice> notice;
  FindAnnouncement(process_of_[rank], [&](const ControlBlock::Announcement& entry) {
    if (entry.rank.load(std::memory_order_relaxed) != rank) return false;
    notice = entry.notice;
    return true;
  });
  return notice;
}

int64_t GroupExchange::StepOf(int rank) const {
  return blocks_[process_of_[rank]]->steps[rank].load(std::memory_order_relaxed);
}

void GroupExchange::SetArrival(int rank, Clock::time_point time) {
  const auto since = std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch());
  blocks_[self_]->arrivals_ns[rank].store(since.count(), std::memory_order_relaxed);
  if (peers_.empty()) return;
  const std::chrono::nanoseconds age = Clock::now() - time;
  Set<int64_t>(&blocks_[self_]->ages_ns[rank], age.count(), std::memory_order_relaxed);
}

GroupExchange::Clock::time_point GroupExchange::Arrival(int rank) const {
  const int process = process_of_[rank];
  const ControlBlock& block = *blocks_[process];
  if (!here_[process]) {  // the clocks of hosts differ
    const std::chrono::nanoseconds age(block.ages_ns[rank].load(std::memory_order_relaxed));
    return arrived_[process] - std::chrono::duration_cast<Clock::duration>(age);
  }
  const std::chrono::nanoseconds since(block.arrivals_ns[rank].load(std::memory_order_relaxed));
  return Clock::time_point(std::chrono::duration_cast<Clock::duration>(since));
}

}  // namespace jax_deepep
