"""A fault of a process as the test of it sees it, and what it expects of the others."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fault_settings import TIMEOUT_S, is_over_network
from rank_processes import RankProcesses

# Every rank on a node of its own: on CPU a lost connection shows that a process has ended.
BETWEEN_NODES = {"RANKS_PER_NODE": "1"}


@dataclass(frozen=True)
class Fault:
    """One fault of a run, as the test sees it.

    Attributes:
        run: the processes.
        label: the argument of ranks/faults.py.
        victim: the process that has the fault.
        live: the processes of the group, in the order of their ranks.
    """

    run: RankProcesses
    label: str
    victim: int
    live: Sequence[int]

    @property
    def survivors(self) -> list[int]:
        return [process for process in self.live if process != self.victim]

    @property
    def rank(self) -> int:
        """Of the victim in the group."""
        return self.live.index(self.victim)

    def report(self, process: int, name: str) -> dict[str, Any]:
        """Wait for what a process found."""
        return self.run.wait_for_report(process, f"{self.label}: {name}")

    @property
    def is_over_tcp(self) -> bool:
        return self.run.platform == "cpu" and self.run.environment == BETWEEN_NODES

    @property
    def is_seen(self) -> bool:
        """Whether the survivors need not wait to know of it."""
        return self.is_over_tcp and self.label.startswith("dies")

    def assert_aborted(self, report: dict[str, Any]) -> None:
        """Check what a rank found on the broken communicator: NaN and zeros, at once and for ever."""
        assert report["results"]
        assert report["later_results"]
        assert report["later_seconds"] < TIMEOUT_S / 2
        assert report["sticky"]
        assert report["trace_error"] == report["error"]
        assert report["device_works"]
        if self.is_seen:
            lost = rf"CommunicatorError: .* waits for rank {self.rank}, to which the connection was lost \("
            assert re.match(lost, report["error"]), report["error"]
            assert "Find out why it ended" in report["error"]
            return
        assert report["error"].startswith("PeerTimeoutError: ")
        assert "timeout_s" in report["state"]
        assert re.search(rf"waited {TIMEOUT_S} s \(timeout_s\) .*for rank {self.rank} \(", report["error"])
        assert "then make a new Communicator" in report["error"]

    def assert_names_steps(self, error: str, steps_before: int) -> None:
        if self.is_seen:
            assert f" at step {steps_before + 1} waits for rank {self.rank}, " in error
            return
        waiting = "|".join(str(rank) for rank in range(len(self.live)) if rank != self.rank)
        wanted = (
            rf"dispatch on rank ({waiting}) waited {TIMEOUT_S} s \(timeout_s\) for rank {self.rank} "
            rf"\(expected at step {steps_before + 1}, seen at step {steps_before}\) \(communicator #\d+\)"
        )
        assert re.search(wanted, error), error

    def assert_survivors_agree(self) -> None:
        """Check that the survivors lost the same step, and that all of its results are NaN.

        What a rank sends last reaches some before others: over TCP one may have completed the step.
        """
        steps = [self.report(process, "steps before")["steps"] for process in self.survivors]
        assert max(steps) - min(steps) <= (1 if self.is_over_tcp else 0)
        for process in self.survivors:
            assert self.report(process, "broke in a step")["gradients"]
            self.assert_aborted(self.report(process, "aborted"))

    def assert_late_rank_does_no_harm(self) -> None:
        """Check that the late rank's communicator is broken as well, and that all others work."""
        if is_over_network(self.run.environment):
            assert self.report(self.victim, "broke in a step")["gradients"]
        self.assert_aborted(self.report(self.victim, "aborted"))
        for process in self.live:
            report = self.report(process, "unharmed")
            assert report["other"], "a communicator that lived beside the broken one"
            assert report["new"], "a communicator made after it"
            assert report["earlier"], "results from before"
            assert report["still_broken"].startswith("PeerTimeoutError: ")
