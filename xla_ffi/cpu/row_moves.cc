#include "cpu/row_moves.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "cpu/communicator.h"
#include "cpu/row_math.h"
#include "cpu/threads.h"

namespace jax_deepep {
namespace {

constexpr int64_t kRowsPerRange = 32;

// Rows per work item: enough that two threads seldom fault in the same large page (2 MiB), which
// the kernel would then clear twice, and few enough to balance the work.
int64_t RowsPerRange(int64_t num_rows, int64_t row_bytes) {
  constexpr int64_t kBytesPerRange = 4 << 20;
  const int64_t even = num_rows / (8 * NumCores());
  return std::max(kRowsPerRange, std::min(kBytesPerRange / row_bytes, even));
}

}  // namespace

void MoveRows(const GroupRun& run, const RouteShape& route, const std::vector<const void*>& sources,
              const std::vector<RowMove>& moves) {
  const GroupShape& shape = run.comm.shape();
  const int num_groups = NumRowGroups(shape, route);
  const RowFormat format = route.rows();
  const size_t row_bytes = format.bytes();

  // One index over the rows of all ranks, so that a rank with many rows gets many threads.
  std::vector<int64_t> first_row(moves.size() + 1, 0);
  std::vector<int64_t> end_of_groups(moves.size());
  for (size_t i = 0; i < moves.size(); ++i) {
    const int32_t* sizes = moves[i].group_sizes;
    end_of_groups[i] = std::accumulate(sizes, sizes + num_groups, int64_t{0});
    const int64_t rows = moves[i].zero_rest ? route.capacity : end_of_groups[i];
    first_row[i + 1] = first_row[i] + rows;
    PreferLargePages(moves[i].rows, rows * row_bytes);
  }
  const int64_t num_rows = first_row.back();
  const auto row_of = [&](int32_t code) {
    return static_cast<const char*>(sources[code / shape.max_tokens]) +
           static_cast<int64_t>(code % shape.max_tokens) * row_bytes;
  };

  ParallelFor(
      num_rows, RowsPerRange(num_rows, row_bytes), 2 * row_bytes, [&](int64_t begin, int64_t end) {
        size_t i =
            std::upper_bound(first_row.begin(), first_row.end(), begin) - first_row.begin() - 1;
        for (int64_t index = begin; index < end; ++index) {
          while (index >= first_row[i + 1]) ++i;
          const RowMove& move = moves[i];
          const int64_t row = index - first_row[i];
          const int64_t offset = row * static_cast<int64_t>(row_bytes);
          char* to = static_cast<char*>(move.rows) + offset;
          // The next row is elsewhere: the hardware prefetcher would be too late.
          if (row + 1 < end_of_groups[i] && move.source[row + 1] != kNone) {
            FetchRow(row_of(move.source[row + 1]), row_bytes);
          }
          const int32_t code = row < end_of_groups[i] ? move.source[row] : kNone;
          if (code == kNone) {
            std::memset(to, 0, row_bytes);
            if (move.products != nullptr) move.products[row] = 0.0f;
            continue;
          }
          const char* from = row_of(code);
          if (move.weights == nullptr) {
            // No non-temporal stores: the cache still holds the page that the kernel has just
            // cleared.
            std::memcpy(to, from, row_bytes);
          } else {
            ScaleRow(format.type, to, from, move.weights[row], format.size);
          }
          if (move.products != nullptr) {
            move.products[row] =
                DotRows(format.type, from, static_cast<const char*>(move.y) + offset, format.size);
          }
        }
      });

  // A token crosses to a rank once, however many rows it has there.
  for (size_t i = 0; i < moves.size(); ++i) {
    std::vector<int64_t> from_source(sources.size(), 0);
    std::vector<bool> crossed(sources.size() * shape.max_tokens, false);
    for (int64_t row = 0; row < end_of_groups[i]; ++row) {
      const int32_t code = moves[i].source[row];
      if (code == kNone || crossed[code]) continue;
      crossed[code] = true;
      ++from_source[code / shape.max_tokens];
    }
    for (size_t source = 0; source < sources.size(); ++source) {
      run.comm.CountRows(run.group, static_cast<int>(source), moves[i].rank, from_source[source]);
    }
  }
}

void PublishRows(const RowFormat& format, int64_t num_tokens, const void* x,
                 const RankWindow& window) {
  const size_t row_bytes = format.bytes();
  ParallelFor(num_tokens, kRowsPerRange, 2 * row_bytes, [&](int64_t begin, int64_t end) {
    std::memcpy(window.x + begin * row_bytes, static_cast<const char*>(x) + begin * row_bytes,
                (end - begin) * row_bytes);
  });
}

}  // namespace jax_deepep
