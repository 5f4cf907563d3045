"""How ranks ended, and which failure came first: the same rule for the ranks of one host and of all."""

import signal
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

ABORTED = 128 + signal.SIGABRT


class Blame(IntEnum):
    """How likely an end is the cause of a failed job; of failures within a second, the lowest counts.

    Times alone would mislead. When a rank is killed, its connections break before its process is gone: on a
    loaded machine the others' exceptions are seen earlier than the death that caused them.
    """

    KILLED = 0  # by a signal from outside the job; also a launcher that is gone or received a signal
    ABORTED = 1  # by itself
    FAILED = 2  # an exception, a bad exit status, a test past its deadline
    CONSEQUENCE = 3  # JAX aborted the process because another one, or the coordinator, was gone


@dataclass(frozen=True)
class RankEnd:
    """The end of a rank or a launcher; for a rank that reports a failure before it exits, that report."""

    rank: int  # -1: a launcher
    status: int
    when: float  # when the rank reported it, else the time of the poll of all ranks that noticed it
    how: str  # described
    blame: Blame = Blame.FAILED
    hung: bool = False  # a test ran past its deadline


def end_by_status(
    rank: int, status: int, when: float, *, sent: Iterable[int], aborted_by_jax: bool
) -> RankEnd:
    """Return the end of a process from its exit status.

    Args:
        rank: whose process it was.
        status: 128 + s for signal s.
        when: when it was noticed.
        sent: the signals that the launcher has sent to it.
        aborted_by_jax: whether its output says so.
    """
    if status <= 128 or status - 128 not in set(signal.Signals):
        return RankEnd(rank, status, when, f"exit status {status}")
    blame = Blame.KILLED
    if status == ABORTED:
        blame = Blame.CONSEQUENCE if aborted_by_jax else Blame.ABORTED
    elif status - 128 in sent:
        blame = Blame.CONSEQUENCE
    return RankEnd(
        rank, status, when, f"killed by {signal.Signals(status - 128).name} (status {status})", blame
    )


def first_failure(ends: Iterable[RankEnd | None]) -> RankEnd | None:
    """Return the failure that the job's status comes from, of ends within a second; None if all are good."""
    failures = [end for end in ends if end is not None and end.status != 0]
    return min(failures, key=lambda end: (end.blame, end.when, end.rank), default=None)
