#include "cpu/node_links.h"

#include <algorithm>
#include <chrono>

namespace jax_deepep {

NodeLinks::Link NodeLinks::LinkOf(int rank, int node) const {
  const size_t index = std::find(ranks_.begin(), ranks_.end(), rank) - ranks_.begin();
  const int peer = shape_.RankOnNode(rank, node);
  return {connections_.at(node).get(), &windows_[peer], index * NodeWindow::Bytes(shape_)};
}

std::vector<int64_t> NodeLinks::PutRows(int rank, const RankWindow& window, int64_t num_tokens,
                                        int64_t row_bytes,
                                        const std::function<bool(int64_t token, int node)>& needs) {
  std::vector<int64_t> counts(shape_.num_nodes(), 0);
  for (const auto& [node, connection] : connections_) {
    const Link link = LinkOf(rank, node);
    for (int64_t token = 0; token < num_tokens;) {
      const int64_t begin = token;
      while (token < num_tokens && needs(token, node)) ++token;
      if (token > begin) {
        link.Put(link.window->tokens.x, begin * row_bytes, window.x + begin * row_bytes,
                 (token - begin) * row_bytes);
        counts[node] += token - begin;
      } else {
        ++token;
      }
    }
    connection->PutCopy(kWindowRegion, link.Offset(link.window->num_rows), &counts[node],
                        sizeof(counts[node]));
  }
  return counts;
}

void NodeLinks::PutEntries(int rank, const RankWindow& window, int64_t num_tokens,
                           bool with_weights) {
  const size_t bytes = num_tokens * shape_.num_topk * sizeof(int32_t);
  for (const auto& [node, connection] : connections_) {
    const Link link = LinkOf(rank, node);
    link.Put(link.window->tokens.entries, 0, window.entries, bytes);
    if (with_weights) link.Put(link.window->tokens.entry_weights, 0, window.entry_weights, bytes);
  }
}

void NodeLinks::PutSums(int to, const std::vector<char>& has_sum, int64_t row_bytes,
                        bool with_gradients) {
  const Link link = LinkOf(shape_.RankOnNode(to, node_), shape_.NodeOf(to));
  const NodeWindow& window = *link.window;
  const int64_t gradient_bytes = shape_.num_topk * static_cast<int64_t>(sizeof(float));
  const auto num_tokens = static_cast<int64_t>(has_sum.size());
  for (int64_t token = 0; token < num_tokens;) {
    const int64_t begin = token;
    while (token < num_tokens && has_sum[token] != 0) ++token;
    if (token == begin) {
      ++token;
      continue;
    }
    link.Put(window.sums, begin * row_bytes, window.sums_to_send + begin * row_bytes,
             (token - begin) * row_bytes);
    if (!with_gradients) continue;
    const char* gradients = reinterpret_cast<const char*>(window.entry_gradients_to_send);
    link.Put(window.entry_gradients, begin * gradient_bytes, gradients + begin * gradient_bytes,
             (token - begin) * gradient_bytes);
  }
}

std::vector<TcpMemory*> NodeLinks::connections() const {
  std::vector<TcpMemory*> all;
  for (const auto& [node, connection] : connections_) all.push_back(connection.get());
  return all;
}

void NodeLinks::Close(double longest_stall_s) {
  const std::chrono::duration<double> stall(longest_stall_s);
  for (const auto& [node, connection] : connections_) connection->Close(stall);
}

}  // namespace jax_deepep
