// combine on CPU: every source pulls the rows of its tokens from the ranks that hold them and sums
// them in the order of the contract: ranks ascending, on a rank k ascending.
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

// A combine of one EP group. Where the group spans processes, a rank's sums p_d for tokens of other
// processes go through its window, one row per (token, rank), however many of the token's
// experts the rank has. With a wire format, every p_d that crosses ranks is encoded, from float32.
class GroupCombine {
 public:
  GroupCombine(const GroupShape& shape, const RouteShape& route,
               std::vector<const CombineParams*> ranks, const std::vector<RankWindow>& windows)
      : shape_(shape),
        route_(route),
        ranks_(std::move(ranks)),
        windows_(windows),
        expert_major_(route.layout == Layout::kExpertMajor),
        format_(route.rows()),
        wire_{format_.wire, format_.size},
        row_bytes_(format_.bytes()) {}

  void PublishDestinations() const {
    const int64_t entries = int64_t{route_.num_tokens} * shape_.num_topk;
    for (size_t rank = 0; rank < ranks_.size(); ++rank) {
      if (!IsHere(rank)) continue;
      std::copy_n(ranks_[rank]->destination, entries, windows_[rank].entries);
    }
  }

  // For every local rank and every token of another process: p_d, and the gradients of its entries.
  void PublishSums() const {
    ForEachToken([this](int source) { return !IsHere(source); },
                 [this](int source, int64_t token, Scratch& scratch) {
                   const int count = CollectEntries(source, token, &scratch);
                   for (int i = 0, end = 0; i < count; i = end) {
                     end = EndOfRank(scratch, i, count);
                     const int32_t rank = scratch.entries[i].rank;
                     if (IsHere(rank)) PublishSum(source, token, rank, i, end, &scratch);
                   }
                 });
  }

  // For every local token: the sum over its ranks.
  void SumTokens(const GroupRun& run) const {
    for (const CombineParams* params : ranks_) {
      if (params != nullptr) PreferLargePages(params->out, route_.num_tokens * row_bytes_);
    }
    const size_t num_ranks = ranks_.size();
    std::vector<std::atomic<int64_t>> sums_from(num_ranks * num_ranks);
    ForEachToken([this](int source) { return IsHere(source); },
                 [this, &sums_from](int source, int64_t token, Scratch& scratch) {
                   const int count = CollectEntries(source, token, &scratch);
                   SumToken(source, token, count, &scratch);
                   for (int i = 0; i < count; i = EndOfRank(scratch, i, count)) {
                     sums_from[source * ranks_.size() + scratch.entries[i].rank].fetch_add(
                         1, std::memory_order_relaxed);
                   }
                 });
    for (size_t source = 0; source < num_ranks; ++source) {
      if (!IsHere(source)) continue;
      for (size_t rank = 0; rank < num_ranks; ++rank) {
        run.comm.CountRows(run.group, static_cast<int>(rank), static_cast<int>(source),
                           sums_from[source * num_ranks + rank]);
      }
    }
  }

 private:
  // Per thread, so that nothing is allocated per token.
  struct Scratch {
    std::vector<Entry> entries;
    std::vector<Term> terms;
    // With a wire format: one p_d, before and in it, and those of a token after it.
    std::vector<float> sum;
    std::vector<char> encoded;
    std::vector<float> decoded;
  };

  bool IsHere(size_t rank) const { return ranks_[rank] != nullptr; }

  // The end of the entries of one rank, which begin at i.
  static int EndOfRank(const Scratch& scratch, int i, int count) {
    const int32_t rank = scratch.entries[i].rank;
    while (i < count && scratch.entries[i].rank == rank) ++i;
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

  // Where a rank's sum for a token of another process is.
  char* SumOf(int rank, int source, int64_t token) const {
    return windows_[rank].sums +
           (int64_t{source} * shape_.max_tokens + token) * format_.wire_bytes();
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

  float GradientOf(const Entry& entry) const {
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
    SumTermsInFloat32(format_.type, scratch->sum.data(), terms, num_terms, format_.size);
    EncodeRow(RowType::kFloat32, wire_, scratch->sum.data(), to);
  }

  void PublishSum(int source, int64_t token, int rank, int begin, int end, Scratch* scratch) const {
    Term* terms = scratch->terms.data();
    const int num_terms = CollectTerms(*scratch, begin, end, terms);
    char* to = SumOf(rank, source, token);
    if (format_.is_quantized()) {
      EncodeSum(terms, num_terms, to, scratch);
    } else {
      SumTermsOfRank(format_.type, to, terms, num_terms, format_.size);
    }
    if (ranks_[rank]->row_gradients == nullptr) return;
    for (int i = begin; i < end; ++i) {
      GradientsOf(rank, source, token)[scratch->entries[i].k] = GradientOf(scratch->entries[i]);
    }
  }

  void SumToken(int source, int64_t token, int count, Scratch* scratch) const {
    const CombineParams& own = *ranks_[source];
    int num_terms = 0;
    float* decoded = scratch->decoded.data();
    for (int i = 0, end = 0; i < count; i = end) {
      end = EndOfRank(*scratch, i, count);
      const int32_t rank = scratch->entries[i].rank;
      Term* terms = scratch->terms.data() + num_terms;
      if (format_.is_quantized() && rank != source) {
        const char* encoded = scratch->encoded.data();
        if (IsHere(rank)) {
          const int num_terms_there = CollectTerms(*scratch, i, end, terms);
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
        num_terms += CollectTerms(*scratch, i, end, terms);
      }
    }
    const void* bias =
        own.bias == nullptr ? nullptr : static_cast<const char*>(own.bias) + token * row_bytes_;
    SumTerms(format_.type, static_cast<char*>(own.out) + token * row_bytes_, bias,
             scratch->terms.data(), num_terms, format_.size);
    if (own.gradients == nullptr) return;
    float* gradients = own.gradients + token * shape_.num_topk;
    std::fill_n(gradients, shape_.num_topk, 0.0f);
    for (int i = 0; i < count; ++i) {
      const Entry& entry = scratch->entries[i];
      gradients[entry.k] =
          IsHere(entry.rank) ? GradientOf(entry) : GradientsOf(entry.rank, source, token)[entry.k];
    }
  }

  const GroupShape& shape_;
  const RouteShape& route_;
  const std::vector<const CombineParams*> ranks_;  // null for ranks of other processes
  const std::vector<RankWindow>& windows_;
  const bool expert_major_;
  const RowFormat format_;
  const WireRow wire_;
  const int64_t row_bytes_;
};

}  // namespace

template <>
bool VerbOp<CombineParams>::RunGroup(GroupRun& run) const {
  const GroupCombine combine(run.comm.shape(), params_.route, Collect(run), run.windows);
  if (run.spans_processes()) {
    combine.PublishDestinations();
    if (!run.barrier()) return false;
    combine.PublishSums();
    if (!run.barrier()) return false;
  }
  combine.SumTokens(run);
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
