// dispatch on CPU: the algorithm in plain C++, to be read first.
//
// 1. Count: every source's entries per row group.
// 2. Plan: prefix sums over the sources give each entry its final row, and drop what does not fit.
// 3. Address: write both ends of every route.
// 4. Move: every rank pulls its rows from the sources.
#include "interface/dispatch.h"

#include <algorithm>
#include <vector>

#include "cpu/communicator.h"
#include "cpu/op.h"
#include "cpu/row_math.h"
#include "cpu/row_moves.h"
#include "cpu/threads.h"
#include "routing/group_rows.h"

namespace jax_deepep {
namespace {

// Routes of one dispatch of one EP group. Row groups are numbered over all ranks:
// rank * groups_per_rank + group on that rank.
class Router {
 public:
  Router(const GroupShape& shape, const std::vector<DispatchParams>& ranks)
      : shape_(shape),
        route_(ranks[0].route),
        ranks_(ranks),
        groups_per_rank_(NumRowGroups(shape, route_)),
        num_groups_(groups_per_rank_ * shape.num_ranks),
        first_(static_cast<size_t>(shape.num_ranks) * num_groups_, 0),
        groups_(num_groups_),
        received_(shape.num_ranks, 0) {}

  void Route() {
    const int64_t routing_bytes = int64_t{route_.num_tokens} * shape_.num_topk * 16;
    ParallelFor(shape_.num_ranks, 1, routing_bytes, [this](int64_t begin, int64_t end) {
      for (int64_t source = begin; source < end; ++source) Count(static_cast<int>(source));
    });
    Plan();
    ParallelFor(shape_.num_ranks, 1, routing_bytes, [this](int64_t begin, int64_t end) {
      for (int64_t source = begin; source < end; ++source) Address(static_cast<int>(source));
    });
    ParallelFor(shape_.num_ranks, 1, int64_t{route_.capacity} * 8,
                [this](int64_t begin, int64_t end) {
                  for (int64_t rank = begin; rank < end; ++rank) FinishRank(static_cast<int>(rank));
                });
  }

 private:
  int32_t* First(int source) { return first_.data() + static_cast<size_t>(source) * num_groups_; }

  // The row group of an expert, over all ranks.
  int32_t GroupOf(int32_t expert) const {
    return route_.layout == Layout::kExpertMajor ? expert : expert / shape_.num_local_experts();
  }

  // Call visit(token, k, topk_idx of the token) for the valid entries of a source, in order.
  template <typename Visit>
  void ForEachEntry(int source, Visit visit) const {
    const int32_t* topk_idx = ranks_[source].topk_idx;
    for (int32_t token = 0; token < route_.num_tokens; ++token, topk_idx += shape_.num_topk) {
      for (int k = 0; k < shape_.num_topk; ++k) {
        if (IsValidEntry(topk_idx, k, shape_.num_experts)) visit(token, k, topk_idx);
      }
    }
  }

  bool EntryMakesRow(const int32_t* topk_idx, int k) const {
    return MakesRow(topk_idx, k, shape_.num_experts, shape_.num_local_experts(), route_.layout);
  }

  void Count(int source) {
    int32_t* counts = First(source);
    ForEachEntry(source, [&](int32_t, int k, const int32_t* topk_idx) {
      if (EntryMakesRow(topk_idx, k)) ++counts[GroupOf(topk_idx[k])];
    });
  }

  void Plan() {
    for (int rank = 0; rank < shape_.num_ranks; ++rank) {
      int64_t offset = 0;
      for (int local = 0; local < groups_per_rank_; ++local) {
        const int group = rank * groups_per_rank_ + local;
        int32_t before = 0;
        for (int source = 0; source < shape_.num_ranks; ++source) {
          int32_t& first = First(source)[group];
          const int32_t count = first;
          first = before;
          before += count;
        }
        groups_[group] = LayOutGroup(before, route_, &offset);
        received_[rank] += before;
      }
    }
  }

  void Address(int source) {
    const int num_topk = shape_.num_topk;
    const DispatchParams& own = ranks_[source];
    if (own.destination != nullptr) {
      std::fill_n(own.destination, int64_t{route_.num_tokens} * num_topk, kNone);
    }
    std::vector<int32_t> next(First(source), First(source) + num_groups_);
    ForEachEntry(source, [&](int32_t token, int k, const int32_t* topk_idx) {
      const int32_t expert = topk_idx[k];
      const int rank = expert / shape_.num_local_experts();
      const int32_t group = GroupOf(expert);
      const bool makes_row = EntryMakesRow(topk_idx, k);
      // A token-major entry that makes no row shares the last row of its token.
      const int32_t position = makes_row ? next[group]++ : next[group] - 1;
      if (position >= groups_[group].kept) return;
      const int64_t row = groups_[group].offset + position;
      const int64_t entry = int64_t{token} * num_topk + k;
      if (own.destination != nullptr) {
        own.destination[entry] = static_cast<int32_t>(int64_t{rank} * route_.capacity + row);
      }
      const DispatchParams& peer = ranks_[rank];
      if (peer.source == nullptr) return;
      if (makes_row) peer.source[row] = source * shape_.max_tokens + token;
      if (route_.layout == Layout::kExpertMajor) {
        peer.weights[row] = own.topk_weights[entry];
        return;
      }
      float* weights = peer.weights + row * num_topk;
      int32_t* local_experts = peer.local_experts + row * num_topk;
      if (makes_row) {
        std::fill_n(weights, num_topk, 0.0f);
        std::fill_n(local_experts, num_topk, kNone);
      }
      weights[k] = own.topk_weights[entry];
      local_experts[k] = expert % shape_.num_local_experts();
    });
  }

  // Fill in the padding rows, and the counts.
  void FinishRank(int rank) {
    const DispatchParams& own = ranks_[rank];
    if (own.source == nullptr) return;
    int64_t kept = 0, end = 0;
    for (int local = 0; local < groups_per_rank_; ++local) {
      const GroupRows& group = groups_[rank * groups_per_rank_ + local];
      own.group_sizes[local] = static_cast<int32_t>(group.padded);
      own.num_rows[local] = static_cast<int32_t>(group.kept);
      kept += group.kept;
      if (group.kept == 0) continue;
      MarkEmpty(own, group.offset + group.kept, group.offset + group.padded);
      end = group.offset + group.padded;
    }
    MarkEmpty(own, end, route_.capacity);
    *own.num_received = static_cast<int32_t>(received_[rank]);
    *own.num_dropped = static_cast<int32_t>(received_[rank] - kept);
  }

  void MarkEmpty(const DispatchParams& own, int64_t begin, int64_t end) const {
    const int64_t count = end - begin;
    std::fill_n(own.source + begin, count, kNone);
    if (route_.layout == Layout::kExpertMajor) {
      std::fill_n(own.weights + begin, count, 0.0f);
    } else {
      std::fill_n(own.weights + begin * shape_.num_topk, count * shape_.num_topk, 0.0f);
      std::fill_n(own.local_experts + begin * shape_.num_topk, count * shape_.num_topk, kNone);
    }
  }

  const GroupShape& shape_;
  const RouteShape& route_;
  const std::vector<DispatchParams>& ranks_;  // results are null for ranks of other processes
  const int32_t groups_per_rank_;
  const int32_t num_groups_;
  std::vector<int32_t> first_;  // [source][group]: counts, then entries of earlier sources
  std::vector<GroupRows> groups_;
  std::vector<int64_t> received_;  // per rank
};

int32_t CountInvalid(const GroupShape& shape, const DispatchParams& params) {
  int32_t count = 0;
  const int32_t* topk_idx = params.topk_idx;
  for (int32_t token = 0; token < params.route.num_tokens; ++token, topk_idx += shape.num_topk) {
    for (int k = 0; k < shape.num_topk; ++k) {
      count += topk_idx[k] != kNone && !IsValidEntry(topk_idx, k, shape.num_experts);
    }
  }
  return count;
}

}  // namespace

template <>
bool VerbOp<DispatchParams>::RunGroup(GroupRun& run) const {
  const GroupShape& shape = run.comm.shape();
  const RouteShape& route = params_.route;
  const std::vector<const DispatchParams*> here = Collect(run);
  std::vector<const void*> x;
  for (const DispatchParams* params : here) x.push_back(params == nullptr ? nullptr : params->x);
  const SentRows sent(run, route, x);
  if (run.spans_processes()) {
    for (size_t rank = 0; rank < here.size(); ++rank) {
      if (here[rank] == nullptr) continue;
      const RankWindow& window = run.windows[rank];
      const size_t entries = static_cast<size_t>(route.num_tokens) * shape.num_topk;
      std::copy_n(here[rank]->topk_idx, entries, window.entries);
      std::copy_n(here[rank]->topk_weights, entries, window.entry_weights);
      if (run.links == nullptr) continue;
      NeededTokens needed(shape, route.num_tokens);
      for (size_t entry = 0; entry < entries; ++entry) {
        const int64_t token = entry / shape.num_topk;
        const int32_t* of_token = window.entries + token * shape.num_topk;
        const int k = static_cast<int>(entry % shape.num_topk);
        if (!IsValidEntry(of_token, k, shape.num_experts)) continue;
        needed.Add(token, of_token[k] / shape.num_local_experts());
      }
      PutTokens(run, route, sent, static_cast<int>(rank), needed, /*with_entries=*/true);
    }
    if (!run.barrier()) return false;
  }
  std::vector<DispatchParams> ranks;
  for (size_t rank = 0; rank < here.size(); ++rank) {
    DispatchParams params;
    if (here[rank] != nullptr) {
      params = *here[rank];
    } else {
      params.route = route;
      params.topk_idx = run.windows[rank].entries;
      params.topk_weights = run.windows[rank].entry_weights;
    }
    ranks.push_back(params);
  }

  Router(shape, ranks).Route();

  std::vector<RowMove> moves;
  for (size_t rank = 0; rank < here.size(); ++rank) {
    if (here[rank] == nullptr) continue;
    const DispatchParams& params = ranks[rank];
    const int32_t num_invalid = CountInvalid(shape, params);
    *params.num_invalid = num_invalid;
    if (num_invalid > 0) {
      run.comm.ReportInvalidRouting(run.group, static_cast<int>(rank), num_invalid);
    }
    RowMove move;
    move.rank = static_cast<int>(rank);
    move.source = params.source;
    move.group_sizes = params.group_sizes;
    move.rows = params.tokens;
    move.kept = params.kept;
    moves.push_back(move);
  }
  MoveRows(run, route, sent, moves);
  return true;
}

template <>
void VerbOp<DispatchParams>::Abort(const Communicator& comm) const {
  const GroupShape& shape = comm.shape();
  const RouteShape& route = params_.route;
  const int64_t capacity = route.capacity, num_topk = shape.num_topk;
  const bool expert_major = route.layout == Layout::kExpertMajor;
  FillReceivedAsFailed(route, params_.tokens, params_.kept);
  FillNaN(params_.weights, expert_major ? capacity : capacity * num_topk);
  std::fill_n(params_.source, capacity, kNone);
  std::fill_n(params_.destination, route.num_tokens * num_topk, kNone);
  if (!expert_major) std::fill_n(params_.local_experts, capacity * num_topk, kNone);
  std::fill_n(params_.group_sizes, NumRowGroups(shape, route), 0);
  std::fill_n(params_.num_rows, NumRowGroups(shape, route), 0);
  *params_.num_received = *params_.num_dropped = *params_.num_invalid = 0;
}

}  // namespace jax_deepep
