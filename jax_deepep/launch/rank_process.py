"""One rank of this host: start it, notice its end, end it."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

from jax_deepep.launch.rank_ends import ABORTED, RankEnd, end_by_status
from jax_deepep.launch.rank_identity import LaunchedRank
from jax_deepep.launch.rank_logs import RankLog

# What JAX prints before it aborts a process because another one, or the coordinator, is gone.
_JAX_ABORT = b"JAX distributed service detected fatal errors"
_READ_BYTES = 65536  # the capacity of a pipe


class RankProcess:
    """One rank. The launcher does not reap its process, so its id cannot be reused."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], identity: LaunchedRank, log: RankLog
    ) -> None:
        self.identity = identity
        self.rank = identity.rank
        self.log = log
        self.end: RankEnd | None = None  # exit, or failure that the rank reported
        self.exited = False
        self._sent: set[int] = set()
        # Its own process group, to end it together with its child processes.
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            process_group=0,
        )  # fmt: skip
        assert self._process.stdout is not None
        self.output = self._process.stdout
        os.set_blocking(self.output.fileno(), False)

    def poll(self, now: float) -> None:
        """Notice an exit, or a failure that the rank has reported before it exits.

        Args:
            now: the time of this poll, the same for all ranks.
        """
        if self.exited:
            return
        info = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        self.exited = info is not None
        if self.end is not None:
            return
        if (reported := self._reported_failure()) is not None:  # before the exit, even if seen with it
            status, when = reported
            self.end = RankEnd(self.rank, status, when, f"exit status {status}")
        elif info is not None:
            status = info.si_status if info.si_code == os.CLD_EXITED else 128 + info.si_status
            self.end = end_by_status(
                self.rank, status, now, sent=self._sent,
                aborted_by_jax=status == ABORTED and self._was_aborted_by_jax(),
            )  # fmt: skip
        elif self._dumped_at_deadline():
            self.end = RankEnd(self.rank, 1, now, "a test ran past its deadline (status 1)", hung=True)

    def read_output(self) -> bool:
        """Log what the rank has printed; return False at the end of its output."""
        try:
            data = os.read(self.output.fileno(), _READ_BYTES)
        except BlockingIOError:
            return True
        self.log.write(data)
        return bool(data)

    def _reported_failure(self) -> tuple[int, float] | None:
        """Return the status, and when the rank reported it: clocks of a host are the same."""
        try:
            status, when = self.identity.state_file("failed").read_text().split()
        except FileNotFoundError:
            return None
        return int(status), float(when)

    def _dumped_at_deadline(self) -> bool:
        try:
            return b"Timeout (" in self.identity.stacks_file.read_bytes()
        except FileNotFoundError:
            return False

    def _was_aborted_by_jax(self) -> bool:
        self.read_output()  # the end of its output
        with self.log.path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 262144))
            return _JAX_ABORT in file.read()

    def dump_stacks(self) -> None:
        """Request the stacks of all threads, if the rank has installed its handler."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            pid = int(self.identity.state_file("dumps").read_text())
            if not self.exited and os.getpgid(pid) == self._process.pid:
                self._sent.add(signal.SIGUSR1)
                os.kill(pid, signal.SIGUSR1)

    def signal_group(self, number: int) -> None:
        """Send a signal to the rank and its child processes."""
        self._sent.add(number)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)
