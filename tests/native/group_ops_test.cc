// Checks of ops of a group: windows, pages, rings, matching, threads, and the properties of verbs.
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/group_exchange.h"
#include "cpu/pages.h"
#include "cpu/stop_detector.h"
#include "cpu/threads.h"
#include "cpu/windows.h"
#include "cuda/device_control.h"
#include "interface/op_signature.h"
#include "interface/verbs.h"
#include "native_test.h"

// Replaces the system's function, so that a test can make it fail: see CheckThreads.
static std::atomic<bool> refuse_threads{false};
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes,
                              void* (*run)(void*), void* of) noexcept {
  using Function = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static const auto real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "pthread_create"));
  return refuse_threads ? EAGAIN : real(thread, attributes, run, of);
}

namespace jax_deepep {
namespace {

// A slot of a window is as long as the longest row on the wire, which padding makes longer than
// float32 where rows are short.
void CheckWindows() {
  std::vector<char> memory;
  for (const int hidden : {1, 2, 8, 37, 128, 7168}) {
    GroupShape shape;
    shape.num_ranks = 3;
    shape.num_topk = 2;
    shape.max_tokens = 64;
    shape.hidden_size = hidden;
    memory.resize(RankWindow::Bytes(shape));
    const RankWindow window = RankWindow::At(memory.data(), shape);
    const char* after_x = reinterpret_cast<const char*>(window.entries);
    const char* after_sums = reinterpret_cast<const char*>(window.entry_gradients);
    Check(after_x - window.x >= 64 * shape.max_row_bytes(), "the window of rows of integers",
          hidden);
    for (int format = 0; format < kNumWireFormats; ++format) {
      const int64_t bytes =
          RowFormat{RowType::kFloat32, hidden, static_cast<WireFormat>(format)}.wire_bytes();
      Check(after_x - window.x >= 64 * bytes, "the window of rows", hidden);
      Check(after_sums - window.sums >= 3 * 64 * bytes, "the window of sums", hidden);
    }
  }
}

// Of new memory only the touched pages, and what is no whole page, are left to clear.
void CheckPages() {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  constexpr size_t kPages = 64;
  void* const memory =
      mmap(nullptr, kPages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return Check(false, "memory to clear");
  madvise(memory, kPages * page, MADV_NOHUGEPAGE);
  auto* const bytes = static_cast<char*>(memory);
  char* const begin = bytes + 100;
  const size_t size = (kPages - 1) * page;  // to within the last page
  for (const size_t touched : {0, 20, 21, 40, 63}) bytes[touched * page + 200] = 1;

  size_t num_bytes = 0;
  for (const ByteRange& range : RangesToClear(begin, size)) {
    std::memset(range.begin, 0, range.bytes);
    num_bytes += range.bytes;
  }
  Check(num_bytes == 3 * page + (page - 100) + 100, "what is left to clear", num_bytes);
  Check(bytes[200 + 63 * page] == 1, "nothing beyond is cleared");
  for (size_t i = 0; i < size; ++i) Check(begin[i] == 0, "all is zero", i);

  std::memset(memory, 1, kPages * page);
  const std::vector<ByteRange> all = RangesToClear(begin, size);
  Check(all.size() == 1 && all[0].begin == begin && all[0].bytes == size, "used memory",
        all.size());
  Check(begin[0] == 1 && begin[size - 1] == 1, "is not cleared here");
  munmap(memory, kPages * page);
}

// More ops than the rings hold, of which two processes take few at a time: those that are accepted
// arrive at both in one order, and the others are rejected.
void CheckRings() {
  const auto leaders = std::make_unique<ControlBlock>(), others = std::make_unique<ControlBlock>();
  GroupExchange leader({leaders.get(), others.get()}, 0, {0, 1}, 5.0);
  GroupExchange other({leaders.get(), others.get()}, 1, {0, 1}, 5.0);
  int64_t announced[2] = {0, 0}, taken[2] = {0, 0};
  const auto announce = [&](GroupExchange& exchange, int rank) {
    OpNotice notice;
    notice.step = announced[rank] + 1;
    if (!exchange.Announce({1, announced[rank]}, rank, notice)) return false;
    ++announced[rank];
    return true;
  };
  const auto take = [&](GroupExchange& exchange, int rank) {
    const auto op = exchange.NextScheduled();
    if (!op.has_value()) return;
    exchange.Take(*op);
    Check(op->number == taken[rank]++, "ops are taken in the order of their schedule", op->number);
  };
  for (int round = 0; round < 4; ++round) {
    while (announce(leader, 0)) {
    }
    while (announce(other, 1)) {
    }
    Check(announced[0] == taken[0] + ControlBlock::kRingSize, "a ring of ops may wait",
          announced[0]);
    Check(announced[1] == taken[1] + ControlBlock::kRingSize, "in every process", announced[1]);
    const int ahead = round % 2;  // each of them gets ahead of the other in turn
    for (int i = 0; i < (ahead == 0 ? 3000 : 1000); ++i) take(leader, 0);
    for (int i = 0; i < (ahead == 1 ? 3000 : 1000); ++i) take(other, 1);
  }
  Check(taken[0] == 8000 && taken[1] == 8000, "what both announced is scheduled", taken[0]);
}

// Three ranks of two processes, which announce ops; what the leader finds.
struct Group {
  const std::unique_ptr<ControlBlock> leaders = std::make_unique<ControlBlock>();
  const std::unique_ptr<ControlBlock> others = std::make_unique<ControlBlock>();
  GroupExchange leader{{leaders.get(), others.get()}, 0, {0, 0, 1}, 5.0};
  GroupExchange other{{leaders.get(), others.get()}, 1, {0, 0, 1}, 5.0};

  void Come(int rank, int64_t run, int64_t number, int64_t num_tokens = 8) {
    OpNotice notice;
    notice.signature.num_tokens = num_tokens;
    notice.num_calls = 4;
    (rank < 2 ? leader : other).Announce({run, number}, rank, notice);
  }
  std::string Found() {
    leader.NextScheduled();
    return leader.different_ops();
  }
};

void CheckDifferentOps() {
  const auto contains = [](const std::string& text, const char* words) {
    return text.find(words) != std::string::npos;
  };
  {
    Group group;
    group.Come(0, 1, 2);
    group.Come(2, 1, 3, 16);
    Check(group.Found().empty(), "ops of one run may come in any order");
    group.Come(2, 1, 2, 16);
    Check(contains(group.Found(), "num_tokens is 8 on rank 0 and 16 on rank 2"),
          "one op, two signatures");
  }
  {
    Group group;
    group.Come(1, 1, 0);
    group.Come(2, 7, 0, 16);
    Check(contains(group.Found(),
                   "on rank 1 at step 0 met a different op of rank 2: num_tokens is 8"),
          "two processes in two runs");
  }
  {
    Group group;
    group.Come(0, 1, 0);
    group.Come(0, 7, 0);
    group.Come(2, 7, 0);
    Check(group.Found().empty(), "a process that has arrived in both runs");
  }
  {
    Group group;
    group.other.NoteOutOfOrder();
    group.Come(0, 1, 0);
    group.Come(2, 7, 0);
    Check(group.Found().empty(), "runs that a process does not end one after the other");
    Check(group.leader.WaitsIn(2).has_value() && !group.leader.WaitsIn(1).has_value(),
          "where a rank waits");
    Check(!group.leader.EndedRank().has_value(), "no process has closed");
    group.other.NoteClosed();
    Check(group.leader.EndedRank() == 2 && !group.other.EndedRank().has_value(),
          "a peer has closed");
  }
}

void CheckThreads() {
  const std::thread::id here = std::this_thread::get_id();
  std::atomic<int> ran{0};
  std::set<std::thread::id> threads;
  refuse_threads = true;
  Check(!RunOnOwnThreads({[&] { ++ran; }, [&] { ++ran; }}), "no threads: an error");
  const auto cover = [&](int64_t begin, int64_t end) { ran += static_cast<int>(end - begin); };
  ParallelFor(1000, 1, 1 << 20, cover);
  Check(ran == 1000, "a loop is complete without helpers", ran);
  try {
    MakeThread([] {}).join();
    Check(false, "a long-lived thread that cannot be started is an error");
  } catch (const std::runtime_error& error) {
    Check(std::strstr(error.what(), "raise the limit on processes and threads") != nullptr,
          "its remedy");
  }
  refuse_threads = false;

  // Each task has its own thread: all wait for all. And again with one thread more.
  for (const int count : {4, 5}) {
    std::mutex mutex;
    std::condition_variable all_came;
    int num_came = 0, num_left = 0;
    const auto wait_for_all = [&] {
      std::unique_lock<std::mutex> lock(mutex);
      threads.insert(std::this_thread::get_id());
      ++num_came;
      all_came.notify_all();
      all_came.wait(lock, [&] { return num_came == count; });
      ++num_left;
      all_came.notify_all();
    };
    Check(RunOnOwnThreads(std::vector<std::function<void()>>(count, wait_for_all)),
          "threads are started");
    std::unique_lock<std::mutex> lock(mutex);
    all_came.wait(lock, [&] { return num_left == count; });
  }
  Check(threads.count(here) == 0 && threads.size() >= 5, "tasks run on separate threads");
}

// Every verb has its own number and name, and peers read at most kMaxOperands of its arrays.
void CheckVerbs() {
  std::set<std::string> names;
  std::set<Verb> numbers = {Verb{}, Verb::kBaseline};
  Verbs::ForEach([&](auto type) {
    using Params = typename decltype(type)::type;
    Check(numbers.insert(kVerbOf<Params>).second, "a verb's number");
    Check(names.insert(NameOf(kVerbOf<Params>)).second, "a verb's name");
    Check(NameOf(SignatureOf(Params(), 1).verb) == std::string(VerbTraits<Params>::kName),
          "the verb of a signature");
    Params params;
    Check(VerbTraits<Params>::ReadByPeers(GroupShape(), &params).size() <= kMaxOperands,
          "what peers read");
  });
  Check(names.count(NameOf(Verb{})) == 0 && names.count(NameOf(Verb::kBaseline)) == 0,
        "not a verb");
}

// An operand that peers cannot reach is replaced by a copy, and results are not.
void CheckPeerArrays() {
  const char x = 0, copy = 0;
  DispatchParams params;
  params.x = &x;
  params.route.SetRows({RowType::kBFloat16, 8});
  params.route.num_tokens = 3;
  int32_t scratch = 0;
  params.scratch = &scratch;
  const auto arrays = VerbTraits<DispatchParams>::ReadByPeers(GroupShape(), &params);
  Check(arrays.size() == 2 && arrays[0].data == &x && arrays[0].bytes == 48,
        "rows that peers read");
  Check(arrays[1].data == &scratch && !arrays[1].replace, "scratch that peers read");
  arrays[0].replace(&copy);
  Check(params.x == &copy, "a copy replaces an operand");
  params.route.num_tokens = 0;
  Check(VerbTraits<DispatchParams>::ReadByPeers(GroupShape(), &params)[0].data == nullptr,
        "peers read nothing of no rows");
}

// Who was stopped for most of its timeout continues at about the deadline: it must not blame others
// before it has received what they sent meanwhile.
void CheckStops() {
  using std::chrono::milliseconds;
  const StopDetector::Clock::time_point begin{};
  StopDetector stops(begin);
  for (int ms : {0, 500, 1000, 1900, 2400}) {
    Check(stops.Look(begin + milliseconds(ms)) <= begin + milliseconds(ms), "not stopped", ms);
  }
  const auto continued = begin + milliseconds(6100);
  const auto earliest = continued + StopDetector::kCatchUp;
  Check(stops.Look(continued) == earliest, "stopped");
  Check(stops.Look(continued + milliseconds(300)) == earliest, "stopped a moment ago");
}

}  // namespace

void CheckGroupOps() {
  CheckWindows();
  CheckPages();
  CheckRings();
  CheckDifferentOps();
  CheckThreads();
  CheckVerbs();
  CheckPeerArrays();
  CheckStops();
}

}  // namespace jax_deepep
