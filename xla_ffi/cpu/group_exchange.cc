#include "cpu/group_exchange.h"

#include <algorithm>
#include <cstring>

#include "interface/error_text.h"

namespace jax_deepep {
namespace {

// A lost wake-up would cost this much, and is not expected.
constexpr std::chrono::milliseconds kLongestSleep(500);

struct WindowSizes {
  explicit WindowSizes(const GroupShape& shape) {
    const auto tokens = static_cast<size_t>(shape.max_tokens);
    const auto ranks = static_cast<size_t>(shape.num_ranks);
    x = Aligned(tokens * shape.max_row_bytes());
    entries = Aligned(tokens * shape.num_topk * sizeof(int32_t));
    sums = Aligned(ranks * tokens * shape.hidden_size * sizeof(float));
    gradients = Aligned(ranks * tokens * shape.num_topk * sizeof(float));
  }
  size_t x, entries, sums, gradients;
};

}  // namespace

size_t RankWindow::Bytes(const GroupShape& shape) {
  const WindowSizes sizes(shape);
  return sizes.x + 2 * sizes.entries + sizes.sums + sizes.gradients;
}

RankWindow RankWindow::At(char* memory, const GroupShape& shape) {
  const WindowSizes sizes(shape);
  RankWindow window;
  window.x = memory;
  window.entries = reinterpret_cast<int32_t*>(window.x + sizes.x);
  window.entry_weights = reinterpret_cast<float*>(window.x + sizes.x + sizes.entries);
  window.sums = window.x + sizes.x + 2 * sizes.entries;
  window.entry_gradients = reinterpret_cast<float*>(window.sums + sizes.sums);
  return window;
}

GroupExchange::GroupExchange(std::vector<ControlBlock*> blocks, int self,
                             std::vector<int> process_of, double timeout_s)
    : blocks_(std::move(blocks)),
      self_(self),
      process_of_(std::move(process_of)),
      timeout_s_(timeout_s),
      num_read_(blocks_.size(), 0) {}

void GroupExchange::RingAll() {
  for (ControlBlock* block : blocks_) Ring(&block->doorbell);
}

void GroupExchange::Wake() { Ring(&blocks_[self_]->doorbell); }

bool GroupExchange::Announce(const OpName& op, int rank, int64_t step) {
  ControlBlock& own = *blocks_[self_];
  own.steps[rank].store(step, std::memory_order_relaxed);
  const uint64_t index = own.num_announced.load(std::memory_order_relaxed);
  // An op that this process took up has had one announcement of each rank. With no more than a ring
  // of others, neither ring overflows: the leader has read what was taken up, and an op is
  // scheduled only once every process has announced it.
  const auto ranks_here = std::count(process_of_.begin(), process_of_.end(), self_);
  if (index - num_taken_ * ranks_here >= ControlBlock::kRingSize) return false;
  ControlBlock::Announcement& entry = own.announced[index % ControlBlock::kRingSize];
  entry.op = op;
  entry.rank.store(rank, std::memory_order_relaxed);
  own_announcements_.emplace(op, index);
  // Pairs with the acquire load in ScheduleReady: the entry is there before its number.
  own.num_announced.store(index + 1, std::memory_order_release);
  Ring(&blocks_[0]->doorbell);
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
      const OpName op = peer.announced[num_read_[process] % ControlBlock::kRingSize].op;
      if (++num_pending_[op] < static_cast<int>(process_of_.size())) continue;
      num_pending_.erase(op);
      const uint64_t index = own.num_scheduled.load(std::memory_order_relaxed);
      own.scheduled[index % ControlBlock::kRingSize] = op;
      // Pairs with the acquire load in NextScheduled.
      own.num_scheduled.store(index + 1, std::memory_order_release);
      rang = true;
    }
  }
  if (rang) RingAll();
}

std::optional<OpName> GroupExchange::NextScheduled() {
  // Pairs with the release in Ring: what rang before is visible in the checks below, and what rings
  // later makes the wait return at once.
  const uint32_t seen = blocks_[self_]->doorbell.load(std::memory_order_acquire);
  if (self_ == 0) ScheduleReady();
  const ControlBlock& leader = *blocks_[0];
  // Pairs with the release store in ScheduleReady.
  if (num_taken_ < leader.num_scheduled.load(std::memory_order_acquire)) {
    const OpName op = leader.scheduled[num_taken_ % ControlBlock::kRingSize];
    ++num_taken_;  // now its place may be written again: see Announce
    return op;
  }
  WaitForRing(&blocks_[self_]->doorbell, seen, Clock::now() + kLongestSleep);
  return std::nullopt;
}

bool GroupExchange::Meet(const char* op_name, int waiting_rank, std::string* error) {
  ++num_barriers_;
  // Pairs with the acquire loads below, in the peers: what this process wrote to its windows before
  // the barrier, they read after it.
  blocks_[self_]->barriers.store(num_barriers_, std::memory_order_release);
  RingAll();
  const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                           std::chrono::duration<double>(timeout_s_));
  while (true) {
    const uint32_t seen = blocks_[self_]->doorbell.load(std::memory_order_acquire);
    std::vector<int> late;
    for (size_t process = 0; process < blocks_.size(); ++process) {
      // Pairs with the release store above, in the peer.
      if (blocks_[process]->barriers.load(std::memory_order_acquire) < num_barriers_) {
        late.push_back(static_cast<int>(process));
      }
    }
    if (late.empty()) return true;
    if (*error = BrokenByPeer(); !error->empty()) return false;
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
  const size_t length = std::min<size_t>(message.size(), ControlBlock::kMessageBytes - 1);
  std::memcpy(own.message, message.data(), length);
  own.message[length] = '\0';
  // Pairs with the acquire load in BrokenByPeer.
  own.broken.store(1, std::memory_order_release);
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
    entry.rank.store(ControlBlock::kTaken, std::memory_order_relaxed);
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

bool GroupExchange::HasAnnounced(const OpName& op, int rank) const {
  const ControlBlock& block = *blocks_[process_of_[rank]];
  const uint64_t end = block.num_announced.load(std::memory_order_acquire);
  const uint64_t begin = end < ControlBlock::kRingSize ? 0 : end - ControlBlock::kRingSize;
  for (uint64_t index = begin; index < end; ++index) {
    const ControlBlock::Announcement& entry = block.announced[index % ControlBlock::kRingSize];
    if (entry.rank.load(std::memory_order_relaxed) == rank && entry.op == op) return true;
  }
  return false;
}

int64_t GroupExchange::StepOf(int rank) const {
  return blocks_[process_of_[rank]]->steps[rank].load(std::memory_order_relaxed);
}

void GroupExchange::SetArrival(int rank, Clock::time_point time) {
  const auto since = std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch());
  blocks_[self_]->arrivals_ns[rank].store(since.count(), std::memory_order_relaxed);
}

GroupExchange::Clock::time_point GroupExchange::Arrival(int rank) const {
  const ControlBlock& block = *blocks_[process_of_[rank]];
  const std::chrono::nanoseconds since(block.arrivals_ns[rank].load(std::memory_order_relaxed));
  return Clock::time_point(std::chrono::duration_cast<Clock::duration>(since));
}

}  // namespace jax_deepep
