#include "cuda/failure_text.h"

#include <vector>

#include "interface/error_text.h"

namespace jax_deepep {

const char* NameOf(Verb verb) {
  switch (verb) {
    case Verb::kDispatch:
      return "dispatch";
    case Verb::kRedispatch:
      return "redispatch";
    case Verb::kCombine:
      return "combine";
    case Verb::kFloor:
      return "floor";
  }
  return "op";
}

std::string Describe(const FailureReport& report, int reporter, int group,
                     const CommunicatorConfig& config) {
  const std::string op = NameOf(report.verb);
  std::vector<MissingRank> missing;
  std::string others;
  for (int peer = 0; peer < config.shape.num_ranks; ++peer) {
    if ((report.missing >> peer & 1) == 0) continue;
    missing.push_back({peer, static_cast<int64_t>(report.step),
                       static_cast<int64_t>(report.seen[peer]),
                       report.failure == Failure::kNotLeft});
    others += " " + std::to_string(peer);
  }
  switch (report.failure) {
    case Failure::kWrongRank:
      return DescribeBroken(op + ": the program runs a device as another rank than the " +
                                std::to_string(reporter) + " that it is in the communicator's mesh",
                            config, group, kRunSameProgram);
    case Failure::kDifferentOps:
      return DescribeBroken(op + " on rank " + std::to_string(reporter) +
                                " met another op at step " + std::to_string(report.step) +
                                " on rank" + others,
                            config, group, kRunSameProgram);
    case Failure::kClosed:
      return DescribeBroken(
          "a program ran on after the communicator was closed on rank " + std::to_string(reporter),
          config, group, kCloseLater);
    case Failure::kNone:
    case Failure::kNotArrived:
    case Failure::kNotLeft:
      break;
  }
  const char* where = report.failure == Failure::kNotLeft ? " inside the op" : "";
  return DescribeBroken(DescribeTimeout(op, reporter, config.timeout_s, where, missing), config,
                        group, kFindMissing);
}

bool IsTimeout(Failure failure) {
  return failure == Failure::kNotArrived || failure == Failure::kNotLeft;
}

}  // namespace jax_deepep
