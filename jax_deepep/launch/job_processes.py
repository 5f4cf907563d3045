"""The launcher's own processes: front, guard and worker, so that nothing outlives a job, whatever its end.

* The front is the process that was started. It only forwards signals through a pipe and returns the status.
  When it dies, even by SIGKILL, the pipe is closed.
* The guard, its child, has its own session, so that signals to the front's group or terminal do not reach it.
  It is a subreaper: orphans below it become its children, and it kills them when the worker has ended.
* The worker, the guard's child, starts and watches the ranks. It treats a closed pipe as SIGKILL.

So processes are ended in two places: ranks by the worker, with a grace period, and what remains by the guard.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from jax_deepep.launch.mps_daemon import MpsDaemon
from jax_deepep.launch.rank_logs import say

_PR_SET_CHILD_SUBREAPER = 36
_KILL_WAIT_S = 30.0  # a process in a driver call that hangs does not die, even by SIGKILL


class StopRequests:
    """The signals that the front received, as read by the worker; SIGKILL: the front is gone."""

    def __init__(self, pipe: int) -> None:
        os.set_blocking(pipe, False)
        self._pipe = pipe
        self._numbers: list[int] = []

    def read(self) -> list[int]:
        """Return all that have come so far."""
        if signal.SIGKILL not in self._numbers:
            with contextlib.suppress(BlockingIOError):
                self._numbers.extend(os.read(self._pipe, 64) or [signal.SIGKILL])
        return self._numbers


def run_guarded(work: Callable[[StopRequests], int], mps: MpsDaemon | None) -> int:
    """Run `work` in the worker and return its status, when nothing of the job is left.

    Args:
        work: what the worker does; returns the status of the job.
        mps: a daemon that it may start; the guard stops it.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it is ignored, nobody can wait for a process
    reading, writing = os.pipe()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)

    def forward(number: int, _: object) -> None:
        with contextlib.suppress(OSError):  # the worker has ended
            os.write(writing, bytes([number]))

    def guarded() -> int:
        for number in numbers:  # a handler, because ranks would inherit SIG_IGN
            signal.signal(number, lambda *_: None)
        os.close(writing)
        os.setsid()
        return _guard(lambda: work(StopRequests(reading)), mps)

    for number in numbers:
        signal.signal(number, forward)
    guard = _fork(guarded)
    os.close(reading)
    return _status(os.waitpid(guard, 0)[1])


def _guard(work: Callable[[], int], mps: MpsDaemon | None) -> int:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    worker = _fork(work)
    ended = None
    while ended != worker:
        ended, wait_status = os.wait()  # also reaps adopted children
    _kill_children(spare=mps.pid() if mps is not None else None)
    if mps is not None:
        mps.quit()
        _kill_children(grace_s=5.0)
        mps.remove_folder()
    return _status(wait_status)


def _fork(run: Callable[[], int]) -> int:
    """Run a function in a new process, which ends with the status that it returns; return the process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid != 0:
        return pid
    status = 1
    try:
        status = run()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # the exit handlers are the front's


def _status(wait_status: int) -> int:
    code = os.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else 128 - code


def _kill_children(spare: int | None = None, grace_s: float = 0.0) -> None:
    """Kill all children that do not end by themselves within the grace period.

    The children of a killed one are adopted in turn, so this repeats until there are none.
    """
    begin = time.monotonic()
    while children := _children() - {spare}:
        waited = time.monotonic() - begin
        if waited > grace_s + _KILL_WAIT_S:
            say(f"processes {sorted(children)} do not die by SIGKILL; no longer waiting for them")
            return
        for pid in children:
            if waited >= grace_s:
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)


def _children() -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if int(stat.read_bytes().rpartition(b")")[2].split()[1]) == os.getpid():
                found.add(int(stat.parent.name))
    return found
