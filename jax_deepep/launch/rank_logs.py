"""Output: each rank's lines on the console and in a file, and the launcher's own."""

import os
import re
import select
import time
from collections.abc import Callable, Iterable
from pathlib import Path

_OUT, _ERR = 1, 2
_PIECE = 4096  # a pipe that can be written takes as much at once
_PATIENCE_S = 1.0  # with a reader, once the job is to end
_LONGEST_LINE = 65536
_BETWEEN_STATES_S = 5.0  # of a line that a program writes over, such as a progress bar
_SHOWN_LINES = 60
_FATAL = "Fatal Python error"
_LINES_BEFORE_FATAL = 15  # where the library that aborted says why
_TRACEBACKS = ("Traceback (most recent call last)", _FATAL, "  + Exception Group Traceback")


class RankLog:
    """One rank's output."""

    def __init__(self, rank: int, path: Path, on_console: Callable[[], bool]) -> None:
        self.rank = rank
        self.path = path
        self._file = path.open("wb", buffering=0)
        self._on_console = on_console
        self._partial = b""
        self._state_shown_s = time.monotonic()
        self._is_lost = False

    def write(self, data: bytes) -> None:
        """Log the bytes; show complete lines, and now and then one that is written over."""
        try:
            self._file.write(data)
        except OSError as error:
            if not self._is_lost:
                self._is_lost = True
                say(f"{self.path}: cannot be written ({error.strerror}); the job goes on without it")
        *lines, partial = (self._partial + data).split(b"\n")
        lines = [_newest_state(line).lstrip(b"\r") for line in lines]
        self._partial = _newest_state(partial)
        whole = _newest_state(partial[: len(partial) - len(self._partial)]).strip(b"\r")
        if whole and time.monotonic() - self._state_shown_s >= _BETWEEN_STATES_S:
            self._state_shown_s = time.monotonic()
            lines.append(whole)
        if len(self._partial) > _LONGEST_LINE:
            lines.append(self._partial)
            self._partial = b""
        if lines and self._on_console():
            show(self.rank, lines)

    def close(self) -> None:
        """Show an unterminated last line."""
        if self._partial and self._on_console():
            show(self.rank, [self._partial.lstrip(b"\r")])
        self._partial = b""
        self._file.close()


def _newest_state(line: bytes) -> bytes:
    """Return what was written last of a line that begins with a carriage return, as progress bars do.

    Other lines, which may quote such output, are returned whole.
    """
    return line[max(0, line.rstrip(b"\r").rfind(b"\r")) :] if line.startswith(b"\r") else line


class Outputs:
    """The launcher's standard output and error. It waits for who reads them, until the job is to end."""

    def __init__(self) -> None:
        self.is_ending: Callable[[], bool] = lambda: False
        self._broken: set[int] = set()

    def write(self, number: int, data: bytes) -> None:
        """Write to a descriptor. What nobody reads, or cannot be written, is lost; logs have it."""
        while data and number not in self._broken:
            try:
                if select.select([], [number], [], _PATIENCE_S)[1]:
                    data = data[os.write(number, data[:_PIECE]) :]
                elif self.is_ending():
                    self._broken.add(number)
            except BlockingIOError:  # of a pipe that somebody else has filled meanwhile
                continue
            except OSError as error:
                self._broken.add(number)
                name = "output" if number == _OUT else "error"
                say(f"standard {name} cannot be written ({error.strerror}); the job goes on, with its logs")


OUTPUTS = Outputs()


def show(rank: int, lines: list[bytes], to: int = _OUT) -> None:
    """Print whole lines, each with its rank."""
    prefix = b"[%d] " % rank
    OUTPUTS.write(to, b"".join(prefix + line + b"\n" for line in lines))


def show_last(rank: int, lines: Iterable[str]) -> None:
    """Print lines of a rank as the launcher's own."""
    show(rank, [line.encode(errors="replace") for line in lines], _ERR)


def say(text: str) -> None:
    """Print a line of the launcher's own."""
    OUTPUTS.write(_ERR, f"[launch] {text}\n".encode(errors="replace"))


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
        text = file.read(length - begin)
    # A traceback may follow a progress bar on its line.
    marks = "|".join(map(re.escape, _TRACEBACKS)).encode()
    text = re.sub(rb"(\r[^\r\n]+?)(" + marks + rb")", rb"\1\n\2", text)
    lines = text.decode(errors="replace").splitlines()
    starts = [index for index, line in enumerate(lines) if line.startswith(_TRACEBACKS)]
    if not starts:  # of a progress bar, its end
        states = [_newest_state(line.rstrip(b"\r")).lstrip(b"\r") for line in text.split(b"\n")]
        lines = b"\n".join(states).decode(errors="replace").splitlines()
    start = starts[-1] if starts else max(0, len(lines) - _SHOWN_LINES // 2)
    if starts and lines[start].startswith(_FATAL):
        start = max(0, start - _LINES_BEFORE_FATAL)
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
