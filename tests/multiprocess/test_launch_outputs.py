"""The launcher's own output may be closed, full, or read by nobody."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launcher_runs import alive, environment, launcher, pids, program, wait_until
from own_processes import starts_its_own_processes

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
