// One rank's part of an op, from its custom call to its completion.
#ifndef JAX_DEEPEP_CPU_OP_H_
#define JAX_DEEPEP_CPU_OP_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu/group_exchange.h"
#include "cpu/node_links.h"
#include "interface/op_signature.h"

namespace jax_deepep {

class Communicator;
class Op;

// An op at which all ranks of its EP group have arrived.
struct GroupRun {
  Communicator& comm;
  int group = 0;
  // Every rank's part; null for ranks of other processes.
  std::vector<std::unique_ptr<Op>> ranks;
  // Every rank's shared memory, of ranks on other nodes without sums; empty where all ranks are of
  // this process.
  std::vector<RankWindow> windows;
  NodeLinks* links = nullptr;  // to other nodes, if rows go there by puts
  // Wait for the other processes of the group. False: the op must be aborted.
  std::function<bool()> barrier;

  bool spans_processes() const { return !windows.empty(); }
};

// Holds pointers into XLA's buffers, which are valid until `done` is called.
class Op {
 public:
  virtual ~Op() = default;

  // What must be the same on all ranks.
  virtual OpSignature signature() const = 0;

  const char* name() const { return NameOf(signature().verb); }

  // Run the op for all ranks of this process, which have the same verb. Called on one of them, on a
  // thread that may block. False: a barrier failed.
  virtual bool RunGroup(GroupRun& run) const = 0;

  // Fill the results of an aborted op: counts 0, floats NaN.
  virtual void Abort(const Communicator& comm) const = 0;

  // Either completes the op: `fail` if there is no thread on which XLA's program could continue.
  std::function<void()> done;
  std::function<void(const std::string& why)> fail;
};

// A verb's parameters as an op; RunGroup and Abort are in the verb's file.
template <typename Params>
class VerbOp final : public Op {
 public:
  // `call` as in OpSignature.
  VerbOp(const Params& params, int64_t call) : params_(params), call_(call) {}

  OpSignature signature() const override { return SignatureOf(params_, call_); }
  bool RunGroup(GroupRun& run) const override;
  void Abort(const Communicator& comm) const override;

 private:
  // The parameters of all ranks, in order; null for ranks of other processes.
  static std::vector<const Params*> Collect(const GroupRun& run) {
    std::vector<const Params*> all;
    all.reserve(run.ranks.size());
    for (const auto& op : run.ranks) {
      all.push_back(op == nullptr ? nullptr : &static_cast<const VerbOp&>(*op).params_);
    }
    return all;
  }

  const Params params_;
  const int64_t call_;
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CPU_OP_H_
