"""Output: each rank's lines on the console and in a file, and the launcher's own."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

_LONGEST_LINE = 65536
_SHOWN_LINES = 60
_TRACEBACKS = ("Traceback (most recent call last)", "Fatal Python error", "  + Exception Group Traceback")


class RankLog:
    """One rank's output."""

    def __init__(self, rank: int, path: Path, on_console: Callable[[], bool]) -> None:
        self.rank = rank
        self.path = path
        self._file = path.open("wb", buffering=0)
        self._on_console = on_console
        self._partial = b""

    def write(self, data: bytes) -> None:
        """Log the bytes; show complete lines."""
        try:
            self._file.write(data)
        except OSError as error:
            _say_once(f"{self.path}: cannot be written ({error.strerror}); the job goes on without it")
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > _LONGEST_LINE:
            lines.append(self._partial)
            self._partial = b""
        if lines and self._on_console():
            show(self.rank, lines)

    def close(self) -> None:
        """Show an unterminated last line."""
        if self._partial and self._on_console():
            show(self.rank, [self._partial])
        self._partial = b""
        self._file.close()


def show(rank: int, lines: list[bytes]) -> None:
    """Print whole lines, each with its rank, in one write so that ranks do not mix inside a line."""
    prefix = b"[%d] " % rank
    try:
        sys.stdout.buffer.write(b"".join(prefix + line + b"\n" for line in lines))
        sys.stdout.buffer.flush()
    except OSError as error:
        # It would try to write again what it still holds.
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        say(f"standard output cannot be written ({error.strerror}); the job goes on, with its logs")


def say(text: str) -> None:
    """Print a line of the launcher's own."""
    with contextlib.suppress(OSError):  # the job must not end because nobody listens
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        print(f"[launch] {text}", file=sys.stderr, flush=True)


@functools.cache
def _say_once(text: str) -> None:
    say(text)


def rank_names(ranks: Iterable[int]) -> str:
    """Return "rank 3" or "ranks 0-2, 5"."""
    ordered = sorted(ranks)
    runs: list[list[int]] = []
    for rank in ordered:
        if runs and runs[-1][-1] + 1 == rank:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {text}" if len(ordered) == 1 else f"ranks {text}"


def log_tail(path: Path, length: int) -> list[str]:
    """Return the end of a log's first `length` bytes: the last traceback, or else the last lines."""
    with path.open("rb") as file:
        begin = max(0, length - 262144)
        file.seek(begin)
        lines = file.read(length - begin).decode(errors="replace").splitlines()
    starts = [index for index, line in enumerate(lines) if line.startswith(_TRACEBACKS)]
    start = starts[-1] if starts else max(0, len(lines) - _SHOWN_LINES // 2)
    # Of chained exceptions, show all from the first cause on.
    for earlier in reversed(starts[:-1]):
        between = "\n".join(lines[earlier:start])
        if "exception was the direct cause" in between or "another exception occurred" in between:
            start = earlier
        else:
            break
    # What follows the traceback is mostly output of libraries at exit; the traceback itself is complete.
    shown = lines[start : start + _SHOWN_LINES * 2]
    if len(lines) > start + len(shown):
        shown.append(f"… {len(lines) - start - len(shown)} more lines")
    return shown
