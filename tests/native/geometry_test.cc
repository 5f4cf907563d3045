// Checks of shapes: rows of groups, division, and the blocks of kernels.
#include <cstdint>
#include <limits>

#include "cuda/block_count.h"
#include "cuda/divisor.h"
#include "interface/verbs.h"
#include "native_test.h"
#include "routing/group_rows.h"

namespace jax_deepep {
namespace {

// Rows of integers are a multiple of 16 bytes, for every hidden_size.
void CheckRowBytes() {
  GroupShape shape;
  for (const int hidden : {1, 4, 5, 37, 40}) {
    shape.hidden_size = hidden;
    const int64_t bytes = shape.max_row_bytes();
    Check(bytes % 16 == 0 && bytes >= 4 * hidden && bytes < 4 * hidden + 16, "the longest row",
          hidden);
  }
}

void CheckEntries() {
  const int32_t row[] = {3, -1, 8, 3, 0, -2, 7, 1};
  const bool valid[] = {true, false, false, false, true, false, true, true};
  for (int k = 0; k < 8; ++k) Check(IsValidEntry(row, k, 8) == valid[k], "valid entries", k);
  // Two experts per rank: 3 and 0 and 7 make a row on ranks 1, 0 and 3; 1 shares the row of 0.
  const bool makes[] = {true, false, false, false, true, false, true, false};
  for (int k = 0; k < 8; ++k) {
    if (!valid[k]) continue;
    Check(MakesRow(row, k, 8, 2, Layout::kTokenMajor) == makes[k], "token-major rows", k);
    Check(MakesRow(row, k, 8, 2, Layout::kExpertMajor), "expert-major rows", k);
  }
}

void CheckGroup(GroupRows got, int64_t offset, int64_t kept, int64_t padded, long number) {
  Check(got.offset == offset && got.kept == kept && got.padded == padded, "a group's rows", number);
}

void CheckGroups() {
  Check(RoundUp(0, 8) == 0 && RoundUp(1, 8) == 8 && RoundUp(8, 8) == 8 && RoundUp(9, 8) == 16,
        "RoundUp");
  RouteShape route;
  route.capacity = 16;
  route.alignment = 4;
  route.expert_capacity = 6;
  int64_t offset = 0;
  CheckGroup(LayOutGroup(3, route, &offset), 0, 3, 4, 0);   // fits; padded
  CheckGroup(LayOutGroup(9, route, &offset), 4, 6, 8, 1);   // cut by expert_capacity
  CheckGroup(LayOutGroup(0, route, &offset), 12, 0, 0, 2);  // empty
  CheckGroup(LayOutGroup(5, route, &offset), 12, 4, 4, 3);  // cut by capacity
  CheckGroup(LayOutGroup(1, route, &offset), 20, 0, 0, 4);  // no room
  Check(offset == 24, "the end of the groups", static_cast<long>(offset));

  // Sizes near the end of int32 are arithmetic in 64 bits.
  route.capacity = 1 << 30;
  route.alignment = 1;
  route.expert_capacity = kNoLimit;
  offset = 0;
  LayOutGroup(int64_t{1} << 31, route, &offset);
  CheckGroup(LayOutGroup(1, route, &offset), int64_t{1} << 31, 0, 0, 5);
}

// Against C++ division, around multiples, where a quotient changes, and at the end.
void CheckDivisor(int64_t divisor) {
  const Divisor by(static_cast<int32_t>(divisor));
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const auto check = [&](int64_t value) {
    if (value < 0 || value > kMost) return;
    const auto of = static_cast<int32_t>(value);
    const bool divides = by.Quotient(of) == value / divisor && by.Remainder(of) == value % divisor;
    Check(divides && by.RoundUp(of) == RoundUp(value, divisor), "division by a Divisor", divisor);
  };
  for (int64_t step = 0; step <= 40; ++step) {
    const int64_t multiple = kMost / divisor * step / 40 * divisor;
    for (int64_t value = multiple - 1; value <= multiple + 1; ++value) check(value);
  }
  check(kMost);
}

void CheckDivisors() {
  for (int64_t divisor = 1; divisor <= 5000; ++divisor) CheckDivisor(divisor);
  for (int bits = 13; bits <= 31; ++bits) {
    for (int64_t divisor = (int64_t{1} << bits) - 2; divisor <= (int64_t{1} << bits) + 2;
         ++divisor) {
      if (divisor <= std::numeric_limits<int32_t>::max()) CheckDivisor(divisor);
    }
  }
  Check(Divisor(0).Quotient(0) == 0, "nothing to divide");
}

// Blocks of a dispatch of T tokens, K = 8, rows of 14,336 bytes, on a GPU of 132 SMs alone.
int BlocksOfDispatch(int num_ranks, int num_tokens, Layout layout) {
  GroupShape shape;
  shape.num_ranks = num_ranks;
  shape.num_experts = 256;
  shape.num_topk = 8;
  shape.max_tokens = num_tokens;
  shape.hidden_size = 7168;
  DispatchParams params;
  params.route.layout = layout;
  params.route.row_type = RowType::kBFloat16;
  params.route.row_size = 7168;
  params.route.num_tokens = num_tokens;
  params.route.capacity = num_ranks * num_tokens * 8;
  return BlocksFor(BytesOf(shape, params), MostBlocks(132, 1));
}

void CheckBlockCounts() {
  constexpr auto kExpert = Layout::kExpertMajor, kToken = Layout::kTokenMajor;
  Check(MostBlocks(132, 1) == 130 && MostBlocks(132, 4) == 32 && MostBlocks(132, 200) == 1,
        "most blocks");
  Check(BlocksOfDispatch(2, 1, kToken) == 1, "one block for one token");
  Check(BlocksOfDispatch(2, 4096, kToken) == 24, "what the link takes");
  const int for_rows = BlocksOfDispatch(2, 4096, kExpert);
  Check(for_rows > 60 && for_rows <= 130, "more where rows are written several times", for_rows);
  Check(BlocksOfDispatch(8, 4096, kExpert) < for_rows, "fewer where more comes over the link");
  Check(BlocksOfDispatch(1, 4096, kExpert) == 130, "all where there is no link");
  for (int tokens = 1; tokens < 4096; tokens *= 2) {
    Check(BlocksOfDispatch(2, tokens, kExpert) <= BlocksOfDispatch(2, 2 * tokens, kExpert),
          "blocks by tokens", tokens);
  }
  for (int most = 16; most <= 130; ++most) {
    for (int in_flight = 0; in_flight <= 3; ++in_flight) {
      Check(MostWhole(most, in_flight) + in_flight * MostInFlight(most) + most / 4 <= most,
            "an op beside ops in flight and collectives", most);
    }
  }
}

}  // namespace

void CheckGeometry() {
  CheckRowBytes();
  CheckEntries();
  CheckGroups();
  CheckDivisors();
  CheckBlockCounts();
}

}  // namespace jax_deepep
