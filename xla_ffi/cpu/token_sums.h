// The sums of one token in combine: over the rows of a rank, over the ranks of a node, over nodes.
#ifndef JAX_DEEPEP_CPU_TOKEN_SUMS_H_
#define JAX_DEEPEP_CPU_TOKEN_SUMS_H_

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/communicator.h"
#include "cpu/op.h"
#include "cpu/row_math.h"
#include "interface/combine.h"

namespace jax_deepep {

// Where the group spans processes, a rank's sums p_d for tokens that other processes add up are
// read in its window, one row per (token, rank), however many of the token's experts the rank has.
// With a wire format, every sum that crosses ranks is encoded, from float32.
class TokenSums {
 public:
  // An entry of a token that has a row.
  struct Entry {
    int32_t rank;
    int32_t row;
    int32_t k;
  };

  // Per thread, so that nothing is allocated per token.
  struct Scratch {
    std::vector<Entry> entries;
    std::vector<Term> terms;
    // With a wire format: one sum, before and in it, and those of a node's ranks after it.
    std::vector<float> sum;
    std::vector<char> encoded;
    std::vector<float> decoded;
    // Of several nodes: their terms, and their sums, of any type.
    std::vector<Term> of_nodes;
    std::vector<float> sums_of_nodes;
  };

  // `ranks` are null for ranks of other processes.
  TokenSums(const GroupRun& run, const RouteShape& route, std::vector<const CombineParams*> ranks);

  Scratch MakeScratch() const;

  bool IsHere(size_t rank) const { return ranks_[rank] != nullptr; }
  bool IsRemote(int rank) const { return run_.links != nullptr && !run_.links->IsOnThisNode(rank); }
  int NodeOf(int rank) const { return shape_.NodeOf(rank); }

  // The rank that adds up p_d of a rank for tokens of a source: of the rank's node, with the index
  // of the source. With one node the source itself.
  int AdderOf(int source, int rank) const { return shape_.RankOnNode(source, NodeOf(rank)); }
  // The rank that reads it: the source itself where nodes share memory.
  int ReaderOf(int source, int rank) const {
    return run_.links == nullptr ? source : AdderOf(source, rank);
  }

  // Collect the entries of a token by rank, and by k on a rank; return how many there are.
  int CollectEntries(int source, int64_t token, Scratch* scratch) const;

  // The end of the entries of one rank, or node, which begin at i.
  static int EndOfRank(const Scratch& scratch, int i, int count) {
    const int32_t rank = scratch.entries[i].rank;
    while (i < count && scratch.entries[i].rank == rank) ++i;
    return i;
  }
  int EndOfNode(const Scratch& scratch, int i, int count) const {
    if (i == count) return i;
    const int node = NodeOf(scratch.entries[i].rank);
    while (i < count && NodeOf(scratch.entries[i].rank) == node) ++i;
    return i;
  }

  // Write p_d of a rank for its entries [begin, end), and their gradients, to its window.
  void PublishSum(int source, int64_t token, int rank, int begin, int end, Scratch* scratch) const;

  // The sum of a node for a token: for another node in the wire format, if any, else rounded.
  void SumOfNode(int source, int64_t token, int begin, int end, char* to, Scratch* scratch) const;

  // The result for a token of this process, and the gradients of its entries.
  void SumToken(int source, int64_t token, int count, Scratch* scratch) const;

  // The gradient of an entry's weight.
  float GradientOf(int source, int64_t token, const Entry& entry) const;

 private:
  // Where a rank's sum for a token that another process adds up is.
  char* SumOf(int rank, int source, int64_t token) const {
    return windows_[rank].sums + (int64_t{source} * shape_.max_tokens + token) * sum_bytes_;
  }
  float* GradientsOf(int rank, int source, int64_t token) const {
    return windows_[rank].entry_gradients +
           (int64_t{source} * shape_.max_tokens + token) * shape_.num_topk;
  }

  Term RowTerm(const Entry& entry) const {
    const CombineParams& peer = *ranks_[entry.rank];
    return {static_cast<const char*>(peer.y) + entry.row * row_bytes_,
            peer.weights == nullptr ? 1.0f : peer.weights[entry.row], entry.rank};
  }

  int CollectTerms(const Scratch& scratch, int begin, int end, Term* terms) const;
  void EncodeSum(const Term* terms, int num_terms, char* to, Scratch* scratch) const;
  bool IsEncoded(int source, int rank) const;
  int CollectSums(int source, int64_t token, int begin, int end, Scratch* scratch) const;
  Term TermOfNode(int source, int64_t token, int begin, int end, float* sum,
                  Scratch* scratch) const;

  const GroupRun& run_;
  const GroupShape& shape_;
  const RouteShape& route_;
  const std::vector<const CombineParams*> ranks_;
  const std::vector<RankWindow>& windows_;
  const int num_nodes_;
  const bool expert_major_;
  const RowFormat format_;
  const WireRow wire_;
  const int64_t row_bytes_;
  const int64_t sum_bytes_;  // of p_d in a window
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CPU_TOKEN_SUMS_H_
