// Pulling rows along known routes: the data movement of dispatch and cached_dispatch.
#ifndef JAX_DEEPEP_CPU_ROW_MOVES_H_
#define JAX_DEEPEP_CPU_ROW_MOVES_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/op.h"
#include "interface/geometry.h"

namespace jax_deepep {

// What one rank pulls: rows = weights * x[source], products = <x[source], y>, of x as it arrives.
// Null: not needed.
struct RowMove {
  int rank = 0;
  const int32_t* source = nullptr;
  const int32_t* group_sizes = nullptr;
  const float* weights = nullptr;
  const void* y = nullptr;
  void* rows = nullptr;  // or `kept`, of rows that stay encoded
  KeptArrays kept;
  float* products = nullptr;
  bool zero_rest = false;
};

// The rows of all ranks where they are pulled from: in their arrays or, if the group spans
// processes, in windows. With a wire format windows have encoded rows, which every reader decodes;
// in one process each row is encoded and decoded once, however many ranks pull it. Rows that stay
// encoded are never decoded.
class SentRows {
 public:
  // `x` [T, W] of every rank, null for ranks of other processes, which can read the rows of this
  // one after a barrier.
  SentRows(const GroupRun& run, const RouteShape& route, const std::vector<const void*>& x);

  bool are_encoded() const { return are_encoded_; }
  int64_t row_bytes() const { return row_bytes_; }
  const char* RowOf(int32_t rank, int64_t token) const {
    return sources_[rank] + token * row_bytes_;
  }
  size_t num_ranks() const { return sources_.size(); }

 private:
  const bool are_encoded_;
  const int64_t row_bytes_;
  std::unique_ptr<char[]> own_;  // in one process, of rows that are encoded here
  std::vector<const char*> sources_;
};

// Which nodes need which tokens of one rank.
class NeededTokens {
 public:
  NeededTokens(const GroupShape& shape, int64_t num_tokens)
      : num_nodes_(shape.num_nodes()),
        node_size_(shape.node_size()),
        needed_(num_tokens * num_nodes_) {}

  void Add(int64_t token, int rank) { needed_[token * num_nodes_ + rank / node_size_] = 1; }
  bool Has(int64_t token, int node) const { return needed_[token * num_nodes_ + node] != 0; }

 private:
  const int num_nodes_, node_size_;
  std::vector<char> needed_;
};

// Send the tokens of a rank of this process, and their entries where `with_entries`, to its peers
// on other nodes, before a barrier.
void PutTokens(const GroupRun& run, const RouteShape& route, const SentRows& sent, int rank,
               const NeededTokens& needed, bool with_entries);

// Let ranks of this process pull their rows.
void MoveRows(const GroupRun& run, const RouteShape& route, const SentRows& sent,
              const std::vector<RowMove>& moves);

// The rows [C] of an op that failed.
void FillReceivedAsFailed(const RouteShape& route, void* rows, const KeptArrays& kept);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CPU_ROW_MOVES_H_
