// Several ranks in one process on one GPU, a stream each: every verb against the CPU's bits, ranks
// that arrive late or never, and many steps with random delays. No Python, so that
// compute-sanitizer can watch.
//
//     cuda_ranks [conformance] [short] [nodes] [short-nodes] [chunks] [formats] [faults] [channels]
//         [router] [soak STEPS]
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "expert_choices.cuh"
#include "fair_shares.cuh"
#include "rank_faults.cuh"
#include "rank_formats.cuh"
#include "rank_group.cuh"
#include "rank_nodes.cuh"
#include "rank_numbers.cuh"

namespace jax_deepep {
namespace {

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
  for (const WireFormat wire :
       {WireFormat::kFp8, WireFormat::kFp8E8m0, WireFormat::kMxfp8, WireFormat::kNvfp4}) {
    const auto add = [&](Problem problem) {
      problem.route.wire = wire;
      problem.name = kWireNames[static_cast<int>(wire)];
      problems.push_back(problem);
    };
    add(MakeProblem("", 2, 8, 3, 40, 256, kBF16, kExpert));
    add(MakeProblem("", 3, 9, 4, 21, 38, kF16, kToken));
    add(MakeProblem("", 2, 4, 2, 5, 2, kF16, kExpert));
    add(MakeProblem("", 2, 4, 1, 9, 4104, kBF16, kExpert));
    add(MakeProblem("", 2, 4, 1, 9, 3616, kBF16, kExpert));
    if (!kOnGpu) continue;
    add(MakeProblem("", 4, 16, 4, 37, 640, kF16, kExpert, 4, 64));
    add(MakeProblem("", 4, 16, 4, 37, 648, kF32, kToken));
    add(MakeProblem("", 3, 9, 4, 21, 202, kF32, kExpert));
    add(MakeProblem("", 1, 4, 2, 9, 9000, kBF16, kExpert));
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
           MakeProblem("72 ranks", 72, 144, 16, 12, 64, RowType::kBFloat16, kExpert),
           MakeProblem("70 ranks, by token", 70, 140, 32, 6, 72, RowType::kFloat32, kToken),
           MakeProblem("33 ranks, odd rows", 33, 66, 9, 15, 37, RowType::kBFloat16, kExpert),
       }) {
    for (const bool low_latency : {false, true}) CheckProblem(problem, 1, 2, low_latency);
  }
}

// Ops on the two channels, whole or in two parts, in either order on each rank and at all
// distances: they never touch each other.
void CheckChannels(int num_blocks, int tries, bool first_low_latency, bool second_low_latency,
                   int ranks_per_node = 0) {
  const int num_ranks = ranks_per_node == 0 ? 3 : 2 * ranks_per_node, experts = 2 * num_ranks;
  std::mt19937 random(23);
  std::vector<Problem> problems = {MakeProblem("channel 0", num_ranks, experts, 3, 20, 128,
                                               RowType::kBFloat16, Layout::kExpertMajor, 4),
                                   MakeProblem("channel 1", num_ranks, experts, 3, 16, 128,
                                               RowType::kFloat32, Layout::kTokenMajor)};
  problems[0].shape.ranks_per_node = ranks_per_node;
  problems[0].low_latency = first_low_latency;
  problems[1].low_latency = second_low_latency;
  problems[1].shape = problems[0].shape;
  const auto comm = CpuCommunicator(problems[0].shape);
  std::vector<std::unique_ptr<Rank>> ranks[kNumChannels];
  for (int channel = 0; channel < kNumChannels; ++channel) {
    std::vector<DispatchParams> dispatches;
    std::vector<CombineParams> combines;
    for (int rank = 0; rank < num_ranks; ++rank) {
      ranks[channel].push_back(std::make_unique<Rank>(problems[channel], random));
      dispatches.push_back(DispatchOf<false>(problems[channel], *ranks[channel].back()));
      combines.push_back(
          CombineOf<false>(problems[channel], *ranks[channel].back(), channel == 0, true, false));
    }
    RunOnCpu(*comm, 2 * channel, dispatches);
    RunOnCpu(*comm, 2 * channel + 1, combines);
  }
  std::vector<cudaStream_t> others(num_ranks);
  for (cudaStream_t& stream : others)
    CheckCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  Group group(problems[0].shape, num_blocks, 5.0 * kLonger);
  for (int i = 0; i < tries && failures == 0; ++i) {
    for (int op = 0; op < 2; ++op) {
      for (int rank = 0; rank < num_ranks; ++rank) {
        const int first = random() % 2;
        for (const int channel : {first, 1 - first}) {
          const cudaStream_t stream = channel == 0 ? group.stream(rank) : others[rank];
          LaunchDelay(random() % 30'000 * kOpsTakeLonger, stream);
          group.Take(problems[channel].low_latency);
          Rank& own = *ranks[channel][rank];
          const auto launch = [&](Part part) {
            if (op == 0) {
              group.Launch(rank, DispatchOf<true>(problems[channel], own), stream, channel, part);
            } else {
              const CombineParams combine =
                  CombineOf<true>(problems[channel], own, channel == 0, true, false);
              group.Launch(rank, combine, stream, channel, part);
            }
          };
          if (problems[channel].low_latency && random() % 2 == 0) {
            launch(Part::kStart);
            LaunchDelay(random() % 30'000 * kOpsTakeLonger, stream);
            launch(Part::kDone);
          } else {
            launch(Part::kWhole);
          }
        }
      }
    }
    group.Wait();
    for (int channel = 0; channel < kNumChannels; ++channel) {
      for (int rank = 0; rank < num_ranks; ++rank) {
        Rank& own = *ranks[channel][rank];
        const std::string where =
            "channel " + std::to_string(channel) + ", try " + std::to_string(i);
        Check(group.status(rank).failed == 0, where + " ended as it should");
        CheckSameRows(problems[channel], own.tokens, own, false, where + ", tokens");
        CheckSame(own.out, own.out.bytes(), where + ", out");
        CheckCuda(cudaMemset(own.tokens.device<void>(), 0x55, own.tokens.bytes()), "cudaMemset");
        CheckCuda(cudaMemset(own.out.device<void>(), 0x55, own.out.bytes()), "cudaMemset");
      }
    }
  }
  for (cudaStream_t stream : others) cudaStreamDestroy(stream);
}

// Many steps with random routing and random delays of single ranks: every byte as on the CPU.
void CheckSoak(int num_blocks, int steps, int ranks_per_node = 0) {
  constexpr int num_ranks = 8;
  Problem problem =
      MakeProblem("soak", num_ranks, 32, 4, 24, 256, RowType::kBFloat16, Layout::kExpertMajor);
  problem.shape.ranks_per_node = ranks_per_node;
  std::mt19937 random(11);
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int rank = 0; rank < num_ranks; ++rank)
    ranks.push_back(std::make_unique<Rank>(problem, random));
  const auto comm = CpuCommunicator(problem.shape);
  Group group(problem.shape, num_blocks, 5.0 * kLonger);
  for (int step = 0; step < steps && failures == 0; ++step) {
    problem.low_latency = random() % 2 == 0;  // each mode follows either
    group.Take(problem.low_latency);
    const int channel = random() % kNumChannels;
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
    // One op of all ranks after the other: streams share queues of the GPU, and a rank's second op,
    // which waits for its first, would hold up the first of another rank.
    for (int rank = 0; rank < num_ranks; ++rank) {
      if (random() % 4 == 0) group.DelayRank(rank, random() % 200'000 * kOpsTakeLonger);
      group.Launch(rank, DispatchOf<true>(problem, *ranks[rank]), nullptr, channel);
    }
    for (int rank = 0; rank < num_ranks; ++rank) {
      if (random() % 4 == 0) group.DelayRank(rank, random() % 200'000 * kOpsTakeLonger);
      group.Launch(rank, CombineOf<true>(problem, *ranks[rank], true, true, false), nullptr,
                   channel);
    }
    group.Wait();
    for (int rank = 0; rank < num_ranks; ++rank) {
      const std::string where =
          "soak, step " + std::to_string(step) + ", rank " + std::to_string(rank);
      Check(group.status(rank).failed == 0, where + " ended as it should");
      CheckSameRows(problem, ranks[rank]->tokens, *ranks[rank], false, where + ", tokens");
      CheckSame(ranks[rank]->out, ranks[rank]->out.bytes(), where + ", out");
    }
  }
  CheckTraffic(group, num_ranks, "soak");
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
    } else if (what == "nodes") {
      for (const int num_blocks : {1, 3, 8}) CheckNodes(num_blocks);
      if (kOnGpu) CheckManyNodes();
    } else if (what == "short-nodes") {
      CheckNodes(2);
    } else if (what == "chunks") {
      for (const int num_blocks : {1, 3}) {
        if (kOnGpu || num_blocks > 1) CheckChunks(num_blocks);
      }
    } else if (what == "formats") {
      CheckNumbers();
      for (const int num_blocks : {2, 3}) {
        if (kOnGpu || num_blocks == 2) CheckFormats(num_blocks);
      }
      for (const int num_blocks : {1, 3}) CheckParts(num_blocks);
      CheckMissingParts();
    } else if (what == "faults") {
      for (const bool late : {false, true}) {
        for (const bool low_latency : {false, true}) {
          CheckFaults(3, 2, late, low_latency);
          CheckFaults(kOnGpu ? 70 : 8, 1, late, low_latency);
        }
      }
      CheckFaultsOfNodes();
      if (kOnGpu) CheckNoRoom();
      for (const bool low_latency : {false, true}) {
        CheckMistakes(2, low_latency);
        CheckTwoAtOnce(3, kOnGpu ? 200 : 10, low_latency);
      }
    } else if (what == "channels") {
      for (const bool first : {false, true}) {
        for (const bool second : {false, true}) {
          for (const int ranks_per_node : {0, 2})
            CheckChannels(2, kOnGpu ? 200 : 5, first, second, ranks_per_node);
          most_staged_bytes = 4 * 128 * 4;  // chunks of four tokens, or of two
          if (!first) CheckChannels(2, kOnGpu ? 200 : 2, first, second, 2);
          most_staged_bytes = 0;
        }
      }
    } else if (what == "router") {
      CheckExpertChoices();
      CheckFairShares();
    } else if (what == "soak" && i + 1 < argc) {
      const int steps = std::atoi(argv[++i]);
      for (const int ranks_per_node : {0, 2, 4}) CheckSoak(3, steps, ranks_per_node);
      most_staged_bytes = 6 * 256 * 4;  // chunks of six tokens
      CheckSoak(3, steps, 2);
      most_staged_bytes = 0;
    } else {
      std::printf("unknown: %s\n", what.c_str());
      return 2;
    }
    std::printf("%s: %d failures\n", what.c_str(), failures);
  }
  return failures == 0 ? 0 : 1;
}
