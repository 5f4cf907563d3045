// Ranks of cuda_ranks.cu on several nodes, which are declared: their memory is mapped as on one.
#ifndef JAX_DEEPEP_TESTS_GPU_RANK_NODES_CUH_
#define JAX_DEEPEP_TESTS_GPU_RANK_NODES_CUH_

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "rank_faults.cuh"
#include "rank_group.cuh"

namespace jax_deepep {
namespace {

Problem OnNodes(int ranks_per_node, Problem problem) {
  problem.shape.ranks_per_node = ranks_per_node;
  return problem;
}

// The tokens of a rank with an expert on a node.
int64_t TokensFor(const Problem& problem, Rank& rank, int node) {
  const int num_topk = problem.shape.num_topk;
  const int per_node = problem.shape.num_local_experts() * problem.shape.node_size();
  int64_t count = 0;
  for (int token = 0; token < problem.route.num_tokens; ++token) {
    const int32_t* experts = rank.topk_idx.host<int32_t>() + token * num_topk;
    count += std::any_of(experts, experts + num_topk, [&](int32_t expert) {
      return expert >= 0 && expert < problem.shape.num_experts && expert / per_node == node;
    });
  }
  return count;
}

// In ops of both modes, every row crosses once per node that it has experts on, from the source to
// the rank there with the source's index; and what is received was sent.
void CheckCrossings(Problem problem, int num_blocks) {
  const int num_ranks = problem.shape.num_ranks, node_size = problem.shape.node_size();
  std::mt19937 random(7);
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int rank = 0; rank < num_ranks; ++rank)
    ranks.push_back(std::make_unique<Rank>(problem, random));
  Group group(problem.shape, num_blocks, 5.0 * kLonger);
  for (const bool low_latency : {true, false}) {
    problem.low_latency = low_latency;
    group.Take(low_latency);
    for (int rank = 0; rank < num_ranks; ++rank)
      group.Launch(rank, DispatchOf<true>(problem, *ranks[rank]));
    group.Wait();
  }
  CheckTraffic(group, num_ranks, problem.name);
  for (int rank = 0; rank < num_ranks; ++rank) {
    for (int peer = 0; peer < num_ranks; ++peer) {
      if (peer / node_size == rank / node_size) continue;
      const bool puts = peer % node_size == rank % node_size;
      const auto expected =
          static_cast<uint64_t>(puts ? 2 * TokensFor(problem, *ranks[rank], peer / node_size) : 0);
      const std::string what = std::string(problem.name) + ": rows to another node are ";
      Check(group.Counters(rank).rows_pushed[peer] == expected, what + "put once");
      Check(group.Counters(peer).rows_received[rank] == expected, what + "counted where they are");
    }
  }
}

// Ops of one mode, and of both in turn, which the host launches without waiting for any: what one
// has put may arrive when the next has begun.
void CheckBackToBack(Problem problem, int num_blocks, int num_ops) {
  const int num_ranks = problem.shape.num_ranks;
  std::mt19937 random(11);
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int rank = 0; rank < num_ranks; ++rank)
    ranks.push_back(std::make_unique<Rank>(problem, random));
  for (const int every : {1, 2, 0}) {  // which ops are in low-latency mode; 0: random ones
    Group group(problem.shape, num_blocks, 5.0 * kLonger);
    const std::string what = std::string(problem.name) + ", back to back, ";
    for (int op = 0; op < num_ops; ++op) {
      problem.low_latency = every > 0 ? op % every == 0 : random() % 2 == 0;
      group.Take(problem.low_latency);
      const bool returns = random() % 2 == 0;
      for (int rank = 0; rank < num_ranks; ++rank)
        group.Launch(rank, DispatchOf<true>(problem, *ranks[rank]));
      for (int rank = 0; rank < num_ranks && returns; ++rank)
        group.Launch(rank, CombineOf<true>(problem, *ranks[rank], true, true, false));
    }
    group.Wait();
    for (int rank = 0; rank < num_ranks; ++rank)
      Check(group.status(rank).failed == 0, what + "rank " + std::to_string(rank) + " succeeds");
    CheckTraffic(group, num_ranks, what.c_str());
  }
}

void CheckNodes(int num_blocks) {
  constexpr auto kExpert = Layout::kExpertMajor, kToken = Layout::kTokenMajor;
  constexpr auto kF32 = RowType::kFloat32, kF16 = RowType::kFloat16, kBF16 = RowType::kBFloat16;
  constexpr auto kI32 = RowType::kInt32;
  std::vector<Problem> problems = {
      OnNodes(1, MakeProblem("2 x 1", 2, 8, 3, 40, 256, kBF16, kExpert)),
      OnNodes(2, MakeProblem("2 x 2", 4, 16, 4, 37, 640, kF16, kExpert)),
      OnNodes(2, MakeProblem("2 x 2, by token", 4, 16, 4, 37, 640, kF16, kToken)),
      OnNodes(4, MakeProblem("2 x 4", 8, 32, 6, 25, 128, kBF16, kExpert, 4)),
      OnNodes(2, MakeProblem("4 x 2", 8, 32, 6, 25, 128, kF32, kExpert)),
      OnNodes(2, MakeProblem("3 x 2, odd rows", 6, 18, 4, 21, 37, kBF16, kExpert)),
      OnNodes(2, MakeProblem("3 x 2, odd rows, by token", 6, 18, 4, 21, 37, kF32, kToken)),
      OnNodes(2, MakeProblem("2 x 2, one element", 4, 8, 2, 5, 1, kBF16, kExpert)),
      OnNodes(2, MakeProblem("2 x 2, capacities", 4, 16, 6, 50, 128, kBF16, kExpert, 4, 64, 5)),
      OnNodes(2, MakeProblem("2 x 2, capacity, by token", 4, 16, 6, 50, 128, kBF16, kToken, 4, 96)),
      OnNodes(2, MakeProblem("2 x 2, no tokens", 4, 8, 2, 0, 64, kBF16, kExpert, 4)),
      OnNodes(2, MakeProblem("2 x 2, 32 choices", 4, 64, 32, 12, 128, kBF16, kExpert)),
      OnNodes(2, MakeProblem("2 x 2, one choice", 4, 8, 1, 30, 64, kF32, kExpert)),
      OnNodes(2, MakeProblem("2 x 2, integers", 4, 16, 6, 50, 640, kI32, kExpert, 4, 64)),
  };
  problems.push_back(OnNodes(2, MakeProblem("2 x 2, skewed", 4, 16, 3, 64, 64, kBF16, kExpert)));
  problems.back().skewed = problems.back().invalid = true;
  problems.push_back(OnNodes(2, MakeProblem("2 x 2, nowhere", 4, 8, 2, 12, 64, kBF16, kExpert)));
  problems.back().none = 1.0;
  for (const WireFormat wire :
       {WireFormat::kFp8, WireFormat::kFp8E8m0, WireFormat::kMxfp8, WireFormat::kNvfp4}) {
    for (Problem problem : {MakeProblem("", 4, 16, 4, 30, 256, kBF16, kExpert),
                            MakeProblem("", 4, 16, 4, 21, 38, kF16, kToken)}) {
      problem.route.wire = wire;
      problem.name = kWireNames[static_cast<int>(wire)];
      problems.push_back(OnNodes(2, problem));
    }
  }
  for (const bool low_latency : {false, true}) {
    for (const Problem& problem : problems) CheckProblem(problem, num_blocks, 2, low_latency);
  }
  problems.push_back(MakeProblem("one node", 3, 9, 4, 21, 64, kBF16, kExpert));
  for (const Problem& problem : problems) {
    if (!problem.route.rows().is_quantized()) CheckCrossings(problem, num_blocks);
  }
  constexpr int kOps = kOnGpu ? 200 : 40;
  for (const auto& [size, nodes] : {std::pair{1, 2}, {1, 3}, {2, 2}}) {
    const std::string name = std::to_string(nodes) + " x " + std::to_string(size);
    const int num_ranks = size * nodes;
    const Problem problem =
        MakeProblem(name.c_str(), num_ranks, 4 * num_ranks, 3, 8, 64, kBF16, kExpert);
    CheckBackToBack(OnNodes(size, problem), std::min(num_blocks, 2), kOps);
  }
}

// Rows of a whole op have room up to 8 nodes; more nodes take no more memory for rows.
void CheckStagingOfManyNodes() {
  const auto shape_of = [](int num_nodes) {
    GroupShape shape;
    shape.num_ranks = 8 * num_nodes;
    shape.num_experts = 4 * shape.num_ranks;
    shape.num_topk = 8;
    shape.max_tokens = 4096;
    shape.hidden_size = 7168;
    shape.ranks_per_node = 8;
    return shape;
  };
  constexpr int32_t kTokens = 4096, kBytes = 2 * 7168;
  const int64_t whole = Chunks::PlacesBytes(kTokens) + int64_t{kTokens} * 2 * kBytes;
  for (const int num_nodes : {2, 8, 9, 16, 64}) {
    const StagingLayout staging(shape_of(num_nodes), /*puts_are_asynchronous=*/false);
    const Chunks chunks = staging.ChunksOf(kTokens, kBytes);
    const std::string where = std::to_string(num_nodes) + " nodes: ";
    Check(staging.bytes_for_rows * (num_nodes - 1) <= 7 * whole, where + "bytes for rows");
    Check((staging.ChunksOf(kTokens, 2 * kBytes).count == 1) == (num_nodes <= 8),
          where + "one chunk");
    Check(chunks.count == (num_nodes <= 9 ? 1 : num_nodes == 16 ? 3 : 10), where + "chunks");
    Check(chunks.count * int64_t{chunks.tokens} >= kTokens, where + "all tokens are in a chunk");
    const int64_t chunk_bytes = chunks.OffsetOfRow(chunks.tokens);
    Check(chunks.OffsetOf(chunks.count > 1) + chunk_bytes <= staging.bytes_for_rows &&
              (chunks.count == 1 || chunk_bytes <= chunks.part_bytes),
          where + "chunks have room");
  }
}

// Rows that cross in chunks: of a token or a few, and in three or four.
void CheckChunks(int num_blocks) {
  CheckStagingOfManyNodes();
  constexpr auto kExpert = Layout::kExpertMajor, kToken = Layout::kTokenMajor;
  constexpr auto kF32 = RowType::kFloat32, kBF16 = RowType::kBFloat16, kI32 = RowType::kInt32;
  std::vector<Problem> problems = {
      OnNodes(1, MakeProblem("2 x 1", 2, 8, 3, 19, 256, kBF16, kExpert)),
      OnNodes(2, MakeProblem("2 x 2", 4, 16, 4, 17, 64, kF32, kExpert, 4)),
      OnNodes(2, MakeProblem("3 x 2, odd rows, by token", 6, 18, 4, 14, 37, kBF16, kToken)),
      OnNodes(2, MakeProblem("2 x 2, capacities", 4, 16, 6, 25, 128, kBF16, kExpert, 4, 64, 5)),
      OnNodes(2, MakeProblem("2 x 2, integers", 4, 16, 6, 15, 64, kI32, kExpert, 4, 64)),
      OnNodes(1, MakeProblem("12 x 1", 12, 24, 3, 9, 64, kBF16, kExpert)),
  };
  problems.push_back(OnNodes(2, MakeProblem("2 x 2, skewed", 4, 16, 3, 20, 64, kBF16, kExpert)));
  problems.back().skewed = problems.back().invalid = true;
  problems.push_back(OnNodes(2, MakeProblem("2 x 2, fp8", 4, 16, 4, 14, 256, kBF16, kExpert)));
  problems.back().route.wire = WireFormat::kFp8;
  problems.push_back(OnNodes(2, MakeProblem("2 x 2, mxfp8", 4, 16, 4, 14, 64, kBF16, kToken)));
  problems.back().route.wire = WireFormat::kMxfp8;
  for (const int parts : {64, 3}) {
    for (size_t i = 0; i < problems.size(); ++i) {
      if (!kOnGpu && i % 2 == (parts == 3 ? 1 : 0)) continue;  // each in one of the ways
      const Problem& problem = problems[i];
      most_staged_bytes = problem.route.num_tokens * problem.shape.max_row_bytes() / parts;
      CheckProblem(problem, num_blocks, 2);
      if (!problem.route.rows().is_quantized()) CheckCrossings(problem, num_blocks);
    }
  }
  most_staged_bytes = 0;
}

// Groups of the most ranks. With one block per rank: all must be resident.
void CheckManyNodes() {
  constexpr auto kExpert = Layout::kExpertMajor, kToken = Layout::kTokenMajor;
  for (const Problem& problem : {
           MakeProblem("8 x 8", 64, 128, 8, 20, 128, RowType::kBFloat16, kExpert),
           MakeProblem("8 x 8, by token", 64, 128, 32, 12, 72, RowType::kFloat32, kToken),
       }) {
    for (const bool low_latency : {false, true})
      CheckProblem(OnNodes(8, problem), 1, 2, low_latency);
  }
  for (const Problem& problem :
       {OnNodes(1, MakeProblem("70 x 1", 70, 140, 16, 6, 64, RowType::kBFloat16, kExpert)),
        OnNodes(2, MakeProblem("36 x 2", 72, 144, 32, 6, 37, RowType::kFloat16, kExpert))}) {
    for (const bool low_latency : {false, true}) CheckProblem(problem, 1, 2, low_latency);
  }
}

// A rank that waits for a missing one itself reports it, whichever node it is on.
void CheckFaultsOfNodes() {
  for (const bool low_latency : {false, true}) {
    for (const bool late : {false, true})
      CheckFaults(4, 2, late, low_latency, /*ranks_per_node=*/2);
    if (kOnGpu) CheckFaults(72, 1, /*late=*/false, low_latency, /*ranks_per_node=*/8);
    if (low_latency) CheckFaults(3, 2, /*late=*/false, low_latency, /*ranks_per_node=*/1);
    most_staged_bytes = 1;
    if (!low_latency) CheckFaults(4, 2, /*late=*/false, low_latency, /*ranks_per_node=*/2);
    most_staged_bytes = 0;
    CheckMistakes(2, low_latency, /*ranks_per_node=*/1);
    CheckTwoAtOnce(3, kOnGpu ? 200 : 10, low_latency, /*ranks_per_node=*/1);
  }
}

}  // namespace
}  // namespace jax_deepep

#endif  // JAX_DEEPEP_TESTS_GPU_RANK_NODES_CUH_
