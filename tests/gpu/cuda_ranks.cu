// Several ranks in one process on one GPU, a stream each: every verb against the CPU's bits, ranks that
// arrive late or never, and many steps with random delays. No Python, so that compute-sanitizer can watch.
//
//     cuda_ranks [conformance] [faults] [soak STEPS]
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/communicator.h"
#include "cpu/op.h"
#include "cuda/group_op.cuh"
#include "cuda/kernel_launch.h"
#include "cuda/kernels.h"
#include "cuda/low_latency/window.h"
#include "cuda/memory_order.cuh"
#include "cuda/rank_kernels.h"
#include "interface/op_signature.h"
#include "routing/group_rows.h"
#include "rank_arrays.cuh"

namespace jax_deepep {
namespace {

// Kernels may run on CPUs instead, where everything is slower: see tests/native/cuda_on_cpu.
#ifdef __CUDACC__
constexpr bool kOnGpu = true;
#else
constexpr bool kOnGpu = false;
#endif
constexpr int kLonger = kOnGpu ? 1 : 10;        // factor for time limits
constexpr int kOpsTakeLonger = kOnGpu ? 1 : 500;

__global__ void Delay(uint64_t nanoseconds) {
  const uint64_t start = NanosecondClock();
  while (NanosecondClock() - start < nanoseconds) {
  }
}

// With shared memory, to keep other blocks off the SM.
void LaunchDelay(uint64_t nanoseconds, cudaStream_t stream, int num_blocks = 1, int shared_bytes = 0) {
  const char* error = LaunchKernel(Delay, nanoseconds, num_blocks, 1, shared_bytes, stream);
  Check(error == nullptr, std::string("launch: ") + (error ? error : ""));
}

// All ranks of one EP group on one device.
class Group {
 public:
  // With windows for all tokens, so that ops may take either mode.
  Group(const GroupShape& shape, int num_blocks, double timeout_s, bool low_latency = false)
      : num_blocks_(num_blocks), low_latency_(low_latency) {
    // Rows of float32 as well.
    const WindowSize size{shape.max_tokens, std::max(4 * shape.hidden_size, 16)};
    const WindowLayout window(shape, size);
    const int64_t control_bytes = window.offset + window.bytes();
    int shared_bytes = 0;
    CheckCuda(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), "attribute");
    device_.shared_bytes = shared_bytes - kStaticSharedBytes;
    for (auto* load : {LoadRankKernels, KernelsOf(Mode::kThroughput).load, KernelsOf(Mode::kLowLatency).load}) {
      const char* error = load(device_.shared_bytes);
      Check(error == nullptr, std::string("kernels load: ") + (error ? error : ""));
    }
    for (int rank = 0; rank < shape.num_ranks; ++rank) {
      controls_.push_back(std::make_unique<Array>(control_bytes));
      CheckCuda(cudaMemset(controls_.back()->device<void>(), 0, control_bytes), "cudaMemset");
      operands_.push_back(std::make_unique<Array>(4));
      *operands_.back()->host<int32_t>() = rank;
      operands_.back()->ToDevice();
      streams_.emplace_back();
      CheckCuda(cudaStreamCreateWithFlags(&streams_.back(), cudaStreamNonBlocking), "stream");
      statuses_.emplace_back();
      CheckCuda(cudaHostAlloc(reinterpret_cast<void**>(&statuses_.back()), sizeof(HostStatus), 0), "host");
      *statuses_.back() = HostStatus{};
    }
    for (int rank = 0; rank < shape.num_ranks; ++rank) {
      OpFrame frame;
      frame.shape = shape;
      frame.window = size;
      frame.rank = rank;
      frame.timeout_ns = static_cast<uint64_t>(timeout_s * 1e9);
      frame.expected_rank = operands_[rank]->device<int32_t>();
      frame.status = statuses_[rank];
      for (int peer = 0; peer < shape.num_ranks; ++peer) frame.control[peer] = controls_[peer]->device<DeviceControl>();
      frames_.push_back(frame);
    }
    // Loaded here: a kernel that is loaded while ranks wait for each other may wait for them.
    LaunchDelay(0, nullptr);
    CheckCuda(cudaDeviceSynchronize(), "set-up");
  }
  ~Group() {
    for (cudaStream_t stream : streams_) cudaStreamDestroy(stream);
    for (HostStatus* status : statuses_) cudaFreeHost(status);
  }

  template <typename Params>
  void Launch(int rank, const Params& params, cudaStream_t stream = nullptr) {
    OpFrame frame = FrameOf(rank);
    frame.op = SignatureOf(params, stream != nullptr);  // an op on another stream is another call
    const KernelSet& kernels = KernelsOf(low_latency_ ? Mode::kLowLatency : Mode::kThroughput);
    frame.op.flags |= kernels.flags;
    frame.op_hash = frame.op.Hash();
    const auto launch = kernels.LaunchOf<Params>();
    const char* error = launch(frame, params, num_blocks_, device_, stream ? stream : streams_[rank]);
    Check(error == nullptr, std::string("launch: ") + (error ? error : ""));
  }
  void Abort(int rank) {
    const char* error = LaunchAbort(frames_[rank], Failure::kNotLaunched, streams_[rank]);
    Check(error == nullptr, std::string("launch: ") + (error ? error : ""));
  }
  void DelayRank(int rank, uint64_t nanoseconds) { LaunchDelay(nanoseconds, streams_[rank]); }

  // Run later ops in this mode.
  void Take(bool low_latency) { low_latency_ = low_latency; }

  // Let the program run a rank as another one.
  void TakeFor(int rank, int32_t expected) {
    *operands_[rank]->host<int32_t>() = expected;
    operands_[rank]->ToDevice();
  }

  OpFrame FrameOf(int rank) {
    OpFrame frame = frames_[rank];
    frame.launch = ++num_launches_;
    return frame;
  }
  cudaStream_t stream(int rank) const { return streams_[rank]; }

  void Wait() { CheckCuda(cudaDeviceSynchronize(), "the ops of all ranks"); }
  HostStatus& status(int rank) { return *statuses_[rank]; }

 private:
  int num_blocks_;
  bool low_latency_;
  uint64_t num_launches_ = 0;
  DeviceFacts device_;
  std::vector<std::unique_ptr<Array>> controls_, operands_;
  std::vector<cudaStream_t> streams_;
  std::vector<HostStatus*> statuses_;
  std::vector<OpFrame> frames_;
};

// Run one verb of all ranks on the CPU.
template <typename Params>
void RunOnCpu(Communicator& comm, int64_t run, const std::vector<Params>& params) {
  std::atomic<int> done{0};
  static const char instruction = 0;
  for (size_t rank = 0; rank < params.size(); ++rank) {
    auto op = std::make_unique<VerbOp<Params>>(params[rank], 0);
    op->done = [&done] { ++done; };
    op->fail = [](const std::string& why) { Check(false, why); };
    OpCall call{&instruction, {}, 1, true};
    call.op.run = run;
    comm.Join(call, *comm.FindLocation(rank), std::move(op));
  }
  while (done < static_cast<int>(params.size())) std::this_thread::yield();
  comm.WaitForOps();
}

std::shared_ptr<Communicator> CpuCommunicator(const GroupShape& shape) {
  CommunicatorConfig config;
  config.shape = shape;
  config.num_groups = 1;
  config.timeout_s = 60;
  for (int rank = 0; rank < shape.num_ranks; ++rank) config.locations.push_back({rank, 0, rank, 0});
  return std::make_shared<Communicator>(config);
}

void CheckSame(Array& array, size_t bytes, const std::string& what) {
  const std::vector<char> got = array.FromDevice();
  const char* expected = array.host<char>();
  for (size_t i = 0; i < bytes; ++i) {
    if (got[i] == expected[i]) continue;
    Check(false, what + ": byte " + std::to_string(i) + " of " + std::to_string(bytes));
    return;
  }
}

// Rows of tokens and padding; the contents of the others are unspecified.
void CheckSameRows(const Problem& problem, Array& array, Rank& rank, bool all, const std::string& what) {
  int64_t end = 0;
  for (int group = 0; group < NumRowGroups(problem.shape, problem.route); ++group) {
    end += rank.group_sizes.host<int32_t>()[group];
  }
  if (all) end = problem.route.capacity;
  CheckSame(array, Rank::Rows(problem, end), what);
}

// In low-latency mode, only the rank of each expert matters.
void CheckDestination(const Problem& problem, Rank& rank, const std::string& what) {
  if (!problem.low_latency) return CheckSame(rank.destination, rank.destination.bytes(), what);
  const std::vector<char> got = rank.destination.FromDevice();
  const int num_topk = problem.shape.num_topk;
  for (int64_t i = 0; i < int64_t{problem.route.num_tokens} * num_topk; ++i) {
    const int32_t* experts = rank.topk_idx.host<int32_t>() + i / num_topk * num_topk;
    const bool valid = IsValidEntry(experts, i % num_topk, problem.shape.num_experts);
    const int32_t expected = valid ? experts[i % num_topk] / problem.shape.num_local_experts() : kNone;
    if (reinterpret_cast<const int32_t*>(got.data())[i] != expected) return Check(false, what);
  }
}

void CheckProblem(Problem problem, int num_blocks, int repeats, bool low_latency = false) {
  problem.low_latency = low_latency;
  const int num_ranks = problem.shape.num_ranks;
  std::mt19937 random(7);
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int rank = 0; rank < num_ranks; ++rank) ranks.push_back(std::make_unique<Rank>(problem, random));
  const auto comm = CpuCommunicator(problem.shape);
  Group group(problem.shape, num_blocks, 5.0 * kLonger, low_latency);
  const bool expert_major = problem.route.layout == Layout::kExpertMajor;
  int64_t run = 0;
  auto each = [&](auto make, auto check, const char* verb) {
    using Params = decltype(make(std::true_type(), *ranks[0]));
    std::vector<Params> on_cpu;
    for (int rank = 0; rank < num_ranks; ++rank) on_cpu.push_back(make(std::false_type(), *ranks[rank]));
    const auto check_where = std::string(problem.name) + (low_latency ? ", low latency, " : ", ") + verb;
    RunOnCpu(*comm, run++, on_cpu);
    for (int repeat = 0; repeat < repeats; ++repeat) {
      for (int rank = 0; rank < num_ranks; ++rank) group.Launch(rank, make(std::true_type(), *ranks[rank]));
    }
    group.Wait();
    for (int rank = 0; rank < num_ranks; ++rank) {
      Check(group.status(rank).failed == 0, check_where + ": ended as it should");
      check(*ranks[rank], check_where + ", rank " + std::to_string(rank) + ": ");
    }
  };
  each([&](auto device, Rank& rank) { return DispatchOf<device.value>(problem, rank); },
       [&](Rank& rank, const std::string& where) {
         CheckSame(rank.source, rank.source.bytes(), where + "source");
         CheckDestination(problem, rank, where + "destination");
         CheckSame(rank.weights, rank.weights.bytes(), where + "weights");
         if (!expert_major) CheckSame(rank.local_experts, rank.local_experts.bytes(), where + "local_experts");
         CheckSame(rank.group_sizes, rank.group_sizes.bytes(), where + "group_sizes");
         CheckSame(rank.num_rows, rank.num_rows.bytes(), where + "num_rows");
         CheckSame(rank.counts, rank.counts.bytes(), where + "counts");
         CheckSameRows(problem, rank.tokens, rank, false, where + "tokens");
       },
       "dispatch");
  if (failures > 0) return;
  for (const bool zero_rest : {false, true}) {
    each([&](auto device, Rank& rank) { return CachedDispatchOf<device.value>(problem, rank, false, zero_rest); },
         [&](Rank& rank, const std::string& where) {
           CheckSameRows(problem, rank.rows, rank, zero_rest, where + "rows");
         },
         "cached_dispatch");
  }
  if (problem.route.row_type == RowType::kInt32) return;  // integers are only dispatched
  if (expert_major) {
    each([&](auto device, Rank& rank) { return CachedDispatchOf<device.value>(problem, rank, true, true); },
         [&](Rank& rank, const std::string& where) {
           CheckSameRows(problem, rank.rows, rank, true, where + "scaled rows");
           CheckSame(rank.products, rank.products.bytes(), where + "products");
         },
         "scaling cached_dispatch");
  }
  for (const bool weighted : {false, true}) {
    if (weighted && !expert_major) continue;
    each([&](auto device, Rank& rank) { return CombineOf<device.value>(problem, rank, weighted, weighted, !weighted); },
         [&](Rank& rank, const std::string& where) {
           CheckSame(rank.out, rank.out.bytes(), where + "out");
           if (!weighted) CheckSame(rank.gradients, rank.gradients.bytes(), where + "gradients");
         },
         weighted ? "weighted combine" : "combine");
  }
}

void CheckConformance(int num_blocks) {
  constexpr auto kExpert = Layout::kExpertMajor, kToken = Layout::kTokenMajor;
  constexpr auto kF32 = RowType::kFloat32, kF16 = RowType::kFloat16, kBF16 = RowType::kBFloat16;
  constexpr auto kI32 = RowType::kInt32;
  std::vector<Problem> problems = {
      MakeProblem("one rank", 1, 4, 2, 9, 64, kF32, kExpert),
      MakeProblem("two ranks", 2, 8, 3, 40, 256, kBF16, kExpert),
      MakeProblem("four ranks", 4, 16, 4, 37, 640, kF16, kExpert),
      MakeProblem("four ranks, by token", 4, 16, 4, 37, 640, kF16, kToken),
      MakeProblem("odd rows", 3, 9, 4, 21, 37, kBF16, kExpert),
      MakeProblem("odd rows, by token", 3, 9, 4, 21, 37, kF32, kToken),
      MakeProblem("one element", 2, 4, 2, 5, 1, kBF16, kExpert),
      MakeProblem("long rows", 2, 4, 2, 9, 9000, kF32, kExpert),
      MakeProblem("aligned", 4, 16, 6, 50, 128, kF32, kExpert, 8),
      MakeProblem("capacity", 4, 16, 6, 50, 128, kBF16, kExpert, 4, 64),
      MakeProblem("both capacities", 4, 16, 6, 50, 128, kBF16, kExpert, 4, 64, 5),
      MakeProblem("capacity, by token", 4, 16, 6, 50, 128, kBF16, kToken, 4, 96),
      MakeProblem("no room", 2, 4, 2, 9, 32, kF32, kExpert, 1, 0),
      MakeProblem("no tokens", 3, 6, 2, 0, 64, kBF16, kExpert, 4),
      MakeProblem("one token", 4, 8, 2, 1, 128, kBF16, kExpert),
      MakeProblem("one expert each", 4, 4, 4, 30, 128, kBF16, kExpert),
      MakeProblem("one choice", 4, 32, 1, 70, 128, kF16, kExpert),
      MakeProblem("32 choices", 2, 64, 32, 20, 128, kBF16, kExpert),
      MakeProblem("many experts", 4, 512, 8, 60, 64, kF32, kExpert),
  };
  problems.push_back(MakeProblem("invalid entries", 3, 12, 5, 33, 64, kF32, kExpert));
  problems.back().invalid = true;
  problems.push_back(MakeProblem("all to one rank", 4, 16, 3, 64, 64, kBF16, kExpert));
  problems.back().skewed = true;
  problems.push_back(MakeProblem("nowhere", 2, 4, 2, 12, 64, kBF16, kExpert));
  problems.back().none = 1.0;
  for (const Layout layout : {kExpert, kToken}) {
    // Shorter than hidden_size float32, or slightly longer after rounding up to 16 bytes.
    problems.push_back(MakeProblem("integers", 4, 16, 6, 50, 640, kI32, layout, 4, 64));
    problems.back().route.row_size = 12;
    problems.push_back(MakeProblem("long integers", 3, 9, 4, 21, 37, kI32, layout));
    problems.back().route.row_size = 40;
  }
  for (const Problem& problem : problems) {
    for (const bool low_latency : {false, true}) CheckProblem(problem, num_blocks, 2, low_latency);
  }
}

// The largest group. With one block per rank: all blocks of all ranks must be resident.
void CheckLargest() {
  constexpr auto kExpert = Layout::kExpertMajor, kToken = Layout::kTokenMajor;
  for (const Problem& problem : {
           MakeProblem("2048 experts", 4, 2048, 8, 200, 64, RowType::kBFloat16, kExpert),
           // Counters fit for only a few of a block's warps.
           MakeProblem("8192 experts", 2, 8192, 8, 40, 64, RowType::kBFloat16, kExpert),
           MakeProblem("64 ranks", 64, 2048, 8, 40, 128, RowType::kBFloat16, kExpert, 4),
           MakeProblem("64 ranks, 32 choices", 64, 64, 32, 20, 72, RowType::kFloat32, kExpert),
           MakeProblem("64 ranks, by token", 64, 128, 32, 20, 128, RowType::kFloat16, kToken),
           MakeProblem("33 ranks, odd rows", 33, 66, 9, 15, 37, RowType::kBFloat16, kExpert),
       }) {
    for (const bool low_latency : {false, true}) CheckProblem(problem, 1, 2, low_latency);
  }
}

// Whether rows are as FillAsFailed leaves them.
bool AllFailed(const Problem& problem, Array& array) {
  const std::vector<char> bytes = array.FromDevice();
  if (problem.route.row_type == RowType::kInt32) {
    return std::all_of(bytes.begin(), bytes.end(), [](char byte) { return byte == '\xff'; });
  }
  const size_t count = bytes.size() / BytesOf(problem.route.row_type);
  for (size_t i = 0; i < count; ++i) {
    if (problem.route.row_type == RowType::kFloat32) {
      float value;
      std::memcpy(&value, &bytes[4 * i], 4);
      if (!std::isnan(value)) return false;
    } else {
      uint16_t value;
      std::memcpy(&value, &bytes[2 * i], 2);
      if ((value & 0x7f80) != 0x7f80 || (value & 0x7f) == 0) return false;
    }
  }
  return true;
}

// The last rank does not arrive, or arrives late; every op ends and reports it, and so do later ops.
void CheckFaults(int num_ranks, int num_blocks, bool late, bool low_latency) {
  const std::string name = std::to_string(num_ranks) + (low_latency ? " ranks, low latency, " : " ranks, ") +
                           (late ? "one rank is late: " : "one rank is missing: ");
  Problem problem = MakeProblem("faults", num_ranks, 2 * num_ranks, 2, 20, 128, RowType::kBFloat16,
                                      Layout::kExpertMajor);
  problem.low_latency = low_latency;
  const int last = num_ranks - 1;
  std::mt19937 random(3);
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int rank = 0; rank < num_ranks; ++rank) ranks.push_back(std::make_unique<Rank>(problem, random));
  Group group(problem.shape, num_blocks, 0.3 * kLonger, low_latency);
  for (int rank = 0; rank < num_ranks; ++rank) group.Launch(rank, DispatchOf<true>(problem, *ranks[rank]));
  group.Wait();
  for (int rank = 0; rank < num_ranks; ++rank) Check(group.status(rank).failed == 0, name + "the first op succeeds");
  if (late) {
    group.DelayRank(last, uint64_t{500'000'000} * kLonger);
    group.Launch(last, CombineOf<true>(problem, *ranks[last], true, true, false));
  }
  for (int rank = 0; rank < last; ++rank) group.Launch(rank, CombineOf<true>(problem, *ranks[rank], true, true, false));
  group.Wait();
  for (int rank = 0; rank < (late ? num_ranks : last); ++rank) {
    const HostStatus& status = group.status(rank);
    Check(status.failed == 1, name + "the op fails");
    Check(status.report.failure == Failure::kNotArrived, name + "because a rank did not arrive");
    Check(status.report.missing == uint64_t{1} << last, name + "the last rank is missing");
    Check(status.report.step == 2 && status.report.seen[last] == 1, name + "steps");
    Check(static_cast<int>(status.reporter) < last, name + "a rank that waited reports");
    Check(AllFailed(problem, ranks[rank]->out), name + "results are NaN");
  }
  // Later ops end at once, whichever ranks arrive.
  const auto before = std::chrono::steady_clock::now();
  for (int rank = 0; rank < last; ++rank) group.Launch(rank, DispatchOf<true>(problem, *ranks[rank]));
  group.Wait();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - before;
  Check(took.count() < 0.25 * kLonger, name + "later ops end at once");
  for (int rank = 0; rank < last; ++rank) {
    Check(AllFailed(problem, ranks[rank]->tokens), name + "their results are NaN");
    Check(*reinterpret_cast<const int32_t*>(ranks[rank]->counts.FromDevice().data()) == 0, name + "their counts are 0");
  }
  // So do those with integers, into the same bytes.
  Problem integers = problem;
  integers.route.row_type = RowType::kInt32;
  integers.route.row_size = problem.route.row_size / 2;
  for (int rank = 0; rank < last; ++rank) group.Launch(rank, DispatchOf<true>(integers, *ranks[rank]));
  group.Wait();
  for (int rank = 0; rank < last; ++rank) {
    Check(AllFailed(integers, ranks[rank]->tokens), name + "integers have all bits set");
  }
  // The device still works.
  CheckProblem(MakeProblem("after a fault", 2, 8, 3, 40, 256, RowType::kBFloat16, Layout::kExpertMajor), num_blocks, 1,
               low_latency);
}

// How an op that cannot succeed ends: soon, and on all ranks that arrived.
void CheckEnds(Group& group, const Problem& problem, std::vector<std::unique_ptr<Rank>>& ranks, int num_arrived,
               Failure failure, int reporter, double seconds, const std::string& name) {
  const auto before = std::chrono::steady_clock::now();
  group.Wait();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - before;
  Check(took.count() < seconds, name + ": takes " + std::to_string(took.count()) + " s");
  for (int rank = 0; rank < num_arrived; ++rank) {
    Check(group.status(rank).failed == 1, name + ": fails");
    Check(group.status(rank).report.failure == failure, name + ": has its own failure code");
    Check(reporter == kNone || static_cast<int>(group.status(rank).reporter) == reporter, name + ": is reported by one rank");
    Check(AllFailed(problem, ranks[rank]->tokens), name + ": results are NaN");
  }
}

// Ops that cannot succeed: all end at once, although the timeout is long and, in some, a rank never arrives.
void CheckMistakes(int num_blocks, bool low_latency) {
  constexpr double kTimeout = 60 * kLonger, kAtOnce = 5 * kLonger;
  Problem problem = MakeProblem("mistakes", 3, 6, 2, 20, 128, RowType::kBFloat16, Layout::kExpertMajor);
  problem.low_latency = low_latency;
  std::mt19937 random(3);
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int rank = 0; rank < 3; ++rank) ranks.push_back(std::make_unique<Rank>(problem, random));
  const auto dispatch = [&](Group& group, int rank, cudaStream_t stream = nullptr) {
    group.Launch(rank, DispatchOf<true>(problem, *ranks[rank]), stream);
  };
  {
    Group group(problem.shape, num_blocks, kTimeout, low_latency);
    dispatch(group, 0);
    Problem shorter = problem;
    shorter.route.capacity -= 8;
    group.Launch(1, DispatchOf<true>(shorter, *ranks[1]));
    group.Wait();
    for (int rank = 0; rank < 2; ++rank) {
      const FailureReport& report = group.status(rank).report;
      Check(group.status(rank).failed == 1 && report.failure == Failure::kDifferentOps, "different ops are detected");
      Check(report.other_rank == 1 - static_cast<int>(group.status(rank).reporter), "and whose they are");
      const int64_t difference = report.op.capacity - report.other_op.capacity;
      Check(difference == (report.other_rank == 1 ? 8 : -8), "and where they differ");
    }
  }
  {
    Group group(problem.shape, num_blocks, kTimeout, low_latency);
    dispatch(group, 0);
    group.Take(!low_latency);
    dispatch(group, 1);
    group.Wait();
    for (int rank = 0; rank < 2; ++rank) {
      const FailureReport& report = group.status(rank).report;
      Check(group.status(rank).failed == 1 && report.failure == Failure::kDifferentOps, "different modes are detected");
      const int64_t difference = report.op.flags ^ report.other_op.flags;
      Check(difference == OpSignature::kLowLatency, "and reported");
    }
  }
  {
    Group group(problem.shape, num_blocks, kTimeout, low_latency);
    group.TakeFor(1, 0);
    for (int rank = 0; rank < 3; ++rank) dispatch(group, rank);
    CheckEnds(group, problem, ranks, 3, Failure::kWrongRank, 1, kAtOnce, "a device run as another rank");
  }
  {
    Group group(problem.shape, num_blocks, kTimeout, low_latency);
    dispatch(group, 0);
    dispatch(group, 1);
    group.Abort(2);
    CheckEnds(group, problem, ranks, 2, Failure::kNotLaunched, 2, kAtOnce, "an op that is not launched");
    dispatch(group, 2);
    CheckEnds(group, problem, ranks, 3, Failure::kNotLaunched, 2, kAtOnce, "the op after one that is not launched");
  }
  {
    Group group(problem.shape, num_blocks, kTimeout, low_latency);
    cudaStream_t concurrent;
    CheckCuda(cudaStreamCreateWithFlags(&concurrent, cudaStreamNonBlocking), "stream");
    dispatch(group, 0);
    dispatch(group, 1);
    dispatch(group, 0, concurrent);
    CheckEnds(group, problem, ranks, 2, Failure::kTwoAtOnce, 0, kAtOnce, "two ops at once");
    dispatch(group, 2);
    CheckEnds(group, problem, ranks, 3, Failure::kTwoAtOnce, 0, kAtOnce, "a rank that arrives after two ops at once");
    cudaStreamDestroy(concurrent);
  }
}

__global__ void MeetKernel(const __grid_constant__ OpFrame frame) {
  __shared__ GroupOp::Shared shared;
  GroupOp group(frame, &shared);
  if (group.Begin()) group.SyncGrid();
}

// Blocks that do not all find an SM. Cooperative launches prevent that; the wait of blocks for each other ends even so.
void CheckNoRoom() {
  GroupShape shape;
  shape.num_ranks = 1;
  shape.num_experts = 1;
  shape.num_topk = 1;
  Group group(shape, 1, 0.3);
  int num_sms = 0;
  CheckCuda(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, 0), "attribute");
  cudaStream_t concurrent;
  CheckCuda(cudaStreamCreateWithFlags(&concurrent, cudaStreamNonBlocking), "stream");
  int almost_an_sm = 0;  // of shared memory
  CheckCuda(cudaDeviceGetAttribute(&almost_an_sm, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), "attribute");
  almost_an_sm -= kStaticSharedBytes;
  for (auto* kernel : {reinterpret_cast<const void*>(Delay), reinterpret_cast<const void*>(MeetKernel)}) {
    CheckCuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, almost_an_sm), "attribute");
  }
  LaunchDelay(1'500'000'000, concurrent, num_sms - 1, almost_an_sm);
  // Not as a cooperative launch, which would be rejected.
  OpFrame frame = group.FrameOf(0);
  void* arguments[] = {&frame};
  CheckCuda(cudaLaunchKernel(reinterpret_cast<const void*>(MeetKernel), dim3(2), dim3(32), arguments, almost_an_sm,
                             group.stream(0)),
            "launch");
  group.Wait();
  Check(group.status(0).failed == 1 && group.status(0).report.failure == Failure::kNoRoom, "no SM for a block");
  cudaStreamDestroy(concurrent);
}

// Many pairs of ops that begin at once, at all distances: each pair succeeds, one after the other, or fails.
void CheckTwoAtOnce(int num_blocks, int tries, bool low_latency) {
  Problem problem = MakeProblem("two at once", 2, 4, 2, 20, 128, RowType::kBFloat16, Layout::kExpertMajor);
  problem.low_latency = low_latency;
  std::mt19937 random(5);
  std::vector<std::unique_ptr<Rank>> ranks, others;
  for (int rank = 0; rank < 2; ++rank) ranks.push_back(std::make_unique<Rank>(problem, random));
  for (int rank = 0; rank < 2; ++rank) others.push_back(std::make_unique<Rank>(problem, random));
  const auto comm = CpuCommunicator(problem.shape);
  for (auto* each : {&ranks, &others}) {
    std::vector<DispatchParams> on_cpu;
    for (auto& rank : *each) on_cpu.push_back(DispatchOf<false>(problem, *rank));
    RunOnCpu(*comm, each == &ranks ? 0 : 1, on_cpu);
  }
  cudaStream_t concurrent[2];
  for (cudaStream_t& stream : concurrent) CheckCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  int num_failed = 0;
  for (int i = 0; i < tries; ++i) {
    Group group(problem.shape, num_blocks, 5.0 * kLonger, low_latency);
    const uint64_t delay = random() % 60'000 * kOpsTakeLonger;
    for (auto* each : {&ranks, &others}) {
      for (auto& rank : *each) {
        CheckCuda(cudaMemset(rank->tokens.device<void>(), 0x55, rank->tokens.bytes()), "cudaMemset");
      }
    }
    for (int rank = 0; rank < 2; ++rank) {
      group.Launch(rank, DispatchOf<true>(problem, *ranks[rank]));
      LaunchDelay(delay, concurrent[rank]);
      group.Launch(rank, DispatchOf<true>(problem, *others[rank]), concurrent[rank]);
    }
    group.Wait();
    for (int rank = 0; rank < 2; ++rank) {
      const bool failed = group.status(rank).failed == 1;
      num_failed += failed;
      for (Rank* each : {ranks[rank].get(), others[rank].get()}) {
        if (failed && AllFailed(problem, each->tokens)) continue;
        CheckSameRows(problem, each->tokens, *each, false, "two at once, " + std::to_string(i));
      }
    }
  }
  std::printf("two at once: %d of %d ranks failed\n", num_failed, 2 * tries);
  for (cudaStream_t stream : concurrent) cudaStreamDestroy(stream);
}

// Many steps with random routing and random delays of single ranks: every byte as on the CPU.
void CheckSoak(int num_blocks, int steps) {
  constexpr int num_ranks = 8;
  Problem problem = MakeProblem("soak", num_ranks, 32, 4, 24, 256, RowType::kBFloat16, Layout::kExpertMajor);
  std::mt19937 random(11);
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int rank = 0; rank < num_ranks; ++rank) ranks.push_back(std::make_unique<Rank>(problem, random));
  const auto comm = CpuCommunicator(problem.shape);
  Group group(problem.shape, num_blocks, 5.0 * kLonger);
  for (int step = 0; step < steps && failures == 0; ++step) {
    problem.low_latency = random() % 2 == 0;  // each mode follows either
    group.Take(problem.low_latency);
    std::vector<DispatchParams> dispatches;
    std::vector<CombineParams> combines;
    for (auto& rank : ranks) {
      rank->Route(problem, random);
      rank->topk_idx.ToDevice();
      rank->topk_weights.ToDevice();
      dispatches.push_back(DispatchOf<false>(problem, *rank));
      combines.push_back(CombineOf<false>(problem, *rank, true, true, false));
    }
    RunOnCpu(*comm, 2 * step, dispatches);
    RunOnCpu(*comm, 2 * step + 1, combines);
    // One op of all ranks after the other: streams share queues of the GPU, and a rank's second op, which waits for its
    // first, would hold up the first of another rank.
    for (int rank = 0; rank < num_ranks; ++rank) {
      if (random() % 4 == 0) group.DelayRank(rank, random() % 200'000 * kOpsTakeLonger);
      group.Launch(rank, DispatchOf<true>(problem, *ranks[rank]));
    }
    for (int rank = 0; rank < num_ranks; ++rank) {
      if (random() % 4 == 0) group.DelayRank(rank, random() % 200'000 * kOpsTakeLonger);
      group.Launch(rank, CombineOf<true>(problem, *ranks[rank], true, true, false));
    }
    group.Wait();
    for (int rank = 0; rank < num_ranks; ++rank) {
      const std::string where = "soak, step " + std::to_string(step) + ", rank " + std::to_string(rank);
      Check(group.status(rank).failed == 0, where + " ended as it should");
      CheckSameRows(problem, ranks[rank]->tokens, *ranks[rank], false, where + ", tokens");
      CheckSame(ranks[rank]->out, ranks[rank]->out.bytes(), where + ", out");
    }
  }
}

}  // namespace
}  // namespace jax_deepep

int main(int argc, char** argv) {
  using namespace jax_deepep;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  for (int i = 1; i < argc; ++i) {
    const std::string what = argv[i];
    if (what == "conformance") {
      for (const int num_blocks : {1, 3, 8}) CheckConformance(num_blocks);
      CheckLargest();
    } else if (what == "short") {
      CheckConformance(2);
    } else if (what == "faults") {
      for (const bool late : {false, true}) {
        for (const bool low_latency : {false, true}) {
          CheckFaults(3, 2, late, low_latency);
          CheckFaults(kOnGpu ? 40 : 8, 1, late, low_latency);
        }
      }
      if (kOnGpu) CheckNoRoom();
      for (const bool low_latency : {false, true}) {
        CheckMistakes(2, low_latency);
        CheckTwoAtOnce(3, kOnGpu ? 200 : 10, low_latency);
      }
    } else if (what == "soak" && i + 1 < argc) {
      CheckSoak(3, std::atoi(argv[++i]));
    } else {
      std::printf("unknown: %s\n", what.c_str());
      return 2;
    }
    std::printf("%s: %d failures\n", what.c_str(), failures);
  }
  return failures == 0 ? 0 : 1;
}
