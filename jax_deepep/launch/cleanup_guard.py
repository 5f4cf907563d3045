"""Run beside the launcher: clean up after it, whatever its end was, SIGKILL included.

Run as a script, with the standard library alone. It reads orders from a pipe whose other end only the
launcher holds, so end-of-file means that the launcher has finished or died. Orders, one a line:

* `group PID`: kill this process group at the end. `forget`: the groups have been dealt with.
* `mps FOLDER`: stop the MPS daemon of this folder, then remove the folder.

The launcher never cleans these up itself: it closes the pipe and waits. One way for every ending
means that the way taken after a crash is the one that is taken every day.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

MPS_CONTROL = "nvidia-cuda-mps-control"


def main() -> None:
    """Follow the orders until the launcher is gone, then clean up."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # meant for the launcher, whose end will be seen here
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    groups: list[int] = []
    mps_folders: list[str] = []
    for line in sys.stdin:
        order, _, argument = line.rstrip("\n").partition(" ")
        if order == "group":
            groups.append(int(argument))
        elif order == "forget":
            groups.clear()
        elif order == "mps":
            mps_folders.append(argument)
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    for folder in mps_folders:
        _stop_mps(folder)


def _stop_mps(folder: str) -> None:
    pipe = os.path.join(folder, "pipe")
    env = {
        **os.environ,
        "CUDA_MPS_PIPE_DIRECTORY": pipe,
        "CUDA_MPS_LOG_DIRECTORY": os.path.join(folder, "log"),
    }
    pid = _daemon_pid(pipe)
    try:
        subprocess.run(
            [MPS_CONTROL], input="quit -t 5\n", text=True, env=env, timeout=15,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"[launch] the MPS daemon did not take 'quit': {error}", file=sys.stderr)
    if pid is not None and not _gone_within(pid, 5.0):
        # A client's fault can leave the daemon deaf. It is ours alone, so it may be killed.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def _daemon_pid(pipe: str) -> int | None:
    try:
        with open(os.path.join(pipe, MPS_CONTROL + ".pid")) as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def _gone_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


main()
