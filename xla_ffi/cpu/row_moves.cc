#include "cpu/row_moves.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "cpu/communicator.h"
#include "cpu/pages.h"
#include "cpu/row_math.h"
#include "cpu/threads.h"
#include "cpu/wire_rows.h"

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

// Clear the rows after the last group, where they must be zero, and their products.
void ClearRest(const RouteShape& route, const std::vector<RowMove>& moves,
               const std::vector<int64_t>& end_of_groups) {
  constexpr size_t kPiece = 1 << 20;
  std::vector<ByteRange> pieces;
  const auto add_rest = [&](void* array, int64_t begin, size_t row_bytes) {
    if (array == nullptr) return;
    void* const rest = static_cast<char*>(array) + begin * row_bytes;
    const size_t bytes = (route.capacity - begin) * row_bytes;
    for (const ByteRange range : RangesToClear(rest, bytes)) {
      for (size_t at = 0; at < range.bytes; at += kPiece) {
        pieces.push_back({range.begin + at, std::min(kPiece, range.bytes - at)});
      }
    }
  };
  for (size_t i = 0; i < moves.size(); ++i) {
    if (moves[i].zero_rest) add_rest(moves[i].rows, end_of_groups[i], route.rows().bytes());
    add_rest(moves[i].products, end_of_groups[i], sizeof(float));
  }
  ParallelFor(pieces.size(), 1, kPiece, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::memset(pieces[i].begin, 0, pieces[i].bytes);
  });
}

}  // namespace

SentRows::SentRows(const GroupRun& run, const RouteShape& route, const std::vector<const void*>& x)
    : are_encoded_(route.rows().is_quantized() && (run.spans_processes() || route.keeps_quantized)),
      row_bytes_(are_encoded_ ? route.rows().wire_bytes() : route.rows().bytes()) {
  const RowFormat format = route.rows();
  const WireRow wire = format.wire_row();
  const int64_t num_tokens = route.num_tokens;
  if (!run.spans_processes() && format.is_encoded_here()) {
    const size_t bytes = x.size() * num_tokens * row_bytes_;
    own_.reset(new char[bytes]);  // not cleared
    PreferLargePages(own_.get(), bytes);
  }
  // The arrays whose rows are written elsewhere, and where.
  std::vector<std::pair<const char*, char*>> written;
  for (size_t rank = 0; rank < x.size(); ++rank) {
    const auto* here = static_cast<const char*>(x[rank]);
    char* to = nullptr;
    if (run.spans_processes()) to = run.windows[rank].x;
    if (own_ != nullptr) to = own_.get() + rank * num_tokens * row_bytes_;
    if (here != nullptr && to != nullptr) written.emplace_back(here, to);
    // Ranks of one process read rows where they are, if nothing is to be encoded.
    sources_.push_back(here != nullptr && !format.is_encoded_here() ? here : to);
  }

  const int64_t num_rows = static_cast<int64_t>(written.size()) * num_tokens;
  const int64_t bytes = format.bytes() + row_bytes_;
  ParallelFor(num_rows, RowsPerRange(num_rows, bytes), bytes, [&](int64_t begin, int64_t end) {
    std::vector<char> encoded(format.is_encoded_here() && !are_encoded_ ? wire.bytes() : 0);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t token = index % num_tokens;
      const char* from = written[index / num_tokens].first + token * format.bytes();
      char* to = written[index / num_tokens].second + token * row_bytes_;
      if (!format.is_encoded_here()) {
        std::memcpy(to, from, row_bytes_);
      } else if (are_encoded_) {
        EncodeRow(format.type, wire, from, to);
      } else {
        EncodeRow(format.type, wire, from, encoded.data());
        DecodeRow(format.type, wire, encoded.data(), to);
      }
    }
  });
}

void PutTokens(const GroupRun& run, const RouteShape& route, const SentRows& sent, int rank,
               const NeededTokens& needed, bool with_entries) {
  const GroupShape& shape = run.comm.shape();
  const RankWindow& window = run.windows[rank];
  if (with_entries) run.links->PutEntries(rank, window, route.num_tokens, /*with_weights=*/true);
  const std::vector<int64_t> counts =
      run.links->PutRows(rank, window, route.num_tokens, sent.row_bytes(),
                         [&](int64_t token, int node) { return needed.Has(token, node); });
  for (int node = 0; node < shape.num_nodes(); ++node) {
    run.comm.CountPuts(run.group, rank, shape.RankOnNode(rank, node), counts[node]);
  }
}

void MoveRows(const GroupRun& run, const RouteShape& route, const SentRows& sent,
              const std::vector<RowMove>& moves) {
  const GroupShape& shape = run.comm.shape();
  const int num_groups = NumRowGroups(shape, route);
  const RowFormat format = route.rows();
  const WireRow wire = format.wire_row();
  const size_t row_bytes = format.received_bytes();

  // One index over the rows of all ranks, so that a rank with many rows gets many threads.
  std::vector<int64_t> first_row(moves.size() + 1, 0);
  std::vector<int64_t> end_of_groups(moves.size());
  for (size_t i = 0; i < moves.size(); ++i) {
    const int32_t* sizes = moves[i].group_sizes;
    end_of_groups[i] = std::accumulate(sizes, sizes + num_groups, int64_t{0});
    first_row[i + 1] = first_row[i] + end_of_groups[i];
    if (format.keeps_quantized) {
      PreferLargePages(moves[i].kept.data, int64_t{route.capacity} * wire.data_bytes());
    } else {
      PreferLargePages(moves[i].rows, route.capacity * row_bytes);
    }
  }
  // Before rows are written, which makes pages resident that they share with the rest.
  ClearRest(route, moves, end_of_groups);
  const int64_t num_rows = first_row.back();
  const auto row_of = [&](int32_t code) {
    return sent.RowOf(code / shape.max_tokens, code % shape.max_tokens);
  };

  ParallelFor(
      num_rows, RowsPerRange(num_rows, row_bytes), 2 * row_bytes, [&](int64_t begin, int64_t end) {
        std::vector<char> decoded(sent.are_encoded() ? row_bytes : 0);
        size_t i =
            std::upper_bound(first_row.begin(), first_row.end(), begin) - first_row.begin() - 1;
        for (int64_t index = begin; index < end; ++index) {
          while (index >= first_row[i + 1]) ++i;
          const RowMove& move = moves[i];
          const int64_t row = index - first_row[i];
          // The next row is elsewhere: the hardware prefetcher would be too late.
          if (row + 1 < end_of_groups[i] && move.source[row + 1] != kNone) {
            FetchRow(row_of(move.source[row + 1]), sent.row_bytes());
          }
          const int32_t code = move.source[row];
          if (format.keeps_quantized) {
            move.kept.ForParts(wire, [&](char* part, int64_t bytes, int64_t on_wire) {
              char* to = part + row * bytes;
              if (code == kNone) {
                std::memset(to, 0, bytes);
              } else {
                std::memcpy(to, row_of(code) + on_wire, bytes);
              }
            });
            continue;
          }
          const int64_t offset = row * static_cast<int64_t>(row_bytes);
          char* to = static_cast<char*>(move.rows) + offset;
          if (code == kNone) {
            std::memset(to, 0, row_bytes);
            if (move.products != nullptr) move.products[row] = 0.0f;
            continue;
          }
          const char* from = row_of(code);
          if (sent.are_encoded()) {
            char* row_decoded = move.weights == nullptr ? to : decoded.data();
            DecodeRow(format.type, wire, from, row_decoded);
            from = row_decoded;
          }
          if (move.weights != nullptr && move.products != nullptr) {
            const char* y = static_cast<const char*>(move.y) + offset;
            move.products[row] =
                ScaleAndDotRows(format.type, to, from, move.weights[row], y, format.size);
          } else if (move.weights != nullptr) {
            ScaleRow(format.type, to, from, move.weights[row], format.size);
          } else {
            // No non-temporal stores: the cache still holds the page that the kernel has just
            // cleared.
            if (from != to) std::memcpy(to, from, row_bytes);
            if (move.products != nullptr) {
              const char* y = static_cast<const char*>(move.y) + offset;
              move.products[row] = DotRows(format.type, from, y, format.size);
            }
          }
        }
      });

  // A token crosses to a rank once, however many rows it has there.
  for (size_t i = 0; i < moves.size(); ++i) {
    std::vector<int64_t> from_source(sent.num_ranks(), 0);
    std::vector<bool> crossed(sent.num_ranks() * shape.max_tokens, false);
    for (int64_t row = 0; row < end_of_groups[i]; ++row) {
      const int32_t code = moves[i].source[row];
      if (code == kNone || crossed[code]) continue;
      crossed[code] = true;
      ++from_source[code / shape.max_tokens];
    }
    const int to = moves[i].rank;
    for (int source = 0; source < shape.num_ranks; ++source) {
      int from = source;
      if (run.links != nullptr && !run.links->IsOnThisNode(source)) {
        // To this node the row went by a put to the peer of its source, once.
        from = shape.RankOnNode(source, shape.NodeOf(to));
        if (from == to) {
          run.comm.CountRows(run.group, source, to, *run.links->WindowOf(source).num_rows);
        }
      }
      run.comm.CountRows(run.group, from, to, from_source[source]);
    }
  }
}

void FillReceivedAsFailed(const RouteShape& route, void* rows, const KeptArrays& kept) {
  const RowFormat format = route.rows();
  if (!format.keeps_quantized) {
    return FillAsFailed(format.type, rows, int64_t{route.capacity} * format.size);
  }
  // All bits set: NaN of every format.
  kept.ForParts(format.wire_row(), [&](char* part, int64_t bytes, int64_t) {
    std::memset(part, 0xff, route.capacity * bytes);
  });
}

}  // namespace jax_deepep
