"""The Python in the README runs as somebody pastes it, on a laptop; `mypy` reads it with the style checks."""

import os
import resource
import subprocess
import sys
from pathlib import Path

from own_processes import starts_its_own_processes
from readme_snippets import write_snippets

LAPTOP_BYTES = 8 * 2**30


@starts_its_own_processes
def test_every_piece_runs_as_pasted(tmp_path: Path) -> None:
    # Each chooses its devices itself.
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC", "JAX_PLATFORMS")}
    paths = write_snippets(tmp_path)
    assert len(paths) == 3
    for path in paths:
        run = subprocess.run(
            [sys.executable, path], capture_output=True, text=True, timeout=200, env=environment
        )
        assert run.returncode == 0, path.read_text() + run.stdout + run.stderr
    # Of the largest process that this one has started and waited for.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < LAPTOP_BYTES / 2
