// How a rank of a GPU writes to other nodes: to the ranks there with its index in their node, its
// peers. A transport has these functions on the host, and others on the device
// (cuda/remote_put.cuh).
#ifndef JAX_DEEPEP_TRANSPORT_REMOTE_MEMORY_H_
#define JAX_DEEPEP_TRANSPORT_REMOTE_MEMORY_H_

#include <cstddef>
#include <map>
#include <string>

namespace jax_deepep {

// The transport in this process, of all communicators. Functions return an error, or empty.
class RemoteProcess {
 public:
  virtual ~RemoteProcess() = default;

  // An id that one process makes, and all pass to Init.
  virtual std::string MakeId(std::string* id) = 0;

  // Connect `num_processes`, of which this one has an index. Collective, and not bounded. Again
  // with the same arguments it does nothing, with others it is an error.
  virtual std::string Init(const std::string& id, int process, int num_processes) = 0;
};

// The memory of one rank. Likewise.
class RemoteMemory {
 public:
  virtual ~RemoteMemory() = default;

  // Let peers write to this memory of the rank: its control block and staging, laid out alike on
  // all ranks, so that an address in one's own stands for the same place in a peer's. Collective.
  virtual std::string Register(char* memory, size_t bytes) = 0;

  // The address under which puts of this rank know that memory.
  virtual char* Address() const = 0;

  // The peer's on another node where it is mapped here, or null.
  virtual char* FlagAddress(int node) const = 0;

  // Whether a put carries its flag as a signal, instead of a fence and another put after it.
  virtual bool HasSignals() const { return false; }

  // How rows get there, in a few words.
  virtual std::string Describe() const = 0;
};

// Over memory that is mapped here: nodes that are declared, of one host.
class MappedRemoteMemory : public RemoteMemory {
 public:
  // Peers map it when the communicator attaches it there.
  std::string Register(char* memory, size_t /*bytes*/) override {
    own_ = memory;
    return "";
  }
  void Attach(int node, char* memory) { memories_[node] = memory; }
  char* Address() const override { return own_; }
  char* FlagAddress(int node) const override { return memories_.at(node); }
  std::string Describe() const override {
    return "puts over memory of the communicator that is mapped there, a row once per node";
  }

 private:
  char* own_ = nullptr;
  std::map<int, char*> memories_;
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_TRANSPORT_REMOTE_MEMORY_H_
