// Rows in wire formats that stay encoded where they are received, with the CPU's bits.
#ifndef JAX_DEEPEP_TESTS_GPU_RANK_FORMATS_CUH_
#define JAX_DEEPEP_TESTS_GPU_RANK_FORMATS_CUH_

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "rank_faults.cuh"
#include "rank_group.cuh"
#include "rank_nodes.cuh"

namespace jax_deepep {
namespace {

// Encoded by the sender, or before the op.
void CheckKept(Problem problem, WireFormat wire, int num_blocks) {
  const std::string sizes = problem.name;
  problem.route.wire = wire;
  problem.route.keeps_quantized = true;
  for (const bool encoded_before : {false, true}) {
    if (encoded_before) problem.route.row_type = RowType::kEncoded;
    const std::string name = sizes + kWireNames[static_cast<int>(wire)] +
                             (encoded_before ? ", encoded before" : ", encoded by the sender");
    problem.name = name.c_str();
    for (const bool low_latency : {false, true}) CheckProblem(problem, num_blocks, 2, low_latency);
  }
}

// Sums of pairs in parts that peers read early, in one node: of at least four tokens.
void CheckParts(int num_blocks) {
  constexpr auto kExpert = Layout::kExpertMajor;
  constexpr auto kF16 = RowType::kFloat16, kBF16 = RowType::kBFloat16;
  least_part_tokens = 4;
  std::vector<Problem> problems = {
      MakeProblem("parts", 2, 8, 3, 43, 256, kBF16, kExpert, 4),
      MakeProblem("parts, short rows", 4, 16, 4, 16, 38, kF16, kExpert),
      MakeProblem("parts, few rows", 2, 4, 2, 13, 128, kBF16, kExpert, 1, 20),
      MakeProblem("parts, one rank", 1, 4, 2, 21, 136, kBF16, kExpert),
      MakeProblem("parts, capacity", 3, 9, 4, 50, 128, kBF16, kExpert, 4, 64, 5),
  };
  problems.push_back(MakeProblem("parts, skewed", 3, 9, 3, 30, 128, kBF16, kExpert));
  problems.back().skewed = problems.back().invalid = true;
  problems.push_back(MakeProblem("parts, nowhere", 2, 4, 2, 22, 128, kBF16, kExpert));
  problems.back().none = 1.0;
  for (Problem& problem : problems) {
    for (const WireFormat wire : {WireFormat::kNone, WireFormat::kFp8}) {
      problem.route.wire = wire;
      CheckProblem(problem, num_blocks, 3);
    }
  }
  least_part_tokens = TokenParts::kLeastTokens;
}

// A rank arrives at combine, and its peers never hear of its later parts: they report it, and all
// fail.
void CheckMissingParts() {
  constexpr int kRanks = 3;
  least_part_tokens = 4;
  Problem problem =
      MakeProblem("missing parts", kRanks, 6, 3, 40, 128, RowType::kBFloat16, Layout::kExpertMajor);
  const std::string name = problem.name;
  std::mt19937 random(5);
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int rank = 0; rank < kRanks; ++rank)
    ranks.push_back(std::make_unique<Rank>(problem, random));
  // Long enough that waits of different lengths end one after the other, also under load.
  Group group(problem.shape, 2, 1.0 * kLonger);
  group.TakeLargerParts(kRanks - 1);
  for (int rank = 0; rank < kRanks; ++rank)
    group.Launch(rank, DispatchOf<true>(problem, *ranks[rank]));
  group.Wait();
  for (int rank = 0; rank < kRanks; ++rank)
    group.Launch(rank, CombineOf<true>(problem, *ranks[rank], true, true, false));
  group.Wait();
  for (int rank = 0; rank < kRanks; ++rank) {
    const HostStatus& status = group.status(rank);
    Check(status.failed == 1 && status.report.failure == Failure::kNotLeft, name + ": fails");
    Check(status.report.missing.Has(kRanks - 1) && !status.report.missing.Has(0),
          name + ": the rank whose parts are missing");
    Check(static_cast<int>(status.reporter) < kRanks - 1, name + ": reported by who waited");
    Check(AllFailed(problem, ranks[rank]->out), name + ": results are NaN");
  }
  least_part_tokens = TokenParts::kLeastTokens;
}

void CheckFormats(int num_blocks) {
  constexpr auto kExpert = Layout::kExpertMajor, kToken = Layout::kTokenMajor;
  constexpr auto kF32 = RowType::kFloat32, kF16 = RowType::kFloat16, kBF16 = RowType::kBFloat16;
  for (const WireFormat wire :
       {WireFormat::kFp8, WireFormat::kFp8E8m0, WireFormat::kMxfp8, WireFormat::kNvfp4}) {
    for (const Problem& problem : {
             // Parts of rows at 16 bytes, at fewer and anywhere.
             MakeProblem("kept, ", 2, 8, 3, 20, 3616, kBF16, kExpert, 4),
             MakeProblem("kept, 136 elements, ", 3, 9, 4, 21, 136, kBF16, kExpert, 4),
             MakeProblem("kept, 38 elements, ", 3, 9, 4, 21, 38, kF16, kToken, 4),
             MakeProblem("kept, 2 elements, ", 2, 4, 2, 5, 2, kF32, kExpert, 4),
             MakeProblem("kept, capacity, ", 4, 16, 6, 50, 128, kBF16, kExpert, 4, 64),
             OnNodes(2, MakeProblem("kept, 2 x 2, ", 4, 16, 4, 30, 256, kBF16, kExpert, 4)),
             OnNodes(2, MakeProblem("kept, 2 x 2, by token, ", 4, 16, 4, 21, 38, kF16, kToken)),
         }) {
      CheckKept(problem, wire, num_blocks);
    }
    if (kOnGpu)
      CheckKept(MakeProblem("kept, long, ", 2, 8, 3, 40, 7168, kBF16, kToken), wire, num_blocks);
    // In chunks of tokens.
    const Problem chunks =
        OnNodes(2, MakeProblem("kept, chunks, ", 4, 16, 4, 14, 256, kBF16, kExpert));
    most_staged_bytes = 4 * chunks.shape.max_row_bytes();
    CheckKept(chunks, wire, num_blocks);
    most_staged_bytes = 0;
  }
}

}  // namespace
}  // namespace jax_deepep

#endif  // JAX_DEEPEP_TESTS_GPU_RANK_FORMATS_CUH_
