#include "cuda/block_count.h"

#include <algorithm>
#include <cmath>

#include "cuda/device_control.h"

namespace jax_deepep {
namespace {

// Fewer bytes than this do not justify another block.
constexpr int64_t kBytesPerBlock = 64 << 10;

// Copy rate of an SM, and NVLink rate of a Hopper GPU in each direction, in GB/s.
constexpr double kRateOfBlock = 45;
constexpr double kRateOfLink = 335;

// Target time of local bytes, as a fraction of the time of the link.
constexpr double kPartOfLinkTime = 0.67;

// Enough to saturate the link.
constexpr int kBlocksForLink = 24;

}  // namespace

ExpectedRows ExpectedRowsOf(const GroupShape& shape, const RouteShape& route) {
  const double ranks = shape.num_ranks;
  // Drawing experts with replacement underestimates slightly: a token's experts are distinct.
  const double to_rank = 1 - std::pow(1 - 1 / ranks, shape.num_topk);
  ExpectedRows expected;
  expected.pairs = route.num_tokens * ranks * to_rank;
  expected.rows = route.layout == Layout::kTokenMajor
                      ? expected.pairs
                      : double{1} * route.num_tokens * shape.num_topk;
  expected.rows = std::min<double>(expected.rows, route.capacity);
  expected.pairs = std::min(expected.pairs, expected.rows);
  return expected;
}

OpBytes BytesOf(const GroupShape& shape, const RouteShape& route, double local_rows) {
  const auto row_bytes = static_cast<double>(route.rows().received_bytes());
  const double pairs = ExpectedRowsOf(shape, route).pairs;
  const double from_peers = pairs * (shape.num_ranks - 1) / shape.num_ranks;
  const auto wire_bytes = static_cast<double>(route.rows().wire_bytes());
  return {static_cast<int64_t>(from_peers * wire_bytes),
          static_cast<int64_t>(local_rows * row_bytes)};
}

int MostBlocks(int num_sms, int num_ranks_on_gpu) {
  return std::clamp((num_sms - 2) / std::max(1, num_ranks_on_gpu), 1, kMaxBlocks);
}

int MostWhole(int most, int num_in_flight) {
  return std::max(1, most * (num_in_flight == 0 ? 12 : 11 - 3 * num_in_flight) / 16);
}

int MostInFlight(int most) { return std::max(1, std::min(kBlocksForLink, most * 3 / 16)); }

int BlocksFor(const OpBytes& bytes, int most) {
  const int64_t worth = std::max(bytes.local, bytes.link) / kBytesPerBlock + 1;
  // Enough for local bytes to take kPartOfLinkTime of the link's time; without a link, all.
  const double link_time = static_cast<double>(bytes.link) / kRateOfLink;
  const double for_local = static_cast<double>(bytes.local) / kRateOfBlock;
  const double wanted = bytes.link == 0 ? most : for_local / (link_time * kPartOfLinkTime);
  const int64_t blocks =
      std::max<int64_t>(kBlocksForLink, std::llround(std::min<double>(wanted, most)));
  return static_cast<int>(std::min({blocks, worth, int64_t{most}}));
}

}  // namespace jax_deepep
