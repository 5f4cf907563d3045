"""The launcher's own output may be closed, full, or read by nobody."""

import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launcher_runs import alive, environment, launch, launcher, pids, program, wait_until
from own_processes import starts_its_own_processes

from jax_deepep.launch import rank_logs

pytestmark = starts_its_own_processes

FLOOD = """
import os, pathlib, sys
part = pathlib.Path(sys.argv[1]) / "0.self.part"
part.write_text(str(os.getpid()))
part.rename(part.with_suffix(".pid"))
while True:
    print("y" * 99)
"""


@pytest.mark.parametrize(
    ("redirected", "words"),
    [
        (">&-", ""),
        ("2>&-", ""),
        (">/dev/full", "standard output cannot be written (No space left on device); the job goes on"),
        ("--log-dir /dev/null/logs", "--log-dir: expected a folder that can be written, got /dev/null/logs"),
    ],
)
def test_outputs_that_cannot_be_written(tmp_path: Path, redirected: str, words: str) -> None:
    script = program(tmp_path, "import pathlib, sys\nprint('line')\npathlib.Path(sys.argv[1]).touch()\n")
    where = "" if redirected.startswith("--") else redirected
    options = redirected if redirected.startswith("--") else "--log-dir log"
    line = f"{sys.executable} -m jax_deepep.launch -n 1 {options} -- {sys.executable} {script} ran {where}"
    done = subprocess.run(
        ["sh", "-c", line], env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == (2 if options == redirected else 0)
    assert (tmp_path / "ran").exists() == (options != redirected)


def test_a_job_ends_although_nobody_reads_its_output(tmp_path: Path) -> None:
    """As with a pager that waits: `launcher` opens a pipe, which is not read here."""
    script = program(tmp_path, FLOOD)
    with launcher("-n", "1", "--grace", "1", "--", sys.executable, script, tmp_path, cwd=tmp_path) as job:
        wait_until(lambda: len(pids(tmp_path)) == 1)
        time.sleep(1)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=30) == 128 + signal.SIGTERM
    assert not [pid for pid in pids(tmp_path) if alive(pid)]


@pytest.mark.parametrize(("size", "between"), [(1, 14), (7, 14), (1000, 0)])
def test_a_progress_bar_is_shown_now_and_then(size: int, between: int, tmp_path: Path, monkeypatch) -> None:
    """A line that is written over: in between what is whole, however pipes cut it, and as it ends."""
    shown: list[bytes] = []
    monkeypatch.setattr(rank_logs, "show", lambda rank, lines: shown.extend(lines))
    now = 0.0
    monkeypatch.setattr(rank_logs.time, "monotonic", lambda: now)
    log = rank_logs.RankLog(0, tmp_path / "log", lambda: True)
    written = b"".join(b"\r%3d%%" % percent for percent in range(101)) + b"\nend\r\nno line"
    for begin in range(0, len(written), size):
        log.write(written[begin : begin + size])
        now = begin / 5  # a second for each state
    log.close()
    assert shown[-3:] == [b"100%", b"end\r", b"no line"]
    states = [int(state.removesuffix(b"%")) for state in shown[:-3]]
    assert len(states) >= between
    assert all(5 <= later - earlier <= 7 for earlier, later in itertools.pairwise(states))
    assert (tmp_path / "log").read_bytes() == written


BAR = """
import sys
for step in range(200):
    sys.stderr.write(f"\\r{step} of 200 steps")
raise ValueError("what was wrong:\\r  0%\\r100%")
"""


def test_a_traceback_after_a_progress_bar_is_shown(tmp_path: Path) -> None:
    status, output = launch("-n", "1", "--", sys.executable, program(tmp_path, BAR), cwd=tmp_path)
    assert status == 1
    end = [line.split("] ")[-1] for line in output[output.index("The end of its log") :].splitlines()[1:]]
    assert end[0] == "Traceback (most recent call last):"
    assert end[-3:] == ["ValueError: what was wrong:", "  0%", "100%"]
    assert "[0] ValueError: what was wrong:" in output[: output.index("The end of its log")]
