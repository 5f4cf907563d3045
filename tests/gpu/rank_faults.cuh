// Ranks of cuda_ranks.cu that arrive late, never, at another op, or twice: how ops end then.
#ifndef JAX_DEEPEP_TESTS_GPU_RANK_FAULTS_CUH_
#define JAX_DEEPEP_TESTS_GPU_RANK_FAULTS_CUH_

#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/group_op.cuh"
#include "rank_group.cuh"

namespace jax_deepep {
namespace {

// Whether rows are as FillAsFailed leaves them.
bool AllFailed(const Problem& problem, Array& array) {
  const std::vector<char> bytes = array.FromDevice();
  if (problem.route.row_type == RowType::kInt32 || problem.route.keeps_quantized) {
    bool all = true;
    ForReceived(problem, [&](int64_t at, int64_t row_bytes) {
      const char* begin = bytes.data() + at;
      all = all && std::all_of(begin, begin + problem.route.capacity * row_bytes,
                               [](char byte) { return byte == '\xff'; });
    });
    return all;
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

// The last rank does not arrive, or arrives late; every op ends and reports it, and so do later
// ops.
void CheckFaults(int num_ranks, int num_blocks, bool late, bool low_latency,
                 int ranks_per_node = 0) {
  const std::string name =
      std::to_string(num_ranks) + (low_latency ? " ranks, low latency, " : " ranks, ") +
      (ranks_per_node > 0 ? std::to_string(ranks_per_node) + " per node, " : "") +
      (late ? "one rank is late: " : "one rank is missing: ");
  Problem problem = MakeProblem("faults", num_ranks, 2 * num_ranks, 2, 20, 128, RowType::kBFloat16,
                                Layout::kExpertMajor);
  problem.shape.ranks_per_node = ranks_per_node;
  problem.low_latency = low_latency;
  const int last = num_ranks - 1;
  std::mt19937 random(3);
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int rank = 0; rank < num_ranks; ++rank)
    ranks.push_back(std::make_unique<Rank>(problem, random));
  Group group(problem.shape, num_blocks, 0.3 * kLonger, low_latency);
  for (int rank = 0; rank < num_ranks; ++rank)
    group.Launch(rank, DispatchOf<true>(problem, *ranks[rank]));
  group.Wait();
  for (int rank = 0; rank < num_ranks; ++rank)
    Check(group.status(rank).failed == 0, name + "the first op succeeds");
  if (late) {
    group.DelayRank(last, uint64_t{500'000'000} * kLonger);
    group.Launch(last, CombineOf<true>(problem, *ranks[last], true, true, false));
  }
  for (int rank = 0; rank < last; ++rank)
    group.Launch(rank, CombineOf<true>(problem, *ranks[rank], true, true, false));
  group.Wait();
  for (int rank = 0; rank < (late ? num_ranks : last); ++rank) {
    const HostStatus& status = group.status(rank);
    Check(status.failed == 1, name + "the op fails");
    Check(status.report.failure == Failure::kNotArrived, name + "because a rank did not arrive");
    Check(status.report.missing.Has(last) && !status.report.missing.Has(0),
          name + "the last rank is missing");
    Check(status.report.step == 2 && status.report.seen[last] == 1, name + "steps");
    Check(static_cast<int>(status.reporter) < last, name + "a rank that waited reports");
    Check(AllFailed(problem, ranks[rank]->out), name + "results are NaN");
  }
  // Later ops end at once, whichever ranks arrive.
  const auto before = std::chrono::steady_clock::now();
  for (int rank = 0; rank < last; ++rank)
    group.Launch(rank, DispatchOf<true>(problem, *ranks[rank]));
  group.Wait();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - before;
  Check(took.count() < 0.25 * kLonger, name + "later ops end at once");
  for (int rank = 0; rank < last; ++rank) {
    Check(AllFailed(problem, ranks[rank]->tokens), name + "their results are NaN");
    Check(*reinterpret_cast<const int32_t*>(ranks[rank]->counts.FromDevice().data()) == 0,
          name + "their counts are 0");
  }
  // So do those with integers, into the same bytes.
  Problem integers = problem;
  integers.route.row_type = RowType::kInt32;
  integers.route.row_size = problem.route.row_size / 2;
  for (int rank = 0; rank < last; ++rank)
    group.Launch(rank, DispatchOf<true>(integers, *ranks[rank]));
  group.Wait();
  for (int rank = 0; rank < last; ++rank) {
    Check(AllFailed(integers, ranks[rank]->tokens), name + "integers have all bits set");
  }
  // And those that stay encoded.
  Problem kept = problem;
  kept.route.row_size = 106;  // parts of rows, and ends of arrays, anywhere
  kept.route.wire = WireFormat::kNvfp4;
  kept.route.keeps_quantized = true;
  for (int rank = 0; rank < last; ++rank) {
    Array& tokens = ranks[rank]->tokens;
    CheckCuda(cudaMemset(tokens.device<void>(), 0x55, tokens.bytes()), "cudaMemset");
  }
  CheckCuda(cudaDeviceSynchronize(), "cudaMemset");  // no stream of a rank waits for it
  for (int rank = 0; rank < last; ++rank) group.Launch(rank, DispatchOf<true>(kept, *ranks[rank]));
  group.Wait();
  for (int rank = 0; rank < last; ++rank) {
    Check(AllFailed(kept, ranks[rank]->tokens), name + "encoded rows have all bits set");
  }
  // The device still works.
  CheckProblem(
      MakeProblem("after a fault", 2, 8, 3, 40, 256, RowType::kBFloat16, Layout::kExpertMajor),
      num_blocks, 1, low_latency);
}

// How an op that cannot succeed ends: soon, and on all ranks that arrived.
void CheckEnds(Group& group, const Problem& problem, std::vector<std::unique_ptr<Rank>>& ranks,
               int num_arrived, Failure failure, int reporter, double seconds,
               const std::string& name) {
  const auto before = std::chrono::steady_clock::now();
  group.Wait();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - before;
  Check(took.count() < seconds, name + ": takes " + std::to_string(took.count()) + " s");
  for (int rank = 0; rank < num_arrived; ++rank) {
    Check(group.status(rank).failed == 1, name + ": fails");
    Check(group.status(rank).report.failure == failure, name + ": has its own failure code");
    Check(reporter == kNone || static_cast<int>(group.status(rank).reporter) == reporter,
          name + ": is reported by one rank");
    Check(AllFailed(problem, ranks[rank]->tokens), name + ": results are NaN");
  }
}

// Ops that cannot succeed: all end at once, although the timeout is long and, in some, a rank never
// arrives.
void CheckMistakes(int num_blocks, bool low_latency, int ranks_per_node = 0) {
  constexpr double kTimeout = 60 * kLonger, kAtOnce = 5 * kLonger;
  Problem problem =
      MakeProblem("mistakes", 3, 6, 2, 20, 128, RowType::kBFloat16, Layout::kExpertMajor);
  problem.shape.ranks_per_node = ranks_per_node;
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
      Check(group.status(rank).failed == 1 && report.failure == Failure::kDifferentOps,
            "different ops are detected");
      Check(report.other_rank == 1 - static_cast<int>(group.status(rank).reporter),
            "and whose they are");
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
      Check(group.status(rank).failed == 1 && report.failure == Failure::kDifferentOps,
            "different modes are detected");
      const int64_t difference = report.op.flags ^ report.other_op.flags;
      Check(difference == OpSignature::kLowLatency, "and reported");
    }
  }
  {
    Group group(problem.shape, num_blocks, kTimeout, low_latency);
    group.TakeFor(1, 0);
    for (int rank = 0; rank < 3; ++rank) dispatch(group, rank);
    CheckEnds(group, problem, ranks, 3, Failure::kWrongRank, 1, kAtOnce,
              "a device run as another rank");
  }
  {
    Group group(problem.shape, num_blocks, kTimeout, low_latency);
    dispatch(group, 0);
    dispatch(group, 1);
    group.Abort(2);
    CheckEnds(group, problem, ranks, 2, Failure::kNotLaunched, 2, kAtOnce,
              "an op that is not launched");
    dispatch(group, 2);
    CheckEnds(group, problem, ranks, 3, Failure::kNotLaunched, 2, kAtOnce,
              "the op after one that is not launched");
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
    CheckEnds(group, problem, ranks, 3, Failure::kTwoAtOnce, 0, kAtOnce,
              "a rank that arrives after two ops at once");
    cudaStreamDestroy(concurrent);
  }
}

__global__ void MeetKernel(const __grid_constant__ OpFrame frame) {
  __shared__ GroupOp::Shared shared;
  GroupOp group(frame, &shared);
  if (group.Begin()) group.SyncGrid([] {});
}

// Blocks that do not all find an SM. Cooperative launches prevent that; the wait of blocks for each
// other ends even so.
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
  CheckCuda(cudaDeviceGetAttribute(&almost_an_sm, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0),
            "attribute");
  almost_an_sm -= kStaticSharedBytes;
  for (auto* kernel :
       {reinterpret_cast<const void*>(Delay), reinterpret_cast<const void*>(MeetKernel)}) {
    CheckCuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, almost_an_sm),
        "attribute");
  }
  LaunchDelay(1'500'000'000, concurrent, num_sms - 1, almost_an_sm);
  // Not as a cooperative launch, which would be rejected.
  OpFrame frame = group.FrameOf(0);
  void* arguments[] = {&frame};
  CheckCuda(cudaLaunchKernel(reinterpret_cast<const void*>(MeetKernel), dim3(2), dim3(32),
                             arguments, almost_an_sm, group.stream(0)),
            "launch");
  group.Wait();
  Check(group.status(0).failed == 1 && group.status(0).report.failure == Failure::kNoRoom,
        "no SM for a block");
  cudaStreamDestroy(concurrent);
}

// Many pairs of ops that begin at once, at all distances: each pair succeeds, one after the other,
// or fails.
void CheckTwoAtOnce(int num_blocks, int tries, bool low_latency, int ranks_per_node = 0) {
  Problem problem =
      MakeProblem("two at once", 2, 4, 2, 20, 128, RowType::kBFloat16, Layout::kExpertMajor);
  problem.shape.ranks_per_node = ranks_per_node;
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
  for (cudaStream_t& stream : concurrent)
    CheckCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  int num_failed = 0;
  for (int i = 0; i < tries; ++i) {
    Group group(problem.shape, num_blocks, 5.0 * kLonger, low_latency);
    const uint64_t delay = random() % 60'000 * kOpsTakeLonger;
    for (auto* each : {&ranks, &others}) {
      for (auto& rank : *each) {
        CheckCuda(cudaMemset(rank->tokens.device<void>(), 0x55, rank->tokens.bytes()),
                  "cudaMemset");
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

}  // namespace
}  // namespace jax_deepep

#endif  // JAX_DEEPEP_TESTS_GPU_RANK_FAULTS_CUH_
