"""Run by the launcher in front of every rank: tie the rank's life to the launcher's, then become the rank.

Run as a script, with the standard library alone: `python -I -S rank_process.py LAUNCHER_PID COMMAND…`.
It is a program of its own, not a `preexec_fn`, because code between fork and exec can deadlock in a
process that has threads. PR_SET_PDEATHSIG fires when the parent *thread* ends: the launcher starts
all ranks from its main thread, which lives as long as it does. The setting survives exec.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Arm the parent-death signal and exec the command."""
    launcher, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # the launcher died before the line above could help
        sys.exit(128 + signal.SIGKILL)
    # Python ignores these at start, and ignored signals stay ignored through exec.
    for name in ("SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot run {command[0]!r}: {error.strerror}", file=sys.stderr)
        sys.exit(127 if isinstance(error, FileNotFoundError) else 126)


main()
