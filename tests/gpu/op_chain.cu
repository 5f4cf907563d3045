// How long ops take back to back on several GPUs, without XLA: a chain captured in a CUDA graph of
// each GPU, in one process. Prints us per dispatch + combine, dispatch, and combine, of the slowest
// GPU: the slope between chains of 8 and 108, median of 15. Results are not checked: cuda_ranks.cu
// does that.
//
//     op_chain throughput|low_latency NUM_GPUS TOKENS...
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "rank_arrays.cuh"
#include "rank_group.cuh"

namespace jax_deepep {
namespace {

enum { kDispatch = 1, kCombine = 2 };

class Chain {
 public:
  explicit Chain(const Problem& problem)
      : problem_(problem),
        group_(problem.shape, 0, 3.0, problem.low_latency, /*device_each=*/true) {
    std::mt19937 random(7);
    for (int rank = 0; rank < num_ranks(); ++rank) {
      group_.OnDeviceOf(rank);
      ranks_.push_back(std::make_unique<Rank>(problem, random));
      for (auto* events : {&begin_, &end_})
        CheckCuda(cudaEventCreate(&events->emplace_back()), "event");
    }
    group_.Wait();
  }
  ~Chain() {
    for (auto* events : {&begin_, &end_}) {
      for (cudaEvent_t event : *events) cudaEventDestroy(event);
    }
  }

  // Us per link of a chain of `ops`.
  double Slope(int ops) {
    constexpr int kLengths[] = {8, 108};
    std::vector<double> times[2];
    std::vector<cudaGraphExec_t> graphs[2];
    for (int i = 0; i < 2; ++i) {
      for (int rank = 0; rank < num_ranks(); ++rank)
        graphs[i].push_back(Capture(rank, ops, kLengths[i]));
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
    for (auto& of_length : times)
      std::nth_element(of_length.begin(), of_length.begin() + 7, of_length.end());
    return (times[1][7] - times[0][7]) / (kLengths[1] - kLengths[0]);
  }

 private:
  int num_ranks() const { return problem_.shape.num_ranks; }

  cudaGraphExec_t Capture(int rank, int ops, int length) {
    const cudaStream_t stream = group_.stream(rank);
    group_.OnDeviceOf(rank);
    CheckCuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < length; ++i) {
      if (ops & kDispatch) group_.Launch(rank, DispatchOf<true>(problem_, *ranks_[rank]));
      if (ops & kCombine) {
        const bool weighted = problem_.route.layout == Layout::kExpertMajor;
        group_.Launch(rank, CombineOf<true>(problem_, *ranks_[rank], weighted, false, false));
      }
    }
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CheckCuda(cudaStreamEndCapture(stream, &graph), "capture");
    CheckCuda(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
    cudaGraphDestroy(graph);
    return executable;
  }

  // Us on the slowest GPU. Nothing but launches, until all ranks have been launched: other calls
  // may wait for the first rank's ops, which wait for those of the others.
  double Run(const std::vector<cudaGraphExec_t>& graphs) {
    for (int rank = 0; rank < num_ranks(); ++rank) {
      group_.OnDeviceOf(rank);
      CheckCuda(cudaEventRecord(begin_[rank], group_.stream(rank)), "event");
      CheckCuda(cudaGraphLaunch(graphs[rank], group_.stream(rank)), "cudaGraphLaunch");
      CheckCuda(cudaEventRecord(end_[rank], group_.stream(rank)), "event");
    }
    float slowest = 0;
    for (int rank = 0; rank < num_ranks(); ++rank) {
      group_.OnDeviceOf(rank);
      CheckCuda(cudaStreamSynchronize(group_.stream(rank)), "ops");
      Check(group_.status(rank).failed == 0, "an op ended as it should");
      float milliseconds = 0;
      CheckCuda(cudaEventElapsedTime(&milliseconds, begin_[rank], end_[rank]), "event");
      slowest = std::max(slowest, milliseconds);
    }
    return 1e3 * slowest;
  }

  Problem problem_;
  Group group_;
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::vector<cudaEvent_t> begin_, end_;
};

}  // namespace
}  // namespace jax_deepep

int main(int argc, char** argv) {
  using namespace jax_deepep;
  const std::string mode = argc > 1 ? argv[1] : "";
  const int num_gpus = argc > 2 ? std::atoi(argv[2]) : 0;
  if ((mode != "throughput" && mode != "low_latency") || num_gpus < 1) {
    std::printf("usage: op_chain throughput|low_latency NUM_GPUS TOKENS...\n");
    return 2;
  }
  for (int gpu = 0; gpu < num_gpus; ++gpu) {
    CheckCuda(cudaSetDevice(gpu), "cudaSetDevice");
    for (int peer = 0; peer < num_gpus; ++peer) {
      if (peer != gpu) CheckCuda(cudaDeviceEnablePeerAccess(peer, 0), "peer access");
    }
  }
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  std::printf(
      "us per dispatch + combine, dispatch, combine: H=7168, top-8 of 256, bfloat16, %d GPUs, %s\n",
      num_gpus, mode.c_str());
  for (const Layout layout : {Layout::kTokenMajor, Layout::kExpertMajor}) {
    for (int i = 3; i < argc; ++i) {
      Problem problem = MakeProblem("chain", num_gpus, 256, 8, std::atoi(argv[i]), 7168,
                                    RowType::kBFloat16, layout);
      problem.none = 0;
      problem.low_latency = mode == "low_latency";
      Chain chain(problem);
      std::printf("%s-major, T = %s: %.1f %.1f %.1f\n", kLayoutNames[static_cast<int>(layout)],
                  argv[i], chain.Slope(kDispatch | kCombine), chain.Slope(kDispatch),
                  chain.Slope(kCombine));
    }
  }
  return failures == 0 ? 0 : 1;
}
