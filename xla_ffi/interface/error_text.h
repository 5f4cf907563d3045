// Error texts that are the same on every platform.
#ifndef JAX_DEEPEP_INTERFACE_ERROR_TEXT_H_
#define JAX_DEEPEP_INTERFACE_ERROR_TEXT_H_

#include <cstdint>
#include <cstdio>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "interface/communicator_config.h"

namespace jax_deepep {

// A rank that another one waited for.
struct MissingRank {
  int rank;
  int64_t expected_step;
  int64_t seen_step;
  bool stopped;         // it arrived at the op, but did not finish it
  std::string instead;  // how the op that it waits in differs, or empty

  MissingRank(int rank, int64_t expected_step, int64_t seen_step, bool stopped,
              std::string instead = "")
      : rank(rank),
        expected_step(expected_step),
        seen_step(seen_step),
        stopped(stopped),
        instead(std::move(instead)) {}
};

// Follows the step of a rank that waits in another op.
inline constexpr char kWaitsInOtherOp[] = ", where it waits in another op";

inline std::string DescribeTimeout(const std::string& op, int waiting_rank, double timeout_s,
                                   const std::string& where,
                                   const std::vector<MissingRank>& missing) {
  std::ostringstream text;
  text << op << " on rank " << waiting_rank << " waited " << timeout_s << " s (timeout_s)" << where
       << " for ";
  const char* separator = missing.size() == 1 ? "rank " : "ranks ";
  for (const MissingRank& peer : missing) {
    text << separator << peer.rank << " (expected at step " << peer.expected_step
         << ", seen at step " << peer.seen_step << (peer.stopped ? ", then stopped" : "");
    if (!peer.instead.empty()) text << kWaitsInOtherOp << ": " << peer.instead;
    text << ")";
    separator = ", ";
  }
  return text.str();
}

// Why a rank will not arrive, as DescribeEnded takes it.
inline constexpr char kHasClosed[] = "which has closed the communicator or ended";
inline constexpr char kConnectionLost[] = "to which the connection was lost (";

// An op that waits for a rank that will not arrive, and why.
inline std::string DescribeEnded(const std::string& op, int waiting_rank, int64_t step, int rank,
                                 const std::string& why) {
  return op + " on rank " + std::to_string(waiting_rank) + " at step " + std::to_string(step) +
         " waits for rank " + std::to_string(rank) + ", " + why;
}

// Whether a description, possibly a peer's, is from DescribeTimeout.
inline bool IsTimeout(const std::string& description) {
  return description.find(" s (timeout_s)") != std::string::npos;
}

// Remedies.
inline constexpr char kFindMissing[] =
    "Find out why the missing rank did not arrive, then make a new Communicator; raise timeout_s "
    "if it was only slow.";
inline constexpr char kFindFailed[] =
    "Find out why it ended, then restart the job, or make a new Communicator without it.";
inline constexpr char kRunSameProgram[] =
    "Run the same program on all ranks, on the communicator's mesh, and make a new Communicator; "
    "a longer timeout_s does not help.";
inline constexpr char kMakeAnother[] = "Make a new Communicator when that is fixed.";
inline constexpr char kOneAtATime[] =
    "Let every op depend on the one before it (by its handle, its result, or "
    "jax.lax.optimization_barrier), run one program at a time, or make a Communicator for each.";
inline constexpr char kLeaveRoom[] =
    "Other kernels held them, perhaps those of another communicator: run one program at a time, or "
    "give the ops fewer SMs with num_sms. Then make a new Communicator.";
inline constexpr char kWaitBetween[] =
    "Make a new Communicator, and wait for results (jax.block_until_ready) before launching more.";
inline constexpr char kMoreThreads[] =
    "Raise the limit on processes and threads (ulimit -u, or pids.max of the container), then make "
    "a new Communicator.";
inline constexpr char kCloseLater[] =
    "Close a communicator after the last run of a program that uses it, on every rank; make a new "
    "Communicator to go on.";

// Which processes have the ranks of a group, if these are not numbered alike: logs are of
// processes. Empty if they are, or if one process has all.
inline std::string DescribeProcesses(const CommunicatorConfig& config, int group) {
  std::map<int, int> processes;  // by rank
  for (const Location& location : config.locations) {
    if (location.group == group) processes[location.rank] = location.process;
  }
  struct Run {  // ranks of one process
    int first, last, process;
  };
  std::vector<Run> runs;
  bool alike = true;
  for (const auto& [rank, process] : processes) {
    alike = alike && rank == process;
    if (!runs.empty() && runs.back().process == process) {
      runs.back().last = rank;
    } else {
      runs.push_back({rank, rank, process});
    }
  }
  if (alike || runs.size() < 2) return "";
  std::ostringstream text;
  constexpr size_t kMostRuns = 16;
  for (size_t i = 0; i < runs.size() && i < kMostRuns; ++i) {
    const Run& run = runs[i];
    text << (i == 0 ? "; " : ", ");
    if (run.first == run.last) {
      text << "rank " << run.first << " is";
    } else {
      text << "ranks " << run.first << "-" << run.last << " are";
    }
    text << " in process " << run.process;
  }
  if (runs.size() > kMostRuns) text << ", and so on";
  return text.str();
}

// Complete the description of a failure with its communicator and a remedy.
inline std::string DescribeBroken(const std::string& failure, const CommunicatorConfig& config,
                                  int group, const std::string& advice) {
  std::ostringstream text;
  text << failure << " (communicator #" << config.id;
  if (config.num_groups > 1) text << ", group " << group;
  text << DescribeProcesses(config, group)
       << "). The communicator is broken: its ops return NaN and zero counts from now on. "
       << advice;
  return text.str();
}

// Print what broke a communicator, once per communicator and process: its program may hang in
// another collective and never ask for the error.
inline void PrintToStderr(const std::string& text) {
  const std::string line = "jax_deepep: " + text + "\n";
  std::fwrite(line.data(), 1, line.size(), stderr);  // in one call, so that lines do not mix
  std::fflush(stderr);
}

inline std::string DescribeInvalidRouting(const CommunicatorConfig& config, int group, int rank,
                                          int64_t count, int64_t step) {
  std::ostringstream text;
  text << "dispatch on rank " << rank;
  if (config.num_groups > 1) text << " of group " << group;
  text << " (communicator #" << config.id << ") ignored " << count
       << " entries of topk_idx, at step " << step << " or before: they were outside [-1, "
       << config.shape.num_experts
       << "), or named an expert for the second time in their row. Use -1 for \"no expert\"; "
          "handle.num_invalid has the count of each dispatch.";
  return text.str();
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_INTERFACE_ERROR_TEXT_H_
