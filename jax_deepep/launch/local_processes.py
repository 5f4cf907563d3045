"""The processes of this host's ranks: start them, see them end, end them."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jax_deepep.launch.cleanup_guard_pipe import CleanupGuard
from jax_deepep.launch.rank_environment import LaunchedRank, launched_rank
from jax_deepep.launch.rank_logs import RankLog

_PR_SET_CHILD_SUBREAPER = 36
_ABORTED = 128 + signal.SIGABRT
# What JAX prints before it aborts a process because another one, or the coordinator, is gone.
_JAX_ABORT = b"JAX distributed service detected fatal errors"


@dataclass(frozen=True)
class RankEnd:
    """How and when a rank ended; a failure reported before the process is gone counts as its end."""

    rank: int
    status: int
    when: float
    hung: bool = False  # a test ran past its deadline

    @property
    def how(self) -> str:
        """In words."""
        if self.hung:
            return f"a test ran past its deadline (status {self.status})"
        if self.status > 128 and self.status - 128 in set(signal.Signals):
            return f"killed by {signal.Signals(self.status - 128).name} (status {self.status})"
        return f"exit status {self.status}"


class RankProcess:
    """One rank. Its process is not reaped before `kill_group`, so its id cannot mean another process."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], log: RankLog, guard: CleanupGuard
    ) -> None:
        place = launched_rank(env)
        assert place is not None
        self.place: LaunchedRank = place
        self.rank = place.rank
        self.log = log
        self.end: RankEnd | None = None  # exit, or failure that the rank reported
        self.exited = False
        starter = Path(__file__).with_name("rank_process.py")
        # A process group of its own: it can be ended with all that it started, and a Ctrl-C at the
        # terminal reaches it once, through the launcher.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(starter), str(os.getpid()), *command],
            env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            process_group=0,
        )  # fmt: skip
        guard.order(f"group {self._process.pid}")
        assert self._process.stdout is not None
        self.output = self._process.stdout
        os.set_blocking(self.output.fileno(), False)

    @property
    def pid(self) -> int:
        """The process id, which is its group's too."""
        return self._process.pid

    def poll(self) -> None:
        """Notice an exit, or a failure that the rank has reported while it is still on its way out."""
        if self.exited:
            return
        info = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if info is not None:
            self.exited = True
            status = info.si_status if info.si_code == os.CLD_EXITED else 128 + info.si_status
            self.end = self.end or RankEnd(self.rank, status, time.monotonic())
        if self.end is None and self._dumped_at_deadline():
            self.end = RankEnd(self.rank, 1, time.monotonic(), hung=True)
        if self.end is None or (self.exited and self.end.status == 0):
            with contextlib.suppress(FileNotFoundError):
                status = int(self.place.state_file("failed").read_text())
                self.end = RankEnd(self.rank, status, time.monotonic())

    def _dumped_at_deadline(self) -> bool:
        try:
            return b"Timeout (" in self.place.stacks_file.read_bytes()
        except FileNotFoundError:
            return False

    def is_consequence(self) -> bool:
        """Whether the rank was aborted by JAX because some other process had gone before it."""
        if self.end is None or self.end.status != _ABORTED:
            return False
        with self.log.path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 262144))
            return _JAX_ABORT in file.read()

    def dump_stacks(self) -> bool:
        """Ask for the stacks of all threads, if the rank is prepared for it."""
        try:
            pid = int(self.place.state_file("dumps").read_text())
            if not self.exited and os.getpgid(pid) == self.pid:
                os.kill(pid, signal.SIGUSR1)
                return True
        except (FileNotFoundError, ProcessLookupError, ValueError):
            pass
        return False

    def signal_group(self, number: int) -> None:
        """Send a signal to the rank and everything it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def kill_group(self) -> None:
        """Kill what is left of the rank and what it started, then reap it."""
        self.signal_group(signal.SIGKILL)
        self._process.wait()
        self.exited = True


def first_failure(ranks: Sequence[RankProcess]) -> RankProcess | None:
    """Return the rank whose failure came first, aborts that JAX inflicted set aside."""
    failed = [rank for rank in ranks if rank.end is not None and rank.end.status != 0]
    return min(
        failed, key=lambda rank: (rank.is_consequence(), rank.end.when if rank.end else 0.0), default=None
    )


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that none can slip away."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def kill_adopted(spare: set[int]) -> None:
    """Kill all children but `spare`: what left its rank's process group, and was adopted.

    Killing one may bring its own children up, hence the repetition.
    """
    for _ in range(20):
        children = _children() - spare
        if not children:
            return
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children() -> set[int]:
    try:
        return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN: the groups are killed all the same
        return set()
