// combine on CPU: every source pulls the rows of its tokens from the ranks that hold them and sums
// them in the order of the contract: ranks ascending, on a rank k ascending. On several nodes, in
// each of them the rank with the source's index, its proxy there, adds up the sums of that node's
// ranks.
#include "interface/combine.h"

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "cpu/communicator.h"
#include "cpu/op.h"
#include "cpu/pages.h"
#include "cpu/row_math.h"
#include "cpu/threads.h"
#include "cpu/token_sums.h"

namespace jax_deepep {
namespace {

constexpr int64_t kTokensPerRange = 16;

// Rows received by ranks from ranks.
class RowCounts {
 public:
  explicit RowCounts(size_t num_ranks) : num_ranks_(num_ranks), counts_(num_ranks * num_ranks) {}

  void Add(int from, int to) {
    counts_[to * num_ranks_ + from].fetch_add(1, std::memory_order_relaxed);
  }
  void AddTo(const GroupRun& run) const {
    for (size_t at = 0; at < counts_.size(); ++at) {
      if (counts_[at] == 0) continue;
      run.comm.CountRows(run.group, static_cast<int>(at % num_ranks_),
                         static_cast<int>(at / num_ranks_), counts_[at]);
    }
  }

 private:
  const size_t num_ranks_;
  std::vector<std::atomic<int64_t>> counts_;
};

// The phases of a combine of one EP group.
class GroupCombine {
 public:
  GroupCombine(const GroupRun& run, const RouteShape& route,
               std::vector<const CombineParams*> ranks)
      : run_(run),
        shape_(run.comm.shape()),
        route_(route),
        ranks_(std::move(ranks)),
        sums_(run, route, ranks_),
        row_bytes_(route.rows().bytes()) {}

  void PublishDestinations() const {
    const int64_t entries = int64_t{route_.num_tokens} * shape_.num_topk;
    for (size_t rank = 0; rank < ranks_.size(); ++rank) {
      if (!IsHere(rank)) continue;
      std::copy_n(ranks_[rank]->destination, entries, run_.windows[rank].entries);
      if (run_.links == nullptr) continue;
      run_.links->PutEntries(static_cast<int>(rank), run_.windows[rank], route_.num_tokens,
                             /*with_weights=*/false);
    }
  }

  // For every local rank and every token that another process adds up: p_d, and the gradients of
  // its entries.
  void PublishSums() const {
    ForEachToken([](int) { return true; },
                 [this](int source, int64_t token, TokenSums::Scratch& scratch) {
                   const int count = sums_.CollectEntries(source, token, &scratch);
                   for (int i = 0, end = 0; i < count; i = end) {
                     end = TokenSums::EndOfRank(scratch, i, count);
                     const int32_t rank = scratch.entries[i].rank;
                     if (!IsHere(rank) || IsHere(sums_.ReaderOf(source, rank))) continue;
                     sums_.PublishSum(source, token, rank, i, end, &scratch);
                   }
                 });
  }

  // For every local rank and every token of its peers on other nodes: the sum over this node.
  void SendSumsOfNode() const {
    std::vector<std::vector<char>> has_sum(ranks_.size());
    const auto is_of_peer = [this](int source) {
      return sums_.IsRemote(source) && IsHere(ProxyOf(source));
    };
    for (size_t source = 0; source < ranks_.size(); ++source) {
      if (is_of_peer(static_cast<int>(source))) has_sum[source].resize(route_.num_tokens);
    }
    RowCounts counts(ranks_.size());
    ForEachToken(is_of_peer, [&](int source, int64_t token, TokenSums::Scratch& scratch) {
      const int count = sums_.CollectEntries(source, token, &scratch);
      int begin = 0;
      while (begin < count && sums_.IsRemote(scratch.entries[begin].rank)) ++begin;
      const int end = sums_.EndOfNode(scratch, begin, count);
      if (begin == end) return;
      has_sum[source][token] = 1;
      const NodeWindow& window = run_.links->WindowOf(source);
      sums_.SumOfNode(source, token, begin, end,
                      window.sums_to_send + token * route_.rows().wire_bytes(), &scratch);
      CountRanks(ProxyOf(source), begin, end, scratch, &counts);
      if (ranks_[ProxyOf(source)]->row_gradients == nullptr) return;
      float* gradients = window.entry_gradients_to_send + token * shape_.num_topk;
      for (int i = begin; i < end; ++i) {
        const TokenSums::Entry& entry = scratch.entries[i];
        gradients[entry.k] = sums_.GradientOf(source, token, entry);
      }
    });
    counts.AddTo(run_);
    for (size_t source = 0; source < ranks_.size(); ++source) {
      if (has_sum[source].empty()) continue;
      const int to = static_cast<int>(source), proxy = ProxyOf(to);
      run_.links->PutSums(to, has_sum[source], route_.rows().wire_bytes(),
                          ranks_[proxy]->row_gradients != nullptr);
      run_.comm.CountPuts(run_.group, proxy, to,
                          std::count(has_sum[source].begin(), has_sum[source].end(), 1));
    }
  }

  // For every local token: the sum over its ranks, or nodes.
  void SumTokens() const {
    for (const CombineParams* params : ranks_) {
      if (params != nullptr) PreferLargePages(params->out, route_.num_tokens * row_bytes_);
    }
    RowCounts counts(ranks_.size());
    ForEachToken([this](int source) { return IsHere(source); },
                 [&](int source, int64_t token, TokenSums::Scratch& scratch) {
                   const int count = sums_.CollectEntries(source, token, &scratch);
                   sums_.SumToken(source, token, count, &scratch);
                   for (int i = 0, end = 0; i < count; i = end) {
                     end = sums_.EndOfNode(scratch, i, count);
                     const int32_t rank = scratch.entries[i].rank;
                     if (sums_.IsRemote(rank)) {
                       counts.Add(sums_.AdderOf(source, rank), source);
                     } else {
                       CountRanks(source, i, end, scratch, &counts);
                     }
                   }
                 });
    counts.AddTo(run_);
  }

 private:
  bool IsHere(int rank) const { return ranks_[rank] != nullptr; }

  // The rank with the source's index on this node, if there are links.
  int ProxyOf(int source) const { return shape_.RankOnNode(source, run_.links->node()); }

  static void CountRanks(int to, int begin, int end, const TokenSums::Scratch& scratch,
                         RowCounts* counts) {
    for (int i = begin; i < end; i = TokenSums::EndOfRank(scratch, i, end)) {
      counts->Add(scratch.entries[i].rank, to);
    }
  }

  template <typename Select, typename Visit>
  void ForEachToken(Select select, Visit visit) const {
    std::vector<int> sources;
    for (size_t rank = 0; rank < ranks_.size(); ++rank) {
      if (select(static_cast<int>(rank))) sources.push_back(static_cast<int>(rank));
    }
    const int64_t count = static_cast<int64_t>(sources.size()) * route_.num_tokens;
    const int64_t token_bytes = row_bytes_ * (shape_.num_topk + 1);
    ParallelFor(count, kTokensPerRange, token_bytes, [&](int64_t begin, int64_t end) {
      TokenSums::Scratch scratch = sums_.MakeScratch();
      for (int64_t index = begin; index < end; ++index) {
        visit(sources[index / route_.num_tokens], index % route_.num_tokens, scratch);
      }
    });
  }

  const GroupRun& run_;
  const GroupShape& shape_;
  const RouteShape& route_;
  const std::vector<const CombineParams*> ranks_;  // null for ranks of other processes
  const TokenSums sums_;
  const int64_t row_bytes_;
};

}  // namespace

template <>
bool VerbOp<CombineParams>::RunGroup(GroupRun& run) const {
  const GroupCombine combine(run, params_.route, Collect(run));
  if (run.spans_processes()) {
    combine.PublishDestinations();
    if (!run.barrier()) return false;
    combine.PublishSums();
    if (!run.barrier()) return false;
  }
  if (run.links != nullptr) {
    combine.SendSumsOfNode();
    if (!run.barrier()) return false;
  }
  combine.SumTokens();
  return true;
}

template <>
void VerbOp<CombineParams>::Abort(const Communicator& comm) const {
  const RouteShape& route = params_.route;
  const int64_t num_tokens = route.num_tokens;
  FillAsFailed(route.rows().type, params_.out, num_tokens * route.rows().size);
  if (params_.gradients != nullptr) FillNaN(params_.gradients, num_tokens * comm.shape().num_topk);
}

}  // namespace jax_deepep
