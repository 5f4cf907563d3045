// The ranks of cuda_ranks.cu: launches of their ops, and the comparison of a problem's results with
// the CPU's bits.
#ifndef JAX_DEEPEP_TESTS_GPU_RANK_GROUP_CUH_
#define JAX_DEEPEP_TESTS_GPU_RANK_GROUP_CUH_

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/communicator.h"
#include "cpu/op.h"
#include "cuda/block_count.h"
#include "cuda/kernel_launch.h"
#include "cuda/kernels.h"
#include "cuda/memory_order.cuh"
#include "cuda/rank_kernels.h"
#include "cuda/remote_transport.h"
#include "cuda/row_values.cuh"
#include "interface/op_signature.h"
#include "rank_arrays.cuh"
#include "routing/group_rows.h"
#include "simulated_network.h"

namespace jax_deepep {
namespace {

// Kernels may run on CPUs instead, where everything is slower: see tests/native/cuda_on_cpu.
#ifdef __CUDACC__
constexpr bool kOnGpu = true;
#else
constexpr bool kOnGpu = false;
#endif
constexpr int kLonger = kOnGpu ? 1 : 10;  // factor for time limits
constexpr int kOpsTakeLonger = kOnGpu ? 1 : 500;
constexpr int kMostSms = 130;  // of an op that has a GPU

__global__ void Delay(uint64_t nanoseconds) {
  const uint64_t start = NanosecondClock();
  while (NanosecondClock() - start < nanoseconds) {
  }
}

// With shared memory, to keep other blocks off the SM.
void LaunchDelay(uint64_t nanoseconds, cudaStream_t stream, int num_blocks = 1,
                 int shared_bytes = 0) {
  const char* error = LaunchKernel(Delay, nanoseconds, num_blocks, 1, shared_bytes, stream);
  Check(error == nullptr, std::string("launch: ") + (error ? error : ""));
}

struct Memory {
  char* data;
  int64_t bytes;
};
__global__ void Overwrite(Memory memory) { FillWithOnes(memory.data, memory.bytes); }

// The most bytes for rows in a slot of staging; 0: as many as communicators have.
int64_t most_staged_bytes = 0;

// The fewest tokens of a part that is encoded while peers read.
int32_t least_part_tokens = TokenParts::kLeastTokens;

// All ranks of one EP group: on one device, or on a device each.
class Group {
 public:
  // With windows for all tokens, so that ops may take either mode. num_blocks 0: chosen per op, as
  // if it had the GPU.
  Group(const GroupShape& shape, int num_blocks, double timeout_s, bool low_latency = false,
        bool device_each = false)
      : num_blocks_(num_blocks), low_latency_(low_latency), device_each_(device_each) {
    // Rows of float32 as well.
    const WindowSize size{shape.max_tokens, std::max(4 * shape.hidden_size, 48)};
    const StagingLayout staging(shape, kPutsAreAsynchronous, most_staged_bytes);
    auto control_bytes = static_cast<int64_t>(ControlBytes(shape));
    for (const KernelSet* kernels : KernelsFor(shape, size))
      control_bytes += kernels->window_bytes(shape, size);
    int shared_bytes = 0;
    CheckCuda(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0),
              "attribute");
    facts_.shared_bytes = shared_bytes - kStaticSharedBytes;
    for (int rank = 0; rank < shape.num_ranks; ++rank) {
      OnDeviceOf(rank);
      if (device_each || rank == 0) {
        for (auto* load :
             {LoadRankKernels, MappedTransport().load, KernelsOf(Mode::kThroughput, shape).load,
              KernelsOf(Mode::kLowLatency, shape).load}) {
          const char* error = load(facts_.shared_bytes);
          Check(error == nullptr, std::string("kernels load: ") + (error ? error : ""));
        }
      }
      controls_.push_back(std::make_unique<Array>(control_bytes));
      network_.Register(rank, controls_.back()->device<char>(), control_bytes);
      CheckCuda(cudaMemset(controls_.back()->device<void>(), 0, control_bytes), "cudaMemset");
      operands_.push_back(std::make_unique<Array>(4));
      *operands_.back()->host<int32_t>() = rank;
      operands_.back()->ToDevice();
      streams_.emplace_back();
      CheckCuda(cudaStreamCreateWithFlags(&streams_.back(), cudaStreamNonBlocking), "stream");
      statuses_.emplace_back();
      CheckCuda(cudaHostAlloc(reinterpret_cast<void**>(&statuses_.back()), sizeof(HostStatus),
                              cudaHostAllocPortable),
                "host");
      *statuses_.back() = HostStatus{};
    }
    RemoteRoute route = {};  // as puts of NVSHMEM take it, where that is simulated
    for (int rank = 0; rank < shape.num_ranks; ++rank) {
      OpFrame frame;
      frame.shape = shape;
      frame.window = size;
      frame.staging = staging;
      frame.least_part_tokens = least_part_tokens;
      frame.rank = rank;
      frame.timeout_ns = static_cast<uint64_t>(timeout_s * 1e9);
      frame.expected_rank = operands_[rank]->device<int32_t>();
      frame.status = statuses_[rank];
      for (int peer = 0; peer < shape.num_ranks; ++peer) {
        const bool of_node = frame.NodeOf(peer) == frame.NodeOf(rank);
        if (!of_node && frame.RankOnNode(frame.NodeOf(peer)) != peer) continue;
        route.processes[frame.NodeOf(peer)] = peer;
        if (of_node || !kPutsAreAsynchronous) {
          frame.control[peer] = controls_[peer]->device<DeviceControl>();
        }
      }
      route.processes[frame.NodeOf(rank)] = rank;
      route.memory = controls_[rank]->device<char>();
      route.signals = rank % 2 == 0;
      CheckCuda(
          cudaMemcpy(&frame.control[rank]->route, &route, sizeof(route), cudaMemcpyHostToDevice),
          "cudaMemcpy");
      frames_.push_back(frame);
    }
    // Loaded here: a kernel that is loaded while ranks wait for each other may wait for them.
    for (int rank = 0; rank < shape.num_ranks; ++rank) DelayRank(rank, 0);
    Wait();
  }
  ~Group() {
    for (cudaStream_t stream : streams_) cudaStreamDestroy(stream);
    for (HostStatus* status : statuses_) cudaFreeHost(status);
  }

  template <typename Params>
  void Launch(int rank, const Params& params, cudaStream_t stream = nullptr, int channel = 0,
              Part part = Part::kWhole) {
    OpFrame frame = FrameOf(rank);
    frame.channel = channel;
    frame.part = part;
    frame.op = SignatureOf(params, stream != nullptr);  // an op on another stream is another call
    const KernelSet& kernels =
        KernelsOf(low_latency_ ? Mode::kLowLatency : Mode::kThroughput, frame.shape);
    frame.op.flags |= kernels.flags;
    frame.op_hash = frame.op.Hash();
    const auto launch = kernels.LaunchOf<Params>();
    const int num_blocks =
        num_blocks_ > 0 ? num_blocks_ : kernels.num_blocks(BytesOf(frame.shape, params), kMostSms);
    OnDeviceOf(rank);
    const char* error = launch(frame, params, num_blocks, facts_, stream ? stream : streams_[rank]);
    Check(error == nullptr, std::string("launch: ") + (error ? error : ""));
  }
  void Abort(int rank) {
    const auto abort = frames_[rank].shape.num_nodes() > 1 ? MappedTransport().abort : &LaunchAbort;
    const char* error = abort(frames_[rank], Failure::kNotLaunched, streams_[rank]);
    Check(error == nullptr, std::string("launch: ") + (error ? error : ""));
  }
  void DelayRank(int rank, uint64_t nanoseconds) {
    OnDeviceOf(rank);
    LaunchDelay(nanoseconds, streams_[rank]);
  }

  // Let a rank's next op find no results of the last one in scratch, where peers might take them
  // for its own.
  void FillScratch(int rank, const Rank& of_rank) {
    OnDeviceOf(rank);
    for (const Array* array : {&of_rank.scratch, &of_rank.sums, &of_rank.encoded}) {
      Memory memory = {array->device<char>(), static_cast<int64_t>(array->bytes())};
      const char* error = LaunchKernel(Overwrite, memory, 1, kThreads, 0, streams_[rank]);
      Check(error == nullptr, std::string("launch: ") + (error ? error : ""));
    }
  }

  // Make its device the current one.
  void OnDeviceOf(int rank) const {
    if (device_each_) CheckCuda(cudaSetDevice(rank), "cudaSetDevice");
  }

  // Run later ops in this mode.
  void Take(bool low_latency) { low_latency_ = low_latency; }

  // Let a rank sum its pairs in larger parts than its peers, to whom it signals fewer.
  void TakeLargerParts(int rank) { frames_[rank].least_part_tokens = 8 * least_part_tokens; }

  // Let the program run a rank as another one.
  void TakeFor(int rank, int32_t expected) {
    *operands_[rank]->host<int32_t>() = expected;
    operands_[rank]->ToDevice();
  }

  OpFrame FrameOf(int rank) {
    OpFrame frame = frames_[rank];
    frame.mark = MarkOf(++num_launches_);
    return frame;
  }
  cudaStream_t stream(int rank) const { return streams_[rank]; }

  void Wait() {
    for (int rank = 0; rank < static_cast<int>(streams_.size()); ++rank) {
      OnDeviceOf(rank);
      if (device_each_ || rank == 0) CheckCuda(cudaDeviceSynchronize(), "the ops of all ranks");
    }
  }
  HostStatus& status(int rank) { return *statuses_[rank]; }
  // What a rank has counted on a channel, and when nothing runs.
  Channel Counters(int rank, int channel = 0) const {
    const std::vector<char> bytes = controls_[rank]->FromDevice();
    return reinterpret_cast<const DeviceControl*>(bytes.data())->channels[channel];
  }

 private:
  int num_blocks_;
  bool low_latency_;
  bool device_each_;
  uint64_t num_launches_ = 0;
  DeviceFacts facts_;
  std::vector<std::unique_ptr<Array>> controls_, operands_;
  std::vector<cudaStream_t> streams_;
  std::vector<HostStatus*> statuses_;
  std::vector<OpFrame> frames_;
  SimulatedNetwork network_;  // the last: what is on its way arrives before memory is freed
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

void CheckSame(Array& array, size_t bytes, const std::string& what, size_t begin = 0) {
  const std::vector<char> got = array.FromDevice();
  const char* expected = array.host<char>();
  for (size_t i = begin; i < begin + bytes; ++i) {
    if (got[i] == expected[i]) continue;
    Check(false, what + ": byte " + std::to_string(i) + " of " + std::to_string(bytes));
    return;
  }
}

// Rows of tokens and padding; the contents of the others are unspecified.
void CheckSameRows(const Problem& problem, Array& array, Rank& rank, bool all,
                   const std::string& what) {
  int64_t end = 0;
  for (int group = 0; group < NumRowGroups(problem.shape, problem.route); ++group) {
    end += rank.group_sizes.host<int32_t>()[group];
  }
  if (all) end = problem.route.capacity;
  ForReceived(problem,
              [&](int64_t at, int64_t row_bytes) { CheckSame(array, end * row_bytes, what, at); });
}

// Every row that a rank has received was sent by the rank where it was.
void CheckTraffic(const Group& group, int num_ranks, const std::string& name) {
  for (int channel = 0; channel < kNumChannels; ++channel) {
    std::vector<Channel> of;
    for (int rank = 0; rank < num_ranks; ++rank) of.push_back(group.Counters(rank, channel));
    for (int from = 0; from < num_ranks; ++from) {
      for (int to = 0; to < num_ranks; ++to) {
        const uint64_t sent = of[from].rows_pushed[to] + of[from].rows_taken[to];
        const uint64_t received = of[to].rows_received[from] + of[to].rows_pulled[from];
        Check(sent == received, name + ": " + std::to_string(sent) + " rows sent, " +
                                    std::to_string(received) + " received");
      }
    }
  }
}

// In low-latency mode, only the rank of each expert matters.
void CheckDestination(const Problem& problem, Rank& rank, const std::string& what) {
  if (!problem.low_latency) return CheckSame(rank.destination, rank.destination.bytes(), what);
  const std::vector<char> got = rank.destination.FromDevice();
  const int num_topk = problem.shape.num_topk;
  for (int64_t i = 0; i < int64_t{problem.route.num_tokens} * num_topk; ++i) {
    const int32_t* experts = rank.topk_idx.host<int32_t>() + i / num_topk * num_topk;
    const bool valid = IsValidEntry(experts, i % num_topk, problem.shape.num_experts);
    const int32_t expected =
        valid ? experts[i % num_topk] / problem.shape.num_local_experts() : kNone;
    if (reinterpret_cast<const int32_t*>(got.data())[i] != expected) return Check(false, what);
  }
}

void CheckProblem(Problem problem, int num_blocks, int repeats, bool low_latency = false) {
  problem.low_latency = low_latency;
  const int num_ranks = problem.shape.num_ranks;
  std::mt19937 random(7);
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int rank = 0; rank < num_ranks; ++rank)
    ranks.push_back(std::make_unique<Rank>(problem, random));
  const auto comm = CpuCommunicator(problem.shape);
  Group group(problem.shape, num_blocks, 5.0 * kLonger, low_latency);
  const bool expert_major = problem.route.layout == Layout::kExpertMajor;
  int64_t run = 0;
  auto each = [&](auto make, auto check, const char* verb) {
    using Params = decltype(make(std::true_type(), *ranks[0]));
    std::vector<Params> on_cpu;
    for (int rank = 0; rank < num_ranks; ++rank)
      on_cpu.push_back(make(std::false_type(), *ranks[rank]));
    const auto check_where =
        std::string(problem.name) + (low_latency ? ", low latency, " : ", ") + verb;
    RunOnCpu(*comm, run++, on_cpu);
    for (int repeat = 0; repeat < repeats; ++repeat) {
      for (int rank = 0; rank < num_ranks; ++rank) {
        group.FillScratch(rank, *ranks[rank]);
        group.Launch(rank, make(std::true_type(), *ranks[rank]));
      }
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
         if (!expert_major)
           CheckSame(rank.local_experts, rank.local_experts.bytes(), where + "local_experts");
         CheckSame(rank.group_sizes, rank.group_sizes.bytes(), where + "group_sizes");
         CheckSame(rank.num_rows, rank.num_rows.bytes(), where + "num_rows");
         CheckSame(rank.counts, rank.counts.bytes(), where + "counts");
         CheckSameRows(problem, rank.tokens, rank, false, where + "tokens");
       },
       "dispatch");
  if (failures > 0) return;
  for (const bool zero_rest : {false, true}) {
    if (zero_rest && problem.route.keeps_quantized) continue;
    each(
        [&](auto device, Rank& rank) {
          return CachedDispatchOf<device.value>(problem, rank, false, zero_rest);
        },
        [&](Rank& rank, const std::string& where) {
          CheckSameRows(problem, rank.rows, rank, zero_rest, where + "rows");
        },
        "cached_dispatch");
  }
  if (problem.route.row_type == RowType::kInt32 || problem.route.keeps_quantized)
    return;  // integers and encoded rows are only dispatched
  if (expert_major) {
    each([&](auto device,
             Rank& rank) { return CachedDispatchOf<device.value>(problem, rank, true, true); },
         [&](Rank& rank, const std::string& where) {
           CheckSameRows(problem, rank.rows, rank, true, where + "scaled rows");
           CheckSame(rank.products, rank.products.bytes(), where + "products");
         },
         "scaling cached_dispatch");
  }
  for (const bool weighted : {false, true}) {
    if (weighted && !expert_major) continue;
    each(
        [&](auto device, Rank& rank) {
          return CombineOf<device.value>(problem, rank, weighted, weighted, !weighted);
        },
        [&](Rank& rank, const std::string& where) {
          CheckSame(rank.out, rank.out.bytes(), where + "out");
          if (!weighted) CheckSame(rank.gradients, rank.gradients.bytes(), where + "gradients");
        },
        weighted ? "weighted combine" : "combine");
  }
}

}  // namespace
}  // namespace jax_deepep

#endif  // JAX_DEEPEP_TESTS_GPU_RANK_GROUP_CUH_
