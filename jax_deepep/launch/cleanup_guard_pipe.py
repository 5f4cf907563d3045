"""The launcher's end of `cleanup_guard`: the pipe whose closing sets the cleaning off."""

import subprocess
import sys
from pathlib import Path
from types import TracebackType


class CleanupGuard:
    """Start the guard; give it orders; leaving the context makes it clean up, and waits for that."""

    def __init__(self) -> None:
        # A session of its own: what ends the launcher's group or terminal must not end the guard.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("cleanup_guard.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True, cwd="/",
        )  # fmt: skip

    @property
    def pid(self) -> int:
        """The guard's process id."""
        return self._process.pid

    def order(self, line: str) -> None:
        """Tell the guard what to do at the end (see `cleanup_guard`)."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def __enter__(self) -> "CleanupGuard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            print("[launch] the clean-up is still running; not waiting for it any longer", file=sys.stderr)
