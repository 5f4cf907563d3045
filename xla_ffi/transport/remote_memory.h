// How a rank of a GPU writes to other nodes: to the ranks there with its index in their node, its
// peers. A transport has these five functions on the host, and on the device PutFlag
// (cuda/remote_put.cuh).
#ifndef JAX_DEEPEP_TRANSPORT_REMOTE_MEMORY_H_
#define JAX_DEEPEP_TRANSPORT_REMOTE_MEMORY_H_

#include <cstddef>
#include <map>
#include <string>

namespace jax_deepep {

// Of one rank. Functions return an error, or empty.
class RemoteMemory {
 public:
  virtual ~RemoteMemory() = default;

  // Connect to the peers. Collective.
  virtual std::string Init(int node, int num_nodes) = 0;

  // Let peers write to this memory of the rank: its control block and staging, laid out alike on
  // all ranks, so that an address in one's own stands for the same place in a peer's. Collective.
  virtual std::string Register(char* memory, size_t bytes) = 0;

  // Where PutFlag finds the memory of the peer on another node.
  virtual char* FlagAddress(int node) const = 0;

  // How rows get there, in a few words.
  virtual std::string Describe() const = 0;

  // Peers no longer write.
  virtual void Close() = 0;
};

// Over memory that is mapped here: nodes that are declared, of one host.
class MappedRemoteMemory : public RemoteMemory {
 public:
  std::string Init(int /*node*/, int /*num_nodes*/) override { return ""; }
  // Peers map it when the communicator attaches it there.
  std::string Register(char* /*memory*/, size_t /*bytes*/) override { return ""; }
  void Attach(int node, char* memory) { memories_[node] = memory; }
  char* FlagAddress(int node) const override { return memories_.at(node); }
  std::string Describe() const override {
    return "puts over memory of the communicator that is mapped there, a row once per node";
  }
  void Close() override { memories_.clear(); }

 private:
  std::map<int, char*> memories_;
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_TRANSPORT_REMOTE_MEMORY_H_
