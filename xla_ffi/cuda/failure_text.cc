#include "cuda/failure_text.h"

#include <vector>

#include "interface/error_text.h"

namespace jax_deepep {

std::string Describe(const FailureReport& report, int reporter, int group,
                     const CommunicatorConfig& config) {
  const std::string op = NameOf(report.op.verb);
  const std::string on_rank = " on rank " + std::to_string(reporter);
  std::vector<MissingRank> missing;
  for (int peer = 0; peer < config.shape.num_ranks; ++peer) {
    if (!report.missing.Has(peer)) continue;
    missing.push_back({peer, static_cast<int64_t>(report.step),
                       static_cast<int64_t>(report.seen[peer]),
                       report.failure == Failure::kNotLeft});
  }
  switch (report.failure) {
    case Failure::kWrongRank:
      return DescribeBroken(op + ": the program runs rank " + std::to_string(reporter) +
                                " of the communicator's mesh as another rank",
                            config, group, kRunSameProgram);
    case Failure::kDifferentOps:
      return DescribeBroken(
          DescribeDifferentOps(
              report.op, reporter, static_cast<int64_t>(report.step), report.other_rank,
              DescribeDifference(report.op, reporter, report.other_op, report.other_rank)),
          config, group, kRunSameProgram);
    case Failure::kClosed:
      return DescribeBroken("a program ran on after the communicator was closed" + on_rank, config,
                            group, kCloseLater);
    case Failure::kLeft:
      return DescribeBroken("the program" + on_rank + " ended with an error", config, group,
                            kFindFailed);
    case Failure::kNotLaunched:
      return DescribeBroken(
          op + on_rank + " could not be launched; the error of its program has the reason", config,
          group, kMakeAnother);
    case Failure::kTwoAtOnce:
      return DescribeBroken(op + on_rank + " began while another op of the communicator ran there",
                            config, group, kOneAtATime);
    case Failure::kNoRoom:
      return DescribeBroken(op + on_rank + " found no SMs for all of its blocks within timeout_s",
                            config, group, kLeaveRoom);
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
