// What the ranks of a process send to their peers, the ranks of the same index on other nodes.
#ifndef JAX_DEEPEP_CPU_NODE_LINKS_H_
#define JAX_DEEPEP_CPU_NODE_LINKS_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu/windows.h"
#include "transport/tcp_memory.h"

namespace jax_deepep {

class NodeLinks {
 public:
  // `ranks`, all on one node, are those of this process.
  NodeLinks(const GroupShape& shape, std::vector<int> ranks)
      : shape_(shape),
        node_(shape.NodeOf(ranks.front())),
        ranks_(std::move(ranks)),
        windows_(shape.num_ranks) {}

  // The connection to the process with the same ranks on another node.
  void AddConnection(int node, std::unique_ptr<TcpMemory> connection) {
    connections_[node] = std::move(connection);
  }

  // The window on this node for a rank of another one, in the memory of that rank's peer here.
  void SetWindow(int rank, const NodeWindow& window) { windows_[rank] = window; }
  const NodeWindow& WindowOf(int rank) const { return windows_[rank]; }

  int node() const { return node_; }
  bool IsOnThisNode(int rank) const { return shape_.NodeOf(rank) == node_; }

  // Send rows of a rank's window to its peers, of each token once per node that `needs` it; returns
  // how many, by node.
  std::vector<int64_t> PutRows(int rank, const RankWindow& window, int64_t num_tokens,
                               int64_t row_bytes,
                               const std::function<bool(int64_t token, int node)>& needs);

  // Likewise the entries of a rank's window, and their weights, if any, of all tokens.
  void PutEntries(int rank, const RankWindow& window, int64_t num_tokens, bool with_weights);

  // Send the sums of this node for the tokens of a rank of another one to it, of those that have
  // one.
  void PutSums(int to, const std::vector<char>& has_sum, int64_t row_bytes, bool with_gradients);

  // See TcpMemory.
  void Start(int node, std::vector<TcpMemory::Region> regions, std::function<void()> on_flag,
             std::function<void(const std::string&)> on_lost) {
    connections_.at(node)->Start(std::move(regions), std::move(on_flag), std::move(on_lost));
  }
  std::vector<TcpMemory*> connections() const;
  void Close(double longest_stall_s);

 private:
  // A rank of this process, and its peer on another node.
  struct Link {
    TcpMemory* connection;
    const NodeWindow* window;  // for the peer, here
    size_t offset;             // of the window for the rank, in the region of the peer

    // Put a part of an array, which has this offset in the window here.
    void Put(const void* array, size_t begin, const void* from, size_t bytes) const {
      connection->Put(kWindowRegion, Offset(array) + begin, from, bytes);
    }
    size_t Offset(const void* array) const {
      return offset + (static_cast<const char*>(array) - window->tokens.x);
    }
  };
  Link LinkOf(int rank, int node) const;

  const GroupShape shape_;
  const int node_;
  const std::vector<int> ranks_;
  std::vector<NodeWindow> windows_;                        // by rank of another node
  std::map<int, std::unique_ptr<TcpMemory>> connections_;  // by node
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CPU_NODE_LINKS_H_
