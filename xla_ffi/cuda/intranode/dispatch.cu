// dispatch inside a node: every rank counts and lists what it sends, tells its peers, and pulls its
// own rows from theirs straight to their final places.
//
// 1. Count: the entries of this rank per group, and its tokens per destination rank; every entry's
//    place among those of its warp goes into its record.
// 2. List: places among all entries of this rank, and the tokens for each rank.
// 3. Publish counts; wait for everyone's.
// 4. Plan: prefix sums over the sources turn places into rows; drop what does not fit.
// 5. Pull: each token that has experts here once, whatever the number of its rows.
//
// Lists and records stand in XLA's memory. A source that has given up may have left them to others:
// the op fails in the end, but what they say until then must not lead outside the arrays. Counts
// are safe.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/group_op.cuh"
#include "cuda/intranode/launch.h"
#include "cuda/op_frame.h"
#include "cuda/pair_order.cuh"
#include "cuda/row_values.cuh"
#include "interface/dispatch.h"
#include "routing/group_rows.h"

namespace jax_deepep {
namespace {

// What a source writes about each of its entries, for whoever pulls the token.
struct alignas(16) EntryRecord {
  int32_t expert;  // or kNone for an entry that does not count
  int32_t place;   // among this source's entries of the group
  float weight;
  int32_t pair;  // before step 2: the place of its token in the list of the rank, or kNone
};

// Operands that peers read.
enum { kRows, kRecords, kLists };

struct Dispatch {
  OpFrame frame;
  DispatchParams params;
  int64_t row_bytes;
  int count_warps;  // warps of a block that count: what its shared memory has counters for
};

// A row as 16-bit words, for copies.
template <bool kWhole>
__device__ RowShape<kWhole> WordsOf(const Dispatch& op) {
  return {static_cast<int>(op.row_bytes / sizeof(uint16_t))};
}

// The scratch of an op.
__device__ EntryRecord* Records(const Dispatch& op) {
  return reinterpret_cast<EntryRecord*>(op.params.scratch);
}
__device__ int32_t* TokenList(const Dispatch& op, int rank) {
  const int64_t entries = int64_t{op.params.route.num_tokens} * op.frame.shape.num_topk;
  return op.params.scratch + entries * (sizeof(EntryRecord) / sizeof(int32_t)) +
         int64_t{rank} * op.params.route.num_tokens;
}

// A warp's view of some tokens: one entry per lane, whole tokens only.
struct EntryLane {
  bool inside;      // the lane has an entry
  bool valid;       // it names an expert, for the first time in its token
  bool wrong;       // it counts as invalid
  bool makes_pair;  // the first valid one of its (token, rank)
  int32_t expert;
  int32_t rank;       // of the expert
  int32_t pair_lane;  // the lane that makes its pair
};

// `expert` is what the lane's entry of topk_idx says, if it has one.
__device__ EntryLane LookAtEntry(const Dispatch& op, bool inside, int32_t expert) {
  const GroupShape& shape = op.frame.shape;
  const int lane = threadIdx.x % 32;
  const int in_warp = lane / shape.num_topk;  // token
  EntryLane entry{};
  entry.inside = inside;
  entry.expert = inside ? expert : kNone;
  const bool named = entry.expert >= 0 && entry.expert < shape.num_experts;
  // Lanes of no expert match nobody else.
  const int key = named ? in_warp * shape.num_experts + entry.expert : -1 - lane;
  const int first_of_same = __ffs(__match_any_sync(~0u, key)) - 1;
  entry.valid = named && first_of_same == lane;
  entry.wrong = entry.inside && entry.expert != kNone && !entry.valid;
  entry.rank = entry.valid ? entry.expert / shape.num_local_experts() : 0;
  const int pair_key = entry.valid ? in_warp * shape.num_ranks + entry.rank : -1 - lane;
  entry.pair_lane = __ffs(__match_any_sync(~0u, pair_key)) - 1;
  entry.makes_pair = entry.valid && entry.pair_lane == lane;
  return entry;
}

// Among the lanes with `counts`, how many before this one have the same `column`; adds them all to
// the warp's own `counters`. Returns the counter before plus that.
__device__ int CountInColumn(bool counts, int column, int32_t* counters) {
  const int lane = threadIdx.x % 32;
  const uint32_t same = __match_any_sync(~0u, counts ? column : -1 - lane);
  int place = 0;
  if (counts) place = counters[column] + __popc(same & ((1u << lane) - 1));
  __syncwarp();
  if (counts && __ffs(same) - 1 == lane) counters[column] += __popc(same);
  __syncwarp();
  return place;
}

// The tokens of one block, or of one warp of it.
struct TokenRange {
  int32_t begin, end;

  __device__ static TokenRange Part(TokenRange whole, int part, int parts) {
    const int64_t size = whole.end - whole.begin;
    return {static_cast<int32_t>(whole.begin + size * part / parts),
            static_cast<int32_t>(whole.begin + size * (part + 1) / parts)};
  }
};

// Steps 1 and 2; `counters` are shared memory [count_warps][columns].
__device__ void CountAndList(const Dispatch& op, GroupOp& group, int32_t* counters) {
  const GroupShape& shape = op.frame.shape;
  const int columns = NumCountColumns(shape.num_experts, shape.num_ranks);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool expert_major = op.params.route.layout == Layout::kExpertMajor;
  const TokenRange block = TokenRange::Part({0, op.params.route.num_tokens}, blockIdx.x, gridDim.x);
  const TokenRange tokens =
      warp < op.count_warps ? TokenRange::Part(block, warp, op.count_warps) : TokenRange{0, 0};
  int32_t* own_counters = counters + warp * columns;

  for (int i = threadIdx.x; i < op.count_warps * columns; i += kThreads) counters[i] = 0;
  __syncthreads();
  // A lane's entries stand a step apart; each is loaded while the one before is looked at.
  const int num_topk = shape.num_topk, step = 32 / num_topk * num_topk;
  const int64_t end = int64_t{tokens.end} * num_topk;
  int64_t index = int64_t{tokens.begin} * num_topk + lane;
  const auto inside = [&] { return lane < step && index < end; };
  int32_t next = inside() ? op.params.topk_idx[index] : kNone;
  float next_weight = inside() ? op.params.topk_weights[index] : 0.0f;
  int wrong = 0;
  for (int64_t first = index - lane; first < end; first += step) {
    const int64_t at = index;
    const float weight = next_weight;
    const EntryLane entry = LookAtEntry(op, inside(), next);
    index += step;
    if (inside()) {
      next = op.params.topk_idx[index];
      next_weight = op.params.topk_weights[index];
    }
    const int in_expert = CountInColumn(entry.valid, entry.expert, own_counters);
    const int in_list =
        CountInColumn(entry.makes_pair, shape.num_experts + entry.rank, own_counters);
    const int pair = __shfl_sync(~0u, in_list, entry.pair_lane);
    wrong += __popc(__ballot_sync(~0u, entry.wrong));
    if (!entry.inside) continue;
    Records(op)[at] = {entry.valid ? entry.expert : kNone, expert_major ? in_expert : pair, weight,
                       entry.makes_pair ? in_list : kNone};
  }
  if (lane == 0 && wrong > 0) atomicAdd(&group.own().num_invalid, wrong);
  __syncthreads();
  // Counters become the counts of the warps before, and the block's counts are told to the others.
  int32_t* block_counts = op.frame.BlockCounts(blockIdx.x);
  for (int column = threadIdx.x; column < columns; column += kThreads) {
    int32_t before = 0;
    for (int w = 0; w < op.count_warps; ++w) {
      const int32_t count = counters[w * columns + column];
      counters[w * columns + column] = before;
      before += count;
    }
    block_counts[column] = before;
  }
  group.SyncGrid();

  for (int column = threadIdx.x; column < columns; column += kThreads) {
    int32_t before = 0, total = 0;
#pragma unroll 8
    for (int block_index = 0; block_index < gridDim.x; ++block_index) {
      const int32_t count = __ldcg(op.frame.BlockCounts(block_index) + column);
      before += block_index < blockIdx.x ? count : 0;
      total += count;
    }
    for (int w = 0; w < op.count_warps; ++w) counters[w * columns + column] += before;
    if (group.failed_before()) continue;
    for (int peer = blockIdx.x; peer < shape.num_ranks; peer += gridDim.x) {
      op.frame.Counts(peer, op.frame.rank)[column] = total;
    }
  }
  __syncthreads();
  constexpr int kAhead = 4;  // records in flight of a lane
  for (int64_t base = int64_t{tokens.begin} * num_topk + lane; base < end; base += 32 * kAhead) {
    EntryRecord records[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      records[i].expert = kNone;
      if (base + i * 32 < end) records[i] = Records(op)[base + i * 32];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const EntryRecord& record = records[i];
      if (record.expert == kNone) continue;
      const int64_t at = base + i * 32;
      const int rank = record.expert / shape.num_local_experts();
      const int list = shape.num_experts + rank;
      Records(op)[at].place = record.place + own_counters[expert_major ? record.expert : list];
      if (record.pair != kNone) {
        TokenList(op, rank)[own_counters[list] + record.pair] = static_cast<int32_t>(at / num_topk);
      }
    }
  }
}

// Where all rows of the group stand, in shared memory. A group of rows is numbered over all ranks:
// rank * groups_per_rank + group on that rank.
struct Plan {
  int32_t* offset;        // [groups] first row of a group on its rank
  int32_t* kept;          // [groups] rows of it, after dropping
  int32_t* first_of_own;  // [groups] rows of earlier sources than this rank
  int32_t* first_here;    // [R][groups_per_rank] the same for each source, in this rank's groups
  int32_t* pairs_before;  // [R + 1] pairs of earlier sources for this rank
  int32_t* taken;         // [R] pairs that this block has read from each source
  int64_t* received;      // rows sent to this rank, before dropping

  __host__ __device__ static int64_t Ints(const GroupShape& shape) {
    return int64_t{4} *
               (shape.num_experts > shape.num_ranks ? shape.num_experts : shape.num_ranks) +
           2 * shape.num_ranks + 6;
  }
  __device__ static Plan At(int32_t* memory, const GroupShape& shape) {
    const int groups = max(shape.num_experts, shape.num_ranks);
    Plan plan;
    plan.received = reinterpret_cast<int64_t*>(memory);
    plan.offset = memory + 2;
    plan.kept = plan.offset + groups;
    plan.first_of_own = plan.kept + groups;
    plan.first_here = plan.first_of_own + groups;
    plan.pairs_before = plan.first_here + groups;
    plan.taken = plan.pairs_before + shape.num_ranks + 1;
    return plan;
  }
};

__device__ int64_t InclusiveScan(int64_t value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int64_t before = __shfl_up_sync(~0u, value, distance);
    if (lane >= distance) value += before;
  }
  return value;
}

__device__ void MakePlan(const Dispatch& op, const Plan& plan) {
  const GroupShape& shape = op.frame.shape;
  const RouteShape& route = op.params.route;
  const int rank = op.frame.rank, lane = threadIdx.x % 32;
  const bool expert_major = route.layout == Layout::kExpertMajor;
  const int per_rank = expert_major ? shape.num_local_experts() : 1;
  const int first_column = expert_major ? 0 : shape.num_experts;

  for (int group = threadIdx.x; group < per_rank * shape.num_ranks; group += kThreads) {
    const bool here = group / per_rank == rank;
    int32_t before = 0;
#pragma unroll 4
    for (int source = 0; source < shape.num_ranks; ++source) {
      if (source == rank) plan.first_of_own[group] = before;
      if (here) plan.first_here[source * per_rank + group % per_rank] = before;
      before += LoadFresh(op.frame.Counts(rank, source) + first_column + group);
    }
    plan.kept[group] = before;
  }
  for (int source = threadIdx.x; source < shape.num_ranks; source += kThreads) {
    plan.pairs_before[source + 1] =
        LoadFresh(op.frame.Counts(rank, source) + shape.num_experts + rank);
    plan.taken[source] = 0;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    plan.pairs_before[0] = 0;
    for (int source = 0; source < shape.num_ranks; ++source) {
      plan.pairs_before[source + 1] += plan.pairs_before[source];
    }
  }
  // A warp for the groups of one rank, as PlaceGroup does it.
  for (int owner = threadIdx.x / 32; owner < shape.num_ranks; owner += kWarps) {
    int64_t end = 0, received = 0;
    for (int base = 0; base < per_rank; base += 32) {
      const int group = owner * per_rank + base + lane;
      const bool inside = base + lane < per_rank;
      int64_t wanted = inside ? plan.kept[group] : 0;
      received += wanted;
      if (route.expert_capacity != kNoLimit) wanted = min(wanted, route.expert_capacity);
      const int64_t padded = RoundUp(wanted, route.alignment);
      const int64_t until = end + InclusiveScan(padded);
      if (inside) {
        const int64_t offset = min(until - padded, int64_t{route.capacity});
        plan.offset[group] = static_cast<int32_t>(offset);
        plan.kept[group] = static_cast<int32_t>(min(wanted, route.capacity - offset));
      }
      end = __shfl_sync(~0u, until, 31);
    }
    if (owner == rank) {
      received = __shfl_sync(~0u, InclusiveScan(received), 31);
      if (lane == 0) *plan.received = received;
    }
  }
  __syncthreads();
}

// The row of an entry on its rank, or kNone; `first` are the rows of earlier sources in its group.
// No `place` leads outside the group.
__device__ int32_t RowOf(const Plan& plan, int group, int32_t first, int32_t place) {
  const uint32_t at = static_cast<uint32_t>(first) + static_cast<uint32_t>(place);
  if (at >= static_cast<uint32_t>(plan.kept[group])) return kNone;
  return plan.offset[group] + static_cast<int32_t>(at);
}

// Tell this rank's tokens where they went.
__device__ void WriteDestinations(const Dispatch& op, const Plan& plan) {
  const GroupShape& shape = op.frame.shape;
  const bool expert_major = op.params.route.layout == Layout::kExpertMajor;
  const TokenRange block = TokenRange::Part({0, op.params.route.num_tokens}, blockIdx.x, gridDim.x);
  const int64_t end = int64_t{block.end} * shape.num_topk;
  for (int64_t i = int64_t{block.begin} * shape.num_topk + threadIdx.x; i < end; i += kThreads) {
    const EntryRecord record = Records(op)[i];
    int32_t destination = kNone;
    if (record.expert != kNone) {
      const int owner = record.expert / shape.num_local_experts();
      const int group = expert_major ? record.expert : owner;
      const int32_t row = RowOf(plan, group, plan.first_of_own[group], record.place);
      if (row != kNone) {
        destination = static_cast<int32_t>(int64_t{owner} * op.params.route.capacity + row);
      }
    }
    op.params.destination[i] = destination;
  }
}

__device__ void MarkEmpty(const Dispatch& op, int64_t row) {
  const int num_topk = op.frame.shape.num_topk;
  op.params.source[row] = kNone;
  if (op.params.route.layout == Layout::kExpertMajor) {
    op.params.weights[row] = 0.0f;
    return;
  }
  for (int k = 0; k < num_topk; ++k) {
    op.params.weights[row * num_topk + k] = 0.0f;
    op.params.local_experts[row * num_topk + k] = kNone;
  }
}

// Fill in the rows that no source sends, and the counts.
template <bool kWhole>
__device__ void WriteRest(const Dispatch& op, const Plan& plan) {
  const DispatchParams& params = op.params;
  const int groups =
      params.route.layout == Layout::kExpertMajor ? op.frame.shape.num_local_experts() : 1;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32 * gridDim.x + blockIdx.x;
  int64_t kept = 0, end = 0;
  for (int base = 0; base < groups; base += 32) {
    const int group = base + lane;
    const bool inside = group < groups;
    const int at = op.frame.rank * groups + group;
    const int32_t rows = inside ? plan.kept[at] : 0;
    const int32_t padded = static_cast<int32_t>(RoundUp(rows, params.route.alignment));
    const int32_t rest = inside ? plan.offset[at] + rows : 0;  // its first row of no token
    if (warp == 0 && inside) {
      params.num_rows[group] = rows;
      params.group_sizes[group] = padded;
    }
    kept += __reduce_add_sync(~0u, rows);
    end += __reduce_add_sync(~0u, padded);
    for (uint32_t lanes = __ballot_sync(~0u, padded > rows); lanes != 0; lanes &= lanes - 1) {
      const int of_lane = __ffs(lanes) - 1;
      const int64_t first = __shfl_sync(~0u, rest, of_lane);
      const int count = __shfl_sync(~0u, padded - rows, of_lane);
      for (int i = warp; i < count; i += gridDim.x * kWarps) {
        ZeroRow(static_cast<char*>(params.tokens) + (first + i) * op.row_bytes,
                WordsOf<kWhole>(op));
        if (lane == 0) MarkEmpty(op, first + i);
      }
    }
  }
  for (int64_t row = end + blockIdx.x * kThreads + threadIdx.x; row < params.route.capacity;
       row += gridDim.x * kThreads) {
    MarkEmpty(op, row);
  }
  if (warp == 0 && lane == 0) {
    *params.num_received = static_cast<int32_t>(*plan.received);
    *params.num_dropped = static_cast<int32_t>(*plan.received - kept);
    if (params.pairs != nullptr) params.pairs[0] = plan.pairs_before[op.frame.shape.num_ranks];
  }
}

// Pull the rows of this rank, a warp for each token.
template <bool kWhole>
__device__ void Pull(const Dispatch& op, const GroupOp& group, const Plan& plan) {
  const GroupShape& shape = op.frame.shape;
  const DispatchParams& params = op.params;
  const int rank = op.frame.rank, num_ranks = shape.num_ranks, num_topk = shape.num_topk;
  const int lane = threadIdx.x % 32;
  const bool expert_major = params.route.layout == Layout::kExpertMajor;
  const int per_rank = expert_major ? shape.num_local_experts() : 1;
  const PairTable table(shape, params.route);
  const PairOrder order(plan.pairs_before[num_ranks], plan.pairs_before[rank],
                        plan.pairs_before[rank + 1]);

  // Each lane looks up one of the next 32 items, so that the way to a peer is waited for once
  // in 32.
  int32_t of_lane_pair = 0, of_lane_source = 0, of_lane_token = 0;
  for (int number = 0; order.Has(number); ++number) {
    if (number % 32 == 0 && order.Has(number + lane)) {
      of_lane_pair = order.At(number + lane);
      int low = 0, high = num_ranks;  // pairs_before[low] <= pair < pairs_before[high]
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        (plan.pairs_before[middle] <= of_lane_pair ? low : high) = middle;
      }
      of_lane_source = low;
      const int32_t* list =
          group.Operand<int32_t>(low, kLists) + int64_t{rank} * params.route.num_tokens;
      of_lane_token = LoadFresh(list + of_lane_pair - plan.pairs_before[low]);
      if (of_lane_token < 0 || of_lane_token >= params.route.num_tokens) of_lane_token = 0;
    }
    __syncwarp();
    const int pair = __shfl_sync(~0u, of_lane_pair, number % 32);
    const int source = __shfl_sync(~0u, of_lane_source, number % 32);
    const int64_t token = __shfl_sync(~0u, of_lane_token, number % 32);
    EntryRecord record;
    record.expert = kNone;
    if (lane < num_topk) {
      const uint4 words =
          LoadOnce(reinterpret_cast<const uint4*>(group.Operand<EntryRecord>(source, kRecords) +
                                                  token * num_topk) +
                   lane);
      record = *reinterpret_cast<const EntryRecord*>(&words);
    }
    CarryRow(group.Operand<char>(source, kRows) + token * op.row_bytes,
             static_cast<char*>(params.tokens), WordsOf<kWhole>(op), [&] {
               const int32_t code = source * shape.max_tokens + static_cast<int32_t>(token);
               const bool here =
                   record.expert >= 0 && record.expert / shape.num_local_experts() == rank;
               const int local = here && expert_major ? record.expert - rank * per_rank : 0;
               int32_t row = kNone;
               if (here) {
                 row = RowOf(plan, rank * per_rank + local,
                             plan.first_here[source * per_rank + local], record.place);
               }
               const uint32_t live = __ballot_sync(~0u, row != kNone);
               const int nth = __popc(live & ((1u << lane) - 1));
               if (live != 0 && lane == 0) atomicAdd(&plan.taken[source], 1);
               if (expert_major) {
                 if (row != kNone) {
                   params.source[row] = code;
                   params.weights[row] = record.weight;
                 }
                 int32_t* line = params.pairs + int64_t{1 + pair} * table.line_ints();
                 if (lane == 0) line[0] = code;
                 if (row != kNone && nth < table.max_rows) line[1 + nth] = row;
                 if (lane >= __popc(live) && lane < table.max_rows) line[1 + lane] = kNone;
                 return int64_t{row};
               }
               const int32_t shared_row = __reduce_max_sync(~0u, row);
               if (shared_row == kNone) return int64_t{kNone};
               if (lane == 0) params.source[shared_row] = code;
               if (lane < num_topk) {
                 const int64_t at = int64_t{shared_row} * num_topk + lane;
                 params.weights[at] = here ? record.weight : 0.0f;
                 params.local_experts[at] =
                     here ? record.expert - rank * shape.num_local_experts() : kNone;
               }
               return row != kNone && nth == 0 ? int64_t{row} : int64_t{kNone};
             });
  }
}

__device__ void WriteFailure(const Dispatch& op) {
  const DispatchParams& params = op.params;
  const GroupShape& shape = op.frame.shape;
  const int64_t capacity = params.route.capacity, num_topk = shape.num_topk;
  const bool expert_major = params.route.layout == Layout::kExpertMajor;
  const int groups = expert_major ? shape.num_local_experts() : 1;
  FillAsFailed(params.route.row_type, params.tokens, capacity * params.route.row_size);
  FillAsFailed(RowType::kFloat32, params.weights, expert_major ? capacity : capacity * num_topk);
  FillByBlock(params.source, capacity, kNone);
  FillByBlock(params.destination, params.route.num_tokens * num_topk, kNone);
  if (!expert_major) FillByBlock(params.local_experts, capacity * num_topk, kNone);
  FillByBlock(params.group_sizes, groups, 0);
  FillByBlock(params.num_rows, groups, 0);
  if (threadIdx.x == 0) {
    *params.num_received = *params.num_dropped = *params.num_invalid = 0;
    if (params.pairs != nullptr) params.pairs[0] = 0;
  }
}

__device__ void ReportInvalid(const Dispatch& op, const GroupOp& group) {
  const uint32_t count = group.own().num_invalid;
  *op.params.num_invalid = static_cast<int32_t>(count);
  HostStatus& status = *op.frame.status;
  if (count == 0 || *static_cast<volatile uint64_t*>(&status.invalid_step) != 0) return;
  status.num_invalid = count;
  __threadfence_system();
  *static_cast<volatile uint64_t*>(&status.invalid_step) = group.step();
}

template <bool kWhole>
__global__ void __launch_bounds__(kThreads, 1) DispatchKernel(const __grid_constant__ Dispatch op) {
  extern __shared__ __align__(16) char memory[];
  __shared__ GroupOp::Shared shared;
  GroupOp group(op.frame, &shared);
  const Plan plan = Plan::At(reinterpret_cast<int32_t*>(memory), op.frame.shape);

  group.Begin();
  CountAndList(op, group,
               reinterpret_cast<int32_t*>(memory));  // before the plan, in the same place
  group.Publish();
  if (group.WaitForArrivals()) {
    MakePlan(op, plan);
    Pull<kWhole>(op, group, plan);
    WriteDestinations(op, plan);
    WriteRest<kWhole>(op, plan);
    group.CountTaken(plan.taken);
  }
  group.Finish(
      [&] {
        if (threadIdx.x == 0) ReportInvalid(op, group);
      },
      [&] { WriteFailure(op); });
}

}  // namespace

int64_t LeastSharedBytesOfDispatch(const GroupShape& shape) {
  // More than the counters of one warp, which stand in the same place.
  return Plan::Ints(shape) * static_cast<int64_t>(sizeof(int32_t));
}

const char* LaunchDispatch(const OpFrame& frame, const DispatchParams& params, int num_blocks,
                           const DeviceFacts& device, cudaStream_t stream) {
  const GroupShape& shape = frame.shape;
  Dispatch op{frame, params, params.route.row_bytes(), kWarps};
  op.frame.offsets[kRows] = device.OffsetOf(params.x);
  op.frame.offsets[kRecords] = device.OffsetOf(params.scratch);
  op.frame.offsets[kLists] = op.frame.offsets[kRecords] + int64_t{params.route.num_tokens} *
                                                              shape.num_topk * sizeof(EntryRecord);
  const int warp_bytes =
      NumCountColumns(shape.num_experts, shape.num_ranks) * static_cast<int>(sizeof(int32_t));
  op.count_warps = std::min(kWarps, device.shared_bytes / warp_bytes);
  const int plan_bytes = static_cast<int>(LeastSharedBytesOfDispatch(shape));
  const int shared_bytes = std::max(plan_bytes, op.count_warps * warp_bytes);
  const bool whole = IsWhole(static_cast<int>(op.row_bytes / sizeof(uint16_t)));
  return LaunchKernel(whole ? DispatchKernel<true> : DispatchKernel<false>, op, num_blocks,
                      kThreads, shared_bytes, stream);
}

const char* LoadDispatchKernels(int max_shared_bytes) {
  const char* error = LoadKernel(DispatchKernel<true>, max_shared_bytes);
  return error != nullptr ? error : LoadKernel(DispatchKernel<false>, max_shared_bytes);
}

}  // namespace jax_deepep
