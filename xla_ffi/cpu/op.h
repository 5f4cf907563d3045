// One device's part in one op, from the custom call that launched it to its completion.
#ifndef JAX_DEEPEP_CPU_OP_H_
#define JAX_DEEPEP_CPU_OP_H_

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "interface/combine.h"
#include "interface/dispatch.h"
#include "interface/redispatch.h"

namespace jax_deepep {

class Communicator;

// Holds pointers into XLA's buffers, which stay valid until `done` is called and not longer.
class Op {
 public:
  virtual ~Op() = default;

  virtual const char* name() const = 0;

  // Do the work of the whole group: `ranks[r]` is the part of rank r, and all are of one verb.
  // Called on one of them, on a thread that may block.
  virtual void RunGroup(Communicator& comm, int group,
                        const std::vector<std::unique_ptr<Op>>& ranks) const = 0;

  // Write what an op leaves that met no peer: counts 0, floats NaN.
  virtual void Abandon(const Communicator& comm) const = 0;

  std::function<void()> done;
};

// A verb's parameters as an op; RunGroup and Abandon stand in the verb's own file.
template <typename Params>
class VerbOp final : public Op {
 public:
  explicit VerbOp(const Params& params) : params_(params) {}

  const char* name() const override;
  void RunGroup(Communicator& comm, int group,
                const std::vector<std::unique_ptr<Op>>& ranks) const override;
  void Abandon(const Communicator& comm) const override;

 private:
  // The parameters of all ranks, in order.
  static std::vector<const Params*> Collect(const std::vector<std::unique_ptr<Op>>& ranks) {
    std::vector<const Params*> all;
    all.reserve(ranks.size());
    for (const auto& op : ranks) all.push_back(&static_cast<const VerbOp&>(*op).params_);
    return all;
  }

  const Params params_;
};

using DispatchOp = VerbOp<DispatchParams>;
using RedispatchOp = VerbOp<RedispatchParams>;
using CombineOp = VerbOp<CombineParams>;

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CPU_OP_H_
