// cached_dispatch on CPU.
#include "interface/cached_dispatch.h"

#include <vector>

#include "cpu/communicator.h"
#include "cpu/op.h"
#include "cpu/row_math.h"
#include "cpu/row_moves.h"

namespace jax_deepep {

template <>
bool VerbOp<CachedDispatchParams>::RunGroup(GroupRun& run) const {
  const std::vector<const CachedDispatchParams*> here = Collect(run);
  std::vector<const void*> x;
  for (const CachedDispatchParams* params : here) {
    x.push_back(params == nullptr ? nullptr : params->x);
  }
  const SentRows sent(run, params_.route, x);
  for (size_t rank = 0; run.links != nullptr && rank < here.size(); ++rank) {
    if (here[rank] == nullptr) continue;
    const RouteShape& route = params_.route;
    const int num_topk = run.comm.shape().num_topk;
    NeededTokens needed(run.comm.shape(), route.num_tokens);
    for (int64_t entry = 0; entry < int64_t{route.num_tokens} * num_topk; ++entry) {
      const int32_t destination = here[rank]->destination[entry];
      if (destination != kNone) needed.Add(entry / num_topk, destination / route.capacity);
    }
    PutTokens(run, route, sent, static_cast<int>(rank), needed, /*with_entries=*/false);
  }
  if (run.spans_processes() && !run.barrier()) return false;

  std::vector<RowMove> moves;
  for (size_t rank = 0; rank < here.size(); ++rank) {
    const CachedDispatchParams* params = here[rank];
    if (params == nullptr) continue;
    RowMove move;
    move.rank = static_cast<int>(rank);
    move.source = params->source;
    move.group_sizes = params->group_sizes;
    move.weights = params->weights;
    move.y = params->y;
    move.rows = params->rows;
    move.kept = params->kept;
    move.products = params->products;
    move.zero_rest = params->zero_rest;
    moves.push_back(move);
  }
  MoveRows(run, params_.route, sent, moves);
  return true;
}

template <>
void VerbOp<CachedDispatchParams>::Abort(const Communicator&) const {
  const RouteShape& route = params_.route;
  FillReceivedAsFailed(route, params_.rows, params_.kept);
  if (params_.products != nullptr) FillNaN(params_.products, route.capacity);
}

}  // namespace jax_deepep
