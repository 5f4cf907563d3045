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

#include "cuda/divisor.h"
#include "cuda/group_op.cuh"
#include "cuda/intranode/launch.h"
#include "cuda/op_frame.h"
#include "cuda/pair_order.cuh"
#include "cuda/row_values.cuh"
#include "cuda/warp_items.cuh"
#include "interface/dispatch.h"

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
  Divisor local_experts, topk, alignment, num_warps;
  int count_warps;  // warps of a block that count: what its shared memory has counters for

  __device__ int RankOf(int32_t expert) const { return local_experts.Quotient(expert); }
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

// Where a lane stands when a warp looks at whole tokens, an entry per lane.
struct LaneOfToken {
  int token;   // the how-manieth of the warp's
  int entry;   // of the token
  int tokens;  // of the warp

  __device__ explicit LaneOfToken(const Divisor& topk)
      : token(topk.Quotient(threadIdx.x % 32)),
        entry(topk.Remainder(threadIdx.x % 32)),
        tokens(topk.Quotient(32)) {}
};

// What the lane's entry is to the group.
struct EntryLane {
  bool valid;         // it names an expert, for the first time in its token
  bool wrong;         // it counts as invalid
  bool makes_pair;    // the first valid one of its (token, rank)
  int32_t expert;     // or kNone
  int32_t rank;       // of the expert, or kNone
  int32_t pair_lane;  // the lane that makes its pair
};

// `expert` is what topk_idx says. Lanes of a token compare themselves one by one: a match over the
// whole warp takes as long as it has different values.
__device__ EntryLane LookAtEntry(const Dispatch& op, const LaneOfToken& at, int32_t expert) {
  const int lane = threadIdx.x % 32;
  const bool named = expert >= 0 && expert < op.frame.shape.num_experts;
  EntryLane entry;
  entry.expert = named ? expert : kNone;
  entry.rank = named ? op.RankOf(expert) : kNone;
  entry.pair_lane = lane;
  int again = 0;
  const int num_topk = op.frame.shape.num_topk;
  for (int back = 1; back < num_topk; ++back) {
    const int32_t of_expert = __shfl_up_sync(~0u, entry.expert, back);
    const int32_t of_rank = __shfl_up_sync(~0u, entry.rank, back);
    const bool same_token = at.entry >= back;
    again = same_token && of_expert == entry.expert ? 1 : again;
    entry.pair_lane = same_token && of_rank == entry.rank ? lane - back : entry.pair_lane;
  }
  entry.valid = named && again == 0;
  entry.wrong = expert != kNone && !entry.valid;
  entry.makes_pair = entry.valid && entry.pair_lane == lane;
  return entry;
}

// An entry's places among those that the warp has counted before.
struct Places {
  int in_expert = 0;
  int in_list = 0;  // of its rank, if it makes a pair
};

// Add the lanes' entries to the warp's own `counters`, one token after the other: no two entries of
// a token share a counter.
__device__ Places CountEntries(int num_experts, const LaneOfToken& at, const EntryLane& entry,
                               int32_t* counters) {
  int32_t* of_expert = counters + entry.expert;
  int32_t* of_list = counters + num_experts + entry.rank;
  Places places;
  for (int token = 0; token < at.tokens; ++token) {
    if (token == at.token && entry.valid) {
      places.in_expert = *of_expert;
      if (entry.makes_pair) places.in_list = *of_list;
      *of_expert = places.in_expert + 1;
      if (entry.makes_pair) *of_list = places.in_list + 1;
    }
    __syncwarp();
  }
  return places;
}

// Call use(index, record) for each record that this thread reads, several of them in flight.
template <typename Use>
__device__ void ForRecords(const Dispatch& op, int64_t first, int64_t end, int stride, Use use) {
  constexpr int kAhead = 4;
  for (int64_t base = first; base < end; base += stride * kAhead) {
    EntryRecord records[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (base + i * stride < end) records[i] = Records(op)[base + i * stride];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (base + i * stride < end) use(base + i * stride, records[i]);
    }
  }
}

// The tokens of one block, or of one warp of it.
struct TokenRange {
  int32_t begin, end;

  __device__ static TokenRange Part(TokenRange whole, int part, int parts) {
    const int size = (whole.end - whole.begin + parts - 1) / parts;
    const int32_t begin = min(whole.begin + part * size, whole.end);
    return {begin, min(begin + size, whole.end)};
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

  // A lane's entries stand a step apart; each is loaded while the one before is looked at.
  const LaneOfToken at(op.topk);
  const int num_topk = shape.num_topk, step = at.tokens * num_topk;
  const int64_t end = int64_t{tokens.end} * num_topk;
  int64_t index = int64_t{tokens.begin} * num_topk + lane;
  bool inside = lane < step && index < end;
  int32_t expert = inside ? op.params.topk_idx[index] : kNone;
  float weight = inside ? op.params.topk_weights[index] : 0.0f;
  for (int i = threadIdx.x; i < op.count_warps * columns; i += kThreads) counters[i] = 0;
  __syncthreads();
  int wrong = 0;
  while (__any_sync(~0u, inside)) {
    const int64_t next_index = index + step;
    const bool next_inside = lane < step && next_index < end;
    const int32_t next_expert = next_inside ? op.params.topk_idx[next_index] : kNone;
    const float next_weight = next_inside ? op.params.topk_weights[next_index] : 0.0f;
    const EntryLane entry = LookAtEntry(op, at, expert);
    const Places places = CountEntries(shape.num_experts, at, entry, own_counters);
    const int pair = __shfl_sync(~0u, places.in_list, entry.pair_lane);
    wrong += __popc(__ballot_sync(~0u, entry.wrong));
    if (inside) {
      Records(op)[index] = {entry.valid ? entry.expert : kNone,
                            expert_major ? places.in_expert : pair, weight,
                            entry.makes_pair ? places.in_list : kNone};
    }
    index = next_index, inside = next_inside, expert = next_expert, weight = next_weight;
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
  ForRecords(op, int64_t{tokens.begin} * num_topk + lane, end, 32,
             [&](int64_t index, const EntryRecord& record) {
               if (record.expert == kNone) return;
               const int rank = op.RankOf(record.expert);
               const int list = shape.num_experts + rank;
               Records(op)[index].place =
                   record.place + own_counters[expert_major ? record.expert : list];
               if (record.pair != kNone) {
                 TokenList(op, rank)[own_counters[list] + record.pair] =
                     op.topk.Quotient(static_cast<int32_t>(index));
               }
             });
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
  const int per_rank = expert_major ? op.local_experts.divisor() : 1;
  const int first_column = expert_major ? 0 : shape.num_experts;

  for (int group = threadIdx.x; group < per_rank * shape.num_ranks; group += kThreads) {
    const int local = group - rank * per_rank;
    const bool here = local >= 0 && local < per_rank;
    int32_t before = 0;
#pragma unroll 4
    for (int source = 0; source < shape.num_ranks; ++source) {
      if (source == rank) plan.first_of_own[group] = before;
      if (here) plan.first_here[source * per_rank + local] = before;
      before += LoadFresh(op.frame.Counts(rank, source) + first_column + group);
    }
    plan.kept[group] = before;
  }
  if (threadIdx.x / 32 == kWarps - 1) {  // the one with the fewest groups
    int32_t before = 0;
    for (int base = 0; base < shape.num_ranks; base += 32) {
      const int source = base + lane;
      const bool inside = source < shape.num_ranks;
      const int64_t pairs =
          inside ? LoadFresh(op.frame.Counts(rank, source) + shape.num_experts + rank) : 0;
      const auto until = before + static_cast<int32_t>(InclusiveScan(pairs));
      if (inside) plan.pairs_before[source + 1] = until;
      if (inside) plan.taken[source] = 0;
      before = __shfl_sync(~0u, until, 31);
    }
    if (lane == 0) plan.pairs_before[0] = 0;
  }
  __syncthreads();
  // A warp for the groups of one rank, as PlaceGroup does it. More than the whole rank has room for
  // is dropped in any case.
  const int64_t limit = route.expert_capacity == kNoLimit ? route.capacity : route.expert_capacity;
  for (int owner = threadIdx.x / 32; owner < shape.num_ranks; owner += kWarps) {
    int64_t end = 0, received = 0;
    for (int base = 0; base < per_rank; base += 32) {
      const int group = owner * per_rank + base + lane;
      const bool inside = base + lane < per_rank;
      const int32_t sent = inside ? plan.kept[group] : 0;
      received += sent;
      const int32_t wanted = static_cast<int32_t>(min(int64_t{sent}, limit));
      const int64_t padded = op.alignment.RoundUp(wanted);
      const int64_t until = end + InclusiveScan(padded);
      if (inside) {
        const int64_t offset = min(until - padded, int64_t{route.capacity});
        plan.offset[group] = static_cast<int32_t>(offset);
        plan.kept[group] = static_cast<int32_t>(min(int64_t{wanted}, route.capacity - offset));
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
  ForRecords(
      op, int64_t{block.begin} * shape.num_topk + threadIdx.x, int64_t{block.end} * shape.num_topk,
      kThreads, [&](int64_t index, const EntryRecord& record) {
        int32_t destination = kNone;
        if (record.expert != kNone) {
          const int owner = op.RankOf(record.expert);
          const int group = expert_major ? record.expert : owner;
          const int32_t row = RowOf(plan, group, plan.first_of_own[group], record.place);
          if (row != kNone) {
            destination = static_cast<int32_t>(int64_t{owner} * op.params.route.capacity + row);
          }
        }
        op.params.destination[index] = destination;
      });
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
  const int groups = params.route.layout == Layout::kExpertMajor ? op.local_experts.divisor() : 1;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32 * gridDim.x + blockIdx.x;
  int64_t kept = 0, end = 0;
  for (int base = 0; base < groups; base += 32) {
    const int group = base + lane;
    const bool inside = group < groups;
    const int at = op.frame.rank * groups + group;
    const int32_t rows = inside ? plan.kept[at] : 0;
    const auto padded = static_cast<int32_t>(op.alignment.RoundUp(rows));
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

// A token that has experts here.
struct Pair {
  int32_t number, source, token;
  EntryRecord record;  // of the lane's entry
};

// Write down where the pair's rows stand. Returns the row that this lane is to write, or kNone.
__device__ int64_t WriteRoute(const Dispatch& op, const Plan& plan, const PairTable& table,
                              const Pair& pair) {
  const GroupShape& shape = op.frame.shape;
  const DispatchParams& params = op.params;
  const EntryRecord& record = pair.record;
  const int rank = op.frame.rank, num_topk = shape.num_topk, lane = threadIdx.x % 32;
  const bool expert_major = params.route.layout == Layout::kExpertMajor;
  const int per_rank = expert_major ? op.local_experts.divisor() : 1;
  const int32_t code = pair.source * shape.max_tokens + pair.token;
  const int expert = record.expert - rank * op.local_experts.divisor();
  const bool here = expert >= 0 && expert < op.local_experts.divisor();
  int32_t row = kNone;
  if (here) {
    const int local = expert_major ? expert : 0;
    row = RowOf(plan, rank * per_rank + local, plan.first_here[pair.source * per_rank + local],
                record.place);
  }
  const uint32_t live = __ballot_sync(~0u, row != kNone);
  const int nth = __popc(live & ((1u << lane) - 1));
  if (live != 0 && lane == 0) atomicAdd(&plan.taken[pair.source], 1);
  if (expert_major) {
    if (row != kNone) {
      params.source[row] = code;
      params.weights[row] = record.weight;
    }
    int32_t* line = params.pairs + int64_t{1 + pair.number} * table.line_ints();
    if (lane == 0) line[0] = code;
    if (row != kNone && nth < table.max_rows) line[1 + nth] = row;
    if (lane >= __popc(live) && lane < table.max_rows) line[1 + lane] = kNone;
    return row;
  }
  const int32_t shared_row = __reduce_max_sync(~0u, row);
  if (shared_row == kNone) return kNone;
  if (lane == 0) params.source[shared_row] = code;
  if (lane < num_topk) {
    const int64_t at = int64_t{shared_row} * num_topk + lane;
    params.weights[at] = here ? record.weight : 0.0f;
    params.local_experts[at] = here ? expert : kNone;
  }
  return nth == 0 ? row : kNone;
}

// Pull the rows of this rank, a warp for each token.
template <bool kWhole>
__device__ void Pull(const Dispatch& op, const GroupOp& group, const Plan& plan) {
  const GroupShape& shape = op.frame.shape;
  const RouteShape& route = op.params.route;
  const int rank = op.frame.rank, lane = threadIdx.x % 32;
  const int num_pairs = plan.pairs_before[shape.num_ranks];
  const PairTable table(shape, route);
  const PairOrder order(num_pairs, plan.pairs_before[rank], plan.pairs_before[rank + 1],
                        op.num_warps);
  ForWarpItems(
      num_pairs,
      [&](int item) {
        Pair pair{0, 0, 0, {kNone}};
        if (item >= num_pairs) return pair;
        pair.number = order.At(item);
        int low = 0, high = shape.num_ranks;  // pairs_before[low] <= number < pairs_before[high]
        while (high - low > 1) {
          const int middle = (low + high) / 2;
          (plan.pairs_before[middle] <= pair.number ? low : high) = middle;
        }
        pair.source = low;
        const int32_t* list =
            group.Operand<int32_t>(low, kLists) + int64_t{rank} * route.num_tokens;
        pair.token = LoadFresh(list + pair.number - plan.pairs_before[low]);
        return pair;
      },
      [&](int, Pair pair) {
        if (pair.token < 0 || pair.token >= route.num_tokens) pair.token = 0;
        if (lane < shape.num_topk) {
          const auto* records = group.Operand<EntryRecord>(pair.source, kRecords) +
                                int64_t{pair.token} * shape.num_topk;
          const uint4 words = LoadOnce(reinterpret_cast<const uint4*>(records + lane));
          pair.record = *reinterpret_cast<const EntryRecord*>(&words);
        }
        return pair;
      },
      [&](int, const Pair& pair) {
        CarryRow(group.Operand<char>(pair.source, kRows) + pair.token * op.row_bytes,
                 static_cast<char*>(op.params.tokens), WordsOf<kWhole>(op),
                 [&] { return WriteRoute(op, plan, table, pair); });
      });
}

__device__ void WriteFailure(const Dispatch& op) {
  const DispatchParams& params = op.params;
  const GroupShape& shape = op.frame.shape;
  const int64_t capacity = params.route.capacity, num_topk = shape.num_topk;
  const bool expert_major = params.route.layout == Layout::kExpertMajor;
  const int groups = expert_major ? op.local_experts.divisor() : 1;
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
  Dispatch op{frame,
              params,
              params.route.row_bytes(),
              Divisor(shape.num_local_experts()),
              Divisor(shape.num_topk),
              Divisor(params.route.alignment),
              Divisor(num_blocks * kWarps),
              kWarps};
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
