#include <chrono>
#include "block_threads.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

namespace cuda_on_cpu {

// Save the registers that a function must keep and the stack pointer, and switch to another stack.
extern "C" void cuda_on_cpu_switch(void** save, void* load);
asm(R"(
.text
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");

namespace {

constexpr size_t kStackBytes = size_t{64} << 10;
constexpr int kMaxThreads = 1024;

[[noreturn]] void Die(const char* why) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", why);
  std::fflush(nullptr);
  std::abort();
}

// The stacks of a block, reused by later ones, so that their pages stay.
class Stacks {
 public:
  char* Take() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!free_.empty()) {
      char* stacks = free_.back();
      free_.pop_back();
      return stacks;
    }
    void* stacks = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) Die("no memory for the stacks of a block");
    return static_cast<char*>(stacks);
  }
  void GiveBack(char* stacks) {
    std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(stacks);
  }

 private:
  std::mutex mutex_;
  std::vector<char*> free_;
};

Stacks& AllStacks() {
  static auto* stacks = new Stacks;
  return *stacks;
}

// Threads that wait for each other.
struct Barrier {
  int members = 0;  // that have not ended
  int arrived = 0;  // that do not wait
  std::vector<int> waiting;

  bool is_complete() const { return static_cast<int>(waiting.size()) + arrived == members; }
};

struct Warp {
  Barrier barrier;
  int lanes = 0;
  uint64_t words[2][kWarpSize] = {};  // of the last two exchanges: slow readers of the previous one are not disturbed
};

struct Thread {
  Position position;
  void* stack_pointer = nullptr;
  unsigned num_exchanges = 0;
  unsigned num_votes = 0;
};

class Block;
thread_local Block* block = nullptr;
thread_local Thread* current = nullptr;

class Block {
 public:
  Block(int index, int num_blocks, int num_threads, const std::function<void()>& body)
      : body_(body),
        stacks_(AllStacks().Take()),
        threads_(num_threads),
        warps_((num_threads + kWarpSize - 1) / kWarpSize),
        random_(static_cast<unsigned>(index + ++num_runs)) {
    all_.members = num_threads;
    for (int i = 0; i < num_threads; ++i) {
      Thread& thread = threads_[i];
      thread.position.thread.x = i;
      thread.position.block.x = index;
      thread.position.block_size = {static_cast<unsigned>(num_threads), 1, 1};
      thread.position.grid_size = {static_cast<unsigned>(num_blocks), 1, 1};
      Warp& warp = warps_[i / kWarpSize];
      ++warp.barrier.members;
      ++warp.lanes;
      // What cuda_on_cpu_switch takes from a stack: six registers, and the return address. A function
      // begins 8 bytes off a multiple of 16.
      auto* top = reinterpret_cast<void**>(stacks_ + (i + 1) * kStackBytes);
      *--top = nullptr;
      *--top = reinterpret_cast<void*>(&Begin);
      for (int register_ = 0; register_ < 6; ++register_) *--top = nullptr;
      thread.stack_pointer = top;
      ready_.push_back(i);
    }
  }
  ~Block() { AllStacks().GiveBack(stacks_); }

  void Run() {
    block = this;
    int num_turns = 0;
    while (num_ended_ < static_cast<int>(threads_.size())) {
      if (ready_.empty()) Die("threads of a block wait at a barrier that others do not reach");
      const size_t at = random_() % ready_.size();
      const int next = ready_[at];
      ready_[at] = ready_.back();
      ready_.pop_back();
      current = &threads_[next];
      cuda_on_cpu_switch(&scheduler_, current->stack_pointer);
      if (++num_turns % 256 == 0) std::this_thread::yield();
    }
    block = nullptr;
  }

  void GiveWay() {
    ready_.push_back(IndexOf(*current));
    LeaveTurn();
    if (ready_.empty()) std::this_thread::yield();  // for other blocks
    // Threads that wait for a peer leave the cores to others; those that wait for long, perhaps until a time
    // limit, look less often.
    constexpr int kTurnsBetweenPauses = 64, kPausesOfAMillisecond = 16, kMostMilliseconds = 10;
    if (++num_turns_ % kTurnsBetweenPauses == 0) {
      const int num_pauses = num_turns_ / kTurnsBetweenPauses;
      std::this_thread::sleep_for(
          std::chrono::milliseconds(std::min(1 + num_pauses / kPausesOfAMillisecond, kMostMilliseconds)));
    }
  }

  void Wait(Barrier* barrier) {
    barrier->waiting.push_back(IndexOf(*current));
    // This thread too: the last one to arrive is not always the first to continue.
    if (barrier->is_complete()) Release(barrier);
    LeaveTurn();
  }
  void Arrive(Barrier* barrier) {
    ++barrier->arrived;
    if (barrier->is_complete()) Release(barrier);
  }

  Barrier* all() { return &all_; }
  Barrier* Numbered(int number, int members) {
    Barrier& barrier = numbered_[number];
    barrier.members = members;
    return &barrier;
  }
  bool* AllOf(unsigned vote) { return &votes_[vote % 2]; }
  Warp& WarpOfCurrent() { return warps_[IndexOf(*current) / kWarpSize]; }

 private:
  static void Begin() {
    block->body_();
    block->End();
  }

  void End() {
    ++num_ended_;
    for (Barrier* barrier : {&all_, &WarpOfCurrent().barrier}) {
      --barrier->members;
      if (!barrier->waiting.empty() && barrier->is_complete()) Release(barrier);
    }
    LeaveTurn();
    Die("a thread that has ended continues");
  }

  void Release(Barrier* barrier) {
    ready_.insert(ready_.end(), barrier->waiting.begin(), barrier->waiting.end());
    barrier->waiting.clear();
    barrier->arrived = 0;
  }

  void LeaveTurn() {
    Thread* self = current;
    cuda_on_cpu_switch(&self->stack_pointer, scheduler_);
  }

  int IndexOf(const Thread& thread) const { return static_cast<int>(&thread - threads_.data()); }

  static std::atomic<unsigned> num_runs;

  const std::function<void()>& body_;
  char* stacks_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Barrier all_;
  Barrier numbered_[16];
  int num_turns_ = 0;  // that threads have given to others
  bool votes_[2] = {true, true};
  std::vector<int> ready_;
  int num_ended_ = 0;
  void* scheduler_ = nullptr;
  std::minstd_rand random_;
};

std::atomic<unsigned> Block::num_runs{0};

}  // namespace

const Position& Here() { return current->position; }

void RunGrid(int num_blocks, int num_threads, const std::function<void()>& body) {
  std::vector<std::thread> blocks;
  for (int i = 0; i < num_blocks; ++i) {
    blocks.emplace_back([=, &body] { Block(i, num_blocks, num_threads, body).Run(); });
  }
  for (std::thread& each : blocks) each.join();
}

void GiveWay() {
  if (block != nullptr) block->GiveWay();
}

void SyncThreads() { block->Wait(block->all()); }
bool SyncThreadsAnd(bool value) {
  // No thread sets the flag of the next call before all have read this one: there is a barrier between.
  bool* all = block->AllOf(current->num_votes++);
  if (!value) *all = false;
  block->Wait(block->all());
  const bool result = *all;
  block->Wait(block->all());
  *all = true;
  return result;
}
void WaitAtBarrier(int number, int num_threads) {
  block->Wait(block->Numbered(number, num_threads));
}
void ArriveAtBarrier(int number, int num_threads) {
  block->Arrive(block->Numbered(number, num_threads));
}
void SyncWarp() { block->Wait(&block->WarpOfCurrent().barrier); }

const uint64_t* Exchange(uint64_t word) {
  Warp& warp = block->WarpOfCurrent();
  uint64_t* words = warp.words[current->num_exchanges++ % 2];
  words[current->position.thread.x % kWarpSize] = word;
  block->Wait(&warp.barrier);
  return words;
}

int LanesOfWarp() { return block->WarpOfCurrent().lanes; }

}  // namespace cuda_on_cpu
