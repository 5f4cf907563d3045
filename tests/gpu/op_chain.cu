// How long ops take back to back on two GPUs, without XLA: a chain captured in a CUDA graph of each GPU, in one
// process. Prints us per dispatch + combine, dispatch, and combine, of the slower GPU: the slope between chains of
// 8 and 108, median of 15. Results are not checked: cuda_ranks.cu does that.
//
//     op_chain throughput|low_latency TOKENS...
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/low_latency/window.h"
#include "cuda/rank_kernels.h"
#include "interface/op_signature.h"
#include "rank_arrays.cuh"

namespace jax_deepep {
namespace {

constexpr int kNumRanks = 2;  // a GPU each
constexpr int kMostSms = 130;
enum { kDispatch = 1, kCombine = 2 };

class Chain {
 public:
  Chain(const Problem& problem, Mode mode) : problem_(problem), kernels_(KernelsOf(mode)) {
    const GroupShape& shape = problem.shape;
    const WindowSize size{shape.max_tokens, 2 * shape.hidden_size};
    const WindowLayout window(shape, size);
    std::mt19937 random(7);
    for (int rank = 0; rank < kNumRanks; ++rank) {
      OnRank(rank);
      int shared_bytes = 0;
      CheckCuda(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, rank), "attribute");
      facts_.shared_bytes = shared_bytes - kStaticSharedBytes;
      for (auto* load : {LoadRankKernels, kernels_.load}) {
        Check(load(facts_.shared_bytes) == nullptr, "kernels load");
      }
      ranks_.push_back(std::make_unique<Rank>(problem, random));
      controls_.push_back(std::make_unique<Array>(window.offset + window.bytes()));
      CheckCuda(cudaMemset(controls_[rank]->device<void>(), 0, controls_[rank]->bytes()), "cudaMemset");
      *ranks_[rank]->rank_operand.host<int32_t>() = rank;
      ranks_[rank]->rank_operand.ToDevice();
      CheckCuda(cudaStreamCreateWithFlags(&streams_[rank], cudaStreamNonBlocking), "stream");
      CheckCuda(cudaHostAlloc(reinterpret_cast<void**>(&statuses_[rank]), sizeof(HostStatus), cudaHostAllocPortable),
                "cudaHostAlloc");
      *statuses_[rank] = HostStatus{};
      for (cudaEvent_t* event : {&begin_[rank], &end_[rank]}) CheckCuda(cudaEventCreate(event), "event");
    }
    for (int rank = 0; rank < kNumRanks; ++rank) {
      OpFrame frame;
      frame.shape = shape;
      frame.window = size;
      frame.rank = rank;
      frame.timeout_ns = 3'000'000'000;
      frame.expected_rank = ranks_[rank]->rank_operand.device<int32_t>();
      frame.status = statuses_[rank];
      for (int peer = 0; peer < kNumRanks; ++peer) frame.control[peer] = controls_[peer]->device<DeviceControl>();
      frames_.push_back(frame);
      OnRank(rank);
      CheckCuda(cudaDeviceSynchronize(), "set-up");
    }
  }
  ~Chain() {
    for (int rank = 0; rank < kNumRanks; ++rank) {
      cudaStreamDestroy(streams_[rank]);
      cudaFreeHost(statuses_[rank]);
      for (cudaEvent_t event : {begin_[rank], end_[rank]}) cudaEventDestroy(event);
    }
  }

  // Us per link of a chain of `ops`.
  double Slope(int ops) {
    constexpr int kLengths[] = {8, 108};
    std::vector<double> times[2];
    cudaGraphExec_t graphs[2][kNumRanks];
    for (int i = 0; i < 2; ++i) {
      for (int rank = 0; rank < kNumRanks; ++rank) graphs[i][rank] = Capture(rank, ops, kLengths[i]);
    }
    for (int trial = 0; trial < 17; ++trial) {
      for (int i = 0; i < 2; ++i) {
        const double us = Run(graphs[i]);
        if (trial > 1) times[i].push_back(us);  // without the warm-up
      }
    }
    for (auto& of_length : graphs) {
      for (cudaGraphExec_t graph : of_length) cudaGraphExecDestroy(graph);
    }
    for (auto& of_length : times) std::nth_element(of_length.begin(), of_length.begin() + 7, of_length.end());
    return (times[1][7] - times[0][7]) / (kLengths[1] - kLengths[0]);
  }

 private:
  void OnRank(int rank) { CheckCuda(cudaSetDevice(rank), "cudaSetDevice"); }

  template <typename Params>
  void Launch(int rank, const Params& params) {
    OpFrame frame = frames_[rank];
    frame.launch = ++num_launches_;
    frame.op = SignatureOf(params, 0);
    frame.op.flags |= kernels_.flags;
    frame.op_hash = frame.op.Hash();
    const int blocks = kernels_.num_blocks(BytesOf(problem_.shape, params), kMostSms);
    const char* error = kernels_.LaunchOf<Params>()(frame, params, blocks, facts_, streams_[rank]);
    Check(error == nullptr, std::string("launch: ") + (error ? error : ""));
  }

  cudaGraphExec_t Capture(int rank, int ops, int length) {
    OnRank(rank);
    const bool expert_major = problem_.route.layout == Layout::kExpertMajor;
    CheckCuda(cudaStreamBeginCapture(streams_[rank], cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < length; ++i) {
      if (ops & kDispatch) Launch(rank, DispatchOf<true>(problem_, *ranks_[rank]));
      if (ops & kCombine) Launch(rank, CombineOf<true>(problem_, *ranks_[rank], expert_major, false, false));
    }
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CheckCuda(cudaStreamEndCapture(streams_[rank], &graph), "capture");
    CheckCuda(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
    cudaGraphDestroy(graph);
    return executable;
  }

  // Us on the slower GPU. Nothing but launches, until all ranks have been launched: other calls may wait for the
  // first rank's ops, which wait for those of the second.
  double Run(cudaGraphExec_t (&graphs)[kNumRanks]) {
    for (int rank = 0; rank < kNumRanks; ++rank) {
      OnRank(rank);
      CheckCuda(cudaEventRecord(begin_[rank], streams_[rank]), "event");
      CheckCuda(cudaGraphLaunch(graphs[rank], streams_[rank]), "cudaGraphLaunch");
      CheckCuda(cudaEventRecord(end_[rank], streams_[rank]), "event");
    }
    float slowest = 0;
    for (int rank = 0; rank < kNumRanks; ++rank) {
      OnRank(rank);
      CheckCuda(cudaStreamSynchronize(streams_[rank]), "ops");
      Check(statuses_[rank]->failed == 0, "an op ended as it should");
      float milliseconds = 0;
      CheckCuda(cudaEventElapsedTime(&milliseconds, begin_[rank], end_[rank]), "event");
      slowest = std::max(slowest, milliseconds);
    }
    return 1e3 * slowest;
  }

  Problem problem_;
  const KernelSet& kernels_;
  DeviceFacts facts_;
  uint64_t num_launches_ = 0;
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::vector<std::unique_ptr<Array>> controls_;
  std::vector<OpFrame> frames_;
  cudaStream_t streams_[kNumRanks];
  cudaEvent_t begin_[kNumRanks], end_[kNumRanks];
  HostStatus* statuses_[kNumRanks];
};

}  // namespace
}  // namespace jax_deepep

int main(int argc, char** argv) {
  using namespace jax_deepep;
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode != "throughput" && mode != "low_latency") {
    std::printf("usage: op_chain throughput|low_latency TOKENS...\n");
    return 2;
  }
  for (int rank = 0; rank < kNumRanks; ++rank) {
    CheckCuda(cudaSetDevice(rank), "two GPUs");
    CheckCuda(cudaDeviceEnablePeerAccess(1 - rank, 0), "peer access");
  }
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  std::printf("us per dispatch + combine, dispatch, combine: H=7168, top-8 of 256, bfloat16, %s\n", mode.c_str());
  for (const Layout layout : {Layout::kTokenMajor, Layout::kExpertMajor}) {
    for (int i = 2; i < argc; ++i) {
      Problem problem = MakeProblem("chain", kNumRanks, 256, 8, std::atoi(argv[i]), 7168, RowType::kBFloat16, layout);
      problem.none = 0;
      problem.low_latency = mode == "low_latency";
      Chain chain(problem, problem.low_latency ? Mode::kLowLatency : Mode::kThroughput);
      std::printf("%s-major, T = %s: %.1f %.1f %.1f\n", kLayoutNames[static_cast<int>(layout)], argv[i],
                  chain.Slope(kDispatch | kCombine), chain.Slope(kDispatch), chain.Slope(kCombine));
    }
  }
  return failures == 0 ? 0 : 1;
}
