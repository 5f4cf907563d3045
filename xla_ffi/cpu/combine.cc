// combine on CPU: every source pulls the rows of its tokens from the ranks that hold them and sums
// them in the order of the contract: ranks ascending, on a rank k ascending.
#include <algorithm>
#include <vector>

#include "cpu/communicator.h"
#include "cpu/op.h"
#include "cpu/row_math.h"
#include "cpu/threads.h"

namespace jax_deepep {
namespace {

constexpr int64_t kTokensPerRange = 16;

// One entry of a token that went somewhere.
struct Entry {
  int32_t rank;
  int32_t row;
  int32_t k;
};

// Collect the entries of a token by rank, and by k on a rank; return how many there are.
int CollectEntries(const int32_t* destination, int num_topk, int32_t capacity, Entry* entries) {
  int count = 0;
  for (int k = 0; k < num_topk; ++k) {
    if (destination[k] == kNone) continue;
    const Entry entry{destination[k] / capacity, destination[k] % capacity, k};
    int at = count++;
    for (; at > 0 && entries[at - 1].rank > entry.rank; --at) entries[at] = entries[at - 1];
    entries[at] = entry;
  }
  return count;
}

}  // namespace

template <>
const char* CombineOp::name() const {
  return "combine";
}

template <>
void CombineOp::RunGroup(Communicator& comm, int group,
                         const std::vector<std::unique_ptr<Op>>& ops) const {
  const std::vector<const CombineParams*> ranks = Collect(ops);
  const GroupShape& shape = comm.shape();
  const RouteShape& route = params_.route;
  const int num_topk = shape.num_topk;
  const bool expert_major = route.layout == Layout::kExpertMajor;
  const int64_t row_bytes = shape.hidden_size * static_cast<int64_t>(BytesOf(route.row_type));
  for (const CombineParams* params : ranks) {
    PreferLargePages(params->out, route.num_tokens * row_bytes);
  }

  // Rows that a token takes from a rank are summed there first: (token, rank) is what travels.
  std::vector<std::vector<int64_t>> sums_from(ranks.size(), std::vector<int64_t>(ranks.size(), 0));
  std::mutex sums_mutex;

  const int64_t num_tokens = int64_t{route.num_tokens} * shape.num_ranks;
  const int64_t token_bytes = row_bytes * (num_topk + 1);
  ParallelFor(num_tokens, kTokensPerRange, token_bytes, [&](int64_t begin, int64_t end) {
    std::vector<Entry> entries(num_topk);
    std::vector<Term> terms(num_topk);
    std::vector<std::pair<int, int>> seen;  // (source, rank) of each sum
    for (int64_t index = begin; index < end; ++index) {
      const int source = static_cast<int>(index / route.num_tokens);
      const int64_t token = index % route.num_tokens;
      const CombineParams& own = *ranks[source];
      const int count = CollectEntries(own.destination + token * num_topk, num_topk,
                                       route.capacity, entries.data());
      int num_terms = 0;
      for (int i = 0; i < count; ++i) {
        const Entry& entry = entries[i];
        const CombineParams& peer = *ranks[entry.rank];
        const bool first_on_rank = i == 0 || entries[i - 1].rank != entry.rank;
        if (first_on_rank) seen.emplace_back(source, entry.rank);
        // Token-major, all entries of a token on a rank share one row.
        if (!expert_major && !first_on_rank) continue;
        terms[num_terms++] = {static_cast<const char*>(peer.y) + entry.row * row_bytes,
                              peer.weights == nullptr ? 1.0f : peer.weights[entry.row], entry.rank};
      }
      const void* bias = own.bias == nullptr
                             ? nullptr
                             : static_cast<const char*>(own.bias) + token * row_bytes;
      SumTerms(route.row_type, static_cast<char*>(own.out) + token * row_bytes, bias, terms.data(),
               num_terms, shape.hidden_size);
      if (own.gradients == nullptr) continue;
      float* gradients = own.gradients + token * num_topk;
      std::fill_n(gradients, num_topk, 0.0f);
      for (int i = 0; i < count; ++i) {
        const Entry& entry = entries[i];
        const int64_t at = expert_major ? entry.row : int64_t{entry.row} * num_topk + entry.k;
        gradients[entry.k] = ranks[entry.rank]->row_gradients[at];
      }
    }
    std::lock_guard<std::mutex> lock(sums_mutex);
    for (const auto& [source, rank] : seen) ++sums_from[source][rank];
  });

  for (size_t source = 0; source < ranks.size(); ++source) {
    for (size_t rank = 0; rank < ranks.size(); ++rank) {
      comm.CountRows(group, static_cast<int>(rank), static_cast<int>(source),
                     sums_from[source][rank]);
    }
  }
}

template <>
void CombineOp::Abandon(const Communicator& comm) const {
  const RouteShape& route = params_.route;
  const int64_t num_tokens = route.num_tokens;
  FillNaN(route.row_type, params_.out, num_tokens * comm.shape().hidden_size);
  if (params_.gradients != nullptr) FillNaN(params_.gradients, num_tokens * comm.shape().num_topk);
}

}  // namespace jax_deepep
