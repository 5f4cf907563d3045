#include "cpu/token_sums.h"

#include "cpu/wire_rows.h"

namespace jax_deepep {

TokenSums::TokenSums(const GroupRun& run, const RouteShape& route,
                     std::vector<const CombineParams*> ranks)
    : run_(run),
      shape_(run.comm.shape()),
      route_(route),
      ranks_(std::move(ranks)),
      windows_(run.windows),
      num_nodes_(shape_.num_nodes()),
      expert_major_(route.layout == Layout::kExpertMajor),
      format_(route.rows()),
      wire_{format_.wire, format_.size},
      row_bytes_(format_.bytes()),
      sum_bytes_(num_nodes_ == 1 ? format_.wire_bytes()
                                 : std::max(format_.wire_bytes(), row_bytes_)) {}

TokenSums::Scratch TokenSums::MakeScratch() const {
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
  return scratch;
}

// Collect the entries of a token by rank, and by k on a rank; return how many there are.
int TokenSums::CollectEntries(int source, int64_t token, Scratch* scratch) const {
  const int32_t* destination =
      (IsHere(source) ? ranks_[source]->destination : windows_[source].entries) +
      token * shape_.num_topk;
  std::vector<Entry>& entries = scratch->entries;
  int count = 0;
  for (int k = 0; k < shape_.num_topk; ++k) {
    if (destination[k] < 0) continue;
    const Entry entry{destination[k] / route_.capacity, destination[k] % route_.capacity, k};
    if (entry.rank >= shape_.num_ranks) continue;  // only if a peer's memory has been overwritten
    int at = count++;
    for (; at > 0 && entries[at - 1].rank > entry.rank; --at) entries[at] = entries[at - 1];
    entries[at] = entry;
  }
  return count;
}

float TokenSums::GradientOf(int source, int64_t token, const Entry& entry) const {
  if (IsRemote(entry.rank)) {
    const float* of_source = run_.links->WindowOf(AdderOf(source, entry.rank)).entry_gradients;
    return of_source[token * shape_.num_topk + entry.k];
  }
  if (!IsHere(entry.rank)) return GradientsOf(entry.rank, source, token)[entry.k];
  const int64_t row = entry.row;
  return ranks_[entry.rank]->row_gradients[expert_major_ ? row : row * shape_.num_topk + entry.k];
}

// Collect the terms of a rank's entries; return how many there are.
int TokenSums::CollectTerms(const Scratch& scratch, int begin, int end, Term* terms) const {
  // Token-major, all entries of a token on a rank share one row.
  if (!expert_major_) end = begin + 1;
  for (int i = begin; i < end; ++i) *terms++ = RowTerm(scratch.entries[i]);
  return end - begin;
}

// p_d in the wire format.
void TokenSums::EncodeSum(const Term* terms, int num_terms, char* to, Scratch* scratch) const {
  SumRankInFloat32(format_.type, scratch->sum.data(), terms, num_terms, format_.size);
  EncodeRow(RowType::kFloat32, wire_, scratch->sum.data(), to);
}

void TokenSums::PublishSum(int source, int64_t token, int rank, int begin, int end,
                           Scratch* scratch) const {
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
bool TokenSums::IsEncoded(int source, int rank) const {
  return format_.is_quantized() && rank != AdderOf(source, rank);
}

// Collect the terms of the entries [begin, end), of ranks whose sums are read here; return how
// many.
int TokenSums::CollectSums(int source, int64_t token, int begin, int end, Scratch* scratch) const {
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
void TokenSums::SumOfNode(int source, int64_t token, int begin, int end, char* to,
                          Scratch* scratch) const {
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
Term TokenSums::TermOfNode(int source, int64_t token, int begin, int end, float* sum,
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

void TokenSums::SumToken(int source, int64_t token, int count, Scratch* scratch) const {
  const CombineParams& own = *ranks_[source];
  const Term* terms = scratch->terms.data();
  int num_terms = 0;
  if (num_nodes_ == 1) {
    num_terms = CollectSums(source, token, 0, count, scratch);
  } else {
    terms = scratch->of_nodes.data();
    for (int i = 0, end = 0; i < count; i = end) {
      end = EndOfNode(*scratch, i, count);
      float* sum = scratch->sums_of_nodes.data() + size_t{1} * num_terms * format_.size;
      scratch->of_nodes[num_terms++] = TermOfNode(source, token, i, end, sum, scratch);
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

}  // namespace jax_deepep
