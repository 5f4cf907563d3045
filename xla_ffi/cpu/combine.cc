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
#include "cpu/row_math.h"
#include "cpu/threads.h"
#include "cpu/wire_rows.h"

namespace jax_deepep {
namespace {

constexpr int64_t kTokensPerRange = 16;

// An entry of a token that has a row.
struct Entry {
  int32_t rank;
  int32_t row;
  int32_t k;
};

// A combine of one EP group. Where the group spans processes, a rank's sums p_d for tokens that
// other processes add up go through its window, one row per (token, rank), however many of the
// token's experts the rank has. With a wire format, every sum that crosses ranks is encoded, from
// float32.
class GroupCombine {
 public:
  GroupCombine(const GroupRun& run, const RouteShape& route,
               std::vector<const CombineParams*> ranks)
      : run_(run),
        shape_(run.comm.shape()),
        route_(route),
        ranks_(std::move(ranks)),
        windows_(run.windows),
        node_size_(shape_.node_size()),
        num_nodes_(shape_.num_nodes()),
        expert_major_(route.layout == Layout::kExpertMajor),
        format_(route.rows()),
        wire_{format_.wire, format_.size},
        row_bytes_(format_.bytes()),
        sum_bytes_(num_nodes_ == 1 ? format_.wire_bytes()
                                   : std::max(format_.wire_bytes(), row_bytes_)) {}

  void PublishDestinations() const {
    const int64_t entries = int64_t{route_.num_tokens} * shape_.num_topk;
    for (size_t rank = 0; rank < ranks_.size(); ++rank) {
      if (!IsHere(rank)) continue;
      std::copy_n(ranks_[rank]->destination, entries, windows_[rank].entries);
      if (run_.links == nullptr) continue;
      run_.links->PutEntries(static_cast<int>(rank), windows_[rank], route_.num_tokens,
                             /*with_weights=*/false);
    }
  }

  // For every local rank and every token that another process adds up: p_d, and the gradients of
  // its entries.
  void PublishSums() const {
    ForEachToken([](int) { return true; },
                 [this](int source, int64_t token, Scratch& scratch) {
                   const int count = CollectEntries(source, token, &scratch);
                   for (int i = 0, end = 0; i < count; i = end) {
                     end = EndOfRank(scratch, i, count);
                     const int32_t rank = scratch.entries[i].rank;
                     if (!IsHere(rank) || IsHere(ReaderOf(source, rank))) continue;
                     PublishSum(source, token, rank, i, end, &scratch);
                   }
                 });
  }

  // For every local rank and every token of its peers on other nodes: the sum over this node.
  void SendSumsOfNode() const {
    std::vector<std::vector<char>> has_sum(ranks_.size());
    const auto is_for_us = [this](int source) {
      return IsHere(ProxyOf(source)) && !IsHere(source);
    };
    for (size_t source = 0; source < ranks_.size(); ++source) {
      if (is_for_us(static_cast<int>(source))) has_sum[source].resize(route_.num_tokens);
    }
    Counters sums_from(ranks_.size() * ranks_.size());
    ForEachToken(is_for_us, [&](int source, int64_t token, Scratch& scratch) {
      const int count = CollectEntries(source, token, &scratch);
      const int proxy = ProxyOf(source);
      int begin = 0;
      while (begin < count && NodeOf(scratch.entries[begin].rank) != NodeOf(proxy)) ++begin;
      const int end = EndOfNode(scratch, begin, count);
      if (begin == end) return;
      has_sum[source][token] = 1;
      const NodeWindow& window = run_.links->WindowOf(source);
      SumOfNode(source, token, begin, end, window.sums_to_send + token * format_.wire_bytes(),
                &scratch);
      CountSums(proxy, begin, end, scratch, &sums_from);
      if (ranks_[proxy]->row_gradients == nullptr) return;
      float* gradients = window.entry_gradients_to_send + token * shape_.num_topk;
      for (int i = begin; i < end; ++i) {
        gradients[scratch.entries[i].k] = GradientOf(source, token, scratch.entries[i]);
      }
    });
    for (size_t source = 0; source < ranks_.size(); ++source) {
      if (has_sum[source].empty()) continue;
      const int to = static_cast<int>(source), proxy = ProxyOf(to);
      run_.links->PutSums(to, has_sum[source], format_.wire_bytes(),
                          ranks_[proxy]->row_gradients != nullptr);
      run_.comm.CountPuts(run_.group, proxy, to,
                          std::count(has_sum[source].begin(), has_sum[source].end(), 1));
    }
    Count(sums_from);
  }

  // For every local token: the sum over its ranks, or nodes.
  void SumTokens() const {
    for (const CombineParams* params : ranks_) {
      if (params != nullptr) PreferLargePages(params->out, route_.num_tokens * row_bytes_);
    }
    Counters sums_from(ranks_.size() * ranks_.size());
    ForEachToken([this](int source) { return IsHere(source); },
                 [&](int source, int64_t token, Scratch& scratch) {
                   const int count = CollectEntries(source, token, &scratch);
                   SumToken(source, token, count, &scratch, &sums_from);
                 });
    Count(sums_from);
  }

 private:
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

  using Counters = std::vector<std::atomic<int64_t>>;  // [R to, R from]

  bool IsHere(size_t rank) const { return ranks_[rank] != nullptr; }
  bool IsRemote(int rank) const { return run_.links != nullptr && !run_.links->IsOnThisNode(rank); }
  int NodeOf(int rank) const { return rank / node_size_; }

  // The rank that adds up p_d of a rank for tokens of a source: of the rank's node, with the index
  // of the source. With one node the source itself.
  int AdderOf(int source, int rank) const {
    return NodeOf(rank) * node_size_ + source % node_size_;
  }
  // The rank that reads it: the source itself where nodes share memory.
  int ReaderOf(int source, int rank) const {
    return run_.links == nullptr ? source : AdderOf(source, rank);
  }
  // The rank with the source's index on this node, if there are links.
  int ProxyOf(int source) const {
    const int node = run_.links == nullptr ? NodeOf(source) : run_.links->node();
    return node * node_size_ + source % node_size_;
  }

  void CountSums(int to, int begin, int end, const Scratch& scratch, Counters* sums_from) const {
    for (int i = begin; i < end; i = EndOfRank(scratch, i, end)) {
      CountSum(to, scratch.entries[i].rank, sums_from);
    }
  }
  void CountSum(int to, int from, Counters* sums_from) const {
    (*sums_from)[to * ranks_.size() + from].fetch_add(1, std::memory_order_relaxed);
  }
  void Count(const Counters& sums_from) const {
    for (size_t at = 0; at < sums_from.size(); ++at) {
      if (sums_from[at] == 0) continue;
      run_.comm.CountRows(run_.group, static_cast<int>(at % ranks_.size()),
                          static_cast<int>(at / ranks_.size()), sums_from[at]);
    }
  }

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

  template <typename Select, typename Visit>
  void ForEachToken(Select select, Visit visit) const {
    std::vector<int> sources;
    for (size_t rank = 0; rank < ranks_.size(); ++rank) {
      if (select(static_cast<int>(rank))) sources.push_back(static_cast<int>(rank));
    }
    const int64_t count = static_cast<int64_t>(sources.size()) * route_.num_tokens;
    const int64_t token_bytes = row_bytes_ * (shape_.num_topk + 1);
    ParallelFor(count, kTokensPerRange, token_bytes, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      scratch.entries.resize(shape_.num_topk);
      scratch.terms.resize(shape_.num_topk);
      if (format_.is_quantized()) {
        scratch.sum.resize(format_.size);
        scratch.encoded.resize(wire_.bytes());
        scratch.decoded.resize(size_t{1} * shape_.num_topk * format_.size);
      }
      if (num_nodes_ > 1) {
        const int most = std::min(num_nodes_, shape_.num_topk);
        scratch.of_nodes.resize(most);
        scratch.sums_of_nodes.resize(size_t{1} * most * format_.size);
      }
      for (int64_t index = begin; index < end; ++index) {
        visit(sources[index / route_.num_tokens], index % route_.num_tokens, scratch);
      }
    });
  }

  // Collect the entries of a token by rank, and by k on a rank; return how many there are.
  int CollectEntries(int source, int64_t token, Scratch* scratch) const {
    const int32_t* destination =
        (IsHere(source) ? ranks_[source]->destination : windows_[source].entries) +
        token * shape_.num_topk;
    std::vector<Entry>& entries = scratch->entries;
    int count = 0;
    for (int k = 0; k < shape_.num_topk; ++k) {
      if (destination[k] == kNone) continue;
      const Entry entry{destination[k] / route_.capacity, destination[k] % route_.capacity, k};
      int at = count++;
      for (; at > 0 && entries[at - 1].rank > entry.rank; --at) entries[at] = entries[at - 1];
      entries[at] = entry;
    }
    return count;
  }

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

  float GradientOf(int source, int64_t token, const Entry& entry) const {
    if (IsRemote(entry.rank)) {
      const float* of_source = run_.links->WindowOf(AdderOf(source, entry.rank)).entry_gradients;
      return of_source[token * shape_.num_topk + entry.k];
    }
    if (!IsHere(entry.rank)) return GradientsOf(entry.rank, source, token)[entry.k];
    const int64_t row = entry.row;
    return ranks_[entry.rank]->row_gradients[expert_major_ ? row : row * shape_.num_topk + entry.k];
  }

  // Collect the terms of a rank's entries; return how many there are.
  int CollectTerms(const Scratch& scratch, int begin, int end, Term* terms) const {
    // Token-major, all entries of a token on a rank share one row.
    if (!expert_major_) end = begin + 1;
    for (int i = begin; i < end; ++i) *terms++ = RowTerm(scratch.entries[i]);
    return end - begin;
  }

  // p_d in the wire format.
  void EncodeSum(const Term* terms, int num_terms, char* to, Scratch* scratch) const {
    SumRankInFloat32(format_.type, scratch->sum.data(), terms, num_terms, format_.size);
    EncodeRow(RowType::kFloat32, wire_, scratch->sum.data(), to);
  }

  void PublishSum(int source, int64_t token, int rank, int begin, int end, Scratch* scratch) const {
    Term* terms = scratch->terms.data();
    const int num_terms = CollectTerms(*scratch, begin, end, terms);
    char* to = SumOf(rank, source, token);
    if (IsEncoded(source, rank)) {
      EncodeSum(terms, num_terms, to, scratch);
    } else {
      SumOnlyTerms(format_.type, to, terms, num_terms, format_.size);
    }
    if (ranks_[rank]->row_gradients == nullptr) return;
    for (int i = begin; i < end; ++i) {
      const Entry& entry = scratch->entries[i];
      GradientsOf(rank, source, token)[entry.k] = GradientOf(source, token, entry);
    }
  }

  // Whether p_d of a rank crosses a link in a wire format.
  bool IsEncoded(int source, int rank) const {
    return format_.is_quantized() && rank != AdderOf(source, rank);
  }

  // Collect the terms of the entries [begin, end), of ranks whose sums are read here; return how
  // many.
  int CollectSums(int source, int64_t token, int begin, int end, Scratch* scratch) const {
    int num_terms = 0;
    float* decoded = scratch->decoded.data();
    for (int i = begin, next = 0; i < end; i = next) {
      next = EndOfRank(*scratch, i, end);
      const int32_t rank = scratch->entries[i].rank;
      Term* terms = scratch->terms.data() + num_terms;
      if (IsEncoded(source, rank)) {
        const char* encoded = scratch->encoded.data();
        if (IsHere(rank)) {
          const int num_terms_there = CollectTerms(*scratch, i, next, terms);
          EncodeSum(terms, num_terms_there, scratch->encoded.data(), scratch);
        } else {
          encoded = SumOf(rank, source, token);
        }
        DecodeRow(RowType::kFloat32, wire_, encoded, decoded);
        *terms = {decoded, 1.0f, rank, /*is_sum=*/true};
        ++num_terms;
        decoded += format_.size;
      } else if (!IsHere(rank)) {
        *terms = {SumOf(rank, source, token), 1.0f, rank};
        ++num_terms;
      } else {
        num_terms += CollectTerms(*scratch, i, next, terms);
      }
    }
    return num_terms;
  }

  // The sum of a node for a token: for another node in the wire format, if any, else rounded.
  void SumOfNode(int source, int64_t token, int begin, int end, char* to, Scratch* scratch) const {
    const int num_terms = CollectSums(source, token, begin, end, scratch);
    const Term* terms = scratch->terms.data();
    if (!format_.is_quantized() || NodeOf(scratch->entries[begin].rank) == NodeOf(source)) {
      SumOnlyTerms(format_.type, to, terms, num_terms, format_.size);
      return;
    }
    SumNodeInFloat32(format_.type, scratch->sum.data(), terms, num_terms, format_.size);
    EncodeRow(RowType::kFloat32, wire_, scratch->sum.data(), to);
  }

  // The term of a node.
  Term TermOfNode(int source, int64_t token, int begin, int end, float* sum,
                  Scratch* scratch) const {
    const int32_t rank = scratch->entries[begin].rank;
    const bool is_encoded = format_.is_quantized() && NodeOf(rank) != NodeOf(source);
    const char* row = is_encoded ? scratch->encoded.data() : reinterpret_cast<const char*>(sum);
    if (IsRemote(rank)) {
      const char* sums = run_.links->WindowOf(AdderOf(source, rank)).sums;
      row = sums + token * format_.wire_bytes();
    } else {
      SumOfNode(source, token, begin, end, const_cast<char*>(row), scratch);
    }
    if (is_encoded) {
      DecodeRow(RowType::kFloat32, wire_, row, sum);
      row = reinterpret_cast<const char*>(sum);
    }
    return {row, 1.0f, NodeOf(rank), is_encoded};
  }

  void SumToken(int source, int64_t token, int count, Scratch* scratch, Counters* sums_from) const {
    const CombineParams& own = *ranks_[source];
    const Term* terms = scratch->terms.data();
    int num_terms = 0;
    if (num_nodes_ == 1) {
      num_terms = CollectSums(source, token, 0, count, scratch);
      CountSums(source, 0, count, *scratch, sums_from);
    } else {
      terms = scratch->of_nodes.data();
      for (int i = 0, end = 0; i < count; i = end) {
        end = EndOfNode(*scratch, i, count);
        float* sum = scratch->sums_of_nodes.data() + size_t{1} * num_terms * format_.size;
        scratch->of_nodes[num_terms++] = TermOfNode(source, token, i, end, sum, scratch);
        const int32_t rank = scratch->entries[i].rank;
        if (IsRemote(rank)) {
          CountSum(source, AdderOf(source, rank), sums_from);
        } else {
          CountSums(source, i, end, *scratch, sums_from);
        }
      }
    }
    const void* bias =
        own.bias == nullptr ? nullptr : static_cast<const char*>(own.bias) + token * row_bytes_;
    SumTerms(format_.type, static_cast<char*>(own.out) + token * row_bytes_, bias, terms, num_terms,
             format_.size);
    if (own.gradients == nullptr) return;
    float* gradients = own.gradients + token * shape_.num_topk;
    std::fill_n(gradients, shape_.num_topk, 0.0f);
    for (int i = 0; i < count; ++i) {
      const Entry& entry = scratch->entries[i];
      gradients[entry.k] = GradientOf(source, token, entry);
    }
  }

  const GroupRun& run_;
  const GroupShape& shape_;
  const RouteShape& route_;
  const std::vector<const CombineParams*> ranks_;  // null for ranks of other processes
  const std::vector<RankWindow>& windows_;
  const int node_size_, num_nodes_;
  const bool expert_major_;
  const RowFormat format_;
  const WireRow wire_;
  const int64_t row_bytes_;
  const int64_t sum_bytes_;  // of p_d in a window
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
