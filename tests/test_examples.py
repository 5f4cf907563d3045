"""The training example, end to end: both implementations learn the same from the same seed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.skipif("JAX_DEEPEP_LAUNCH_RANK" in os.environ, reason="starts its own processes")
def test_both_implementations_train_alike() -> None:
    command = [sys.executable, EXAMPLES / "train_moe.py", "--compare"]
    # The example chooses its devices itself, as on a newcomer's machine.
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC", "JAX_PLATFORMS")}
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)

    assert result.returncode == 0, result.stdout + result.stderr
    losses = [float(native) for native in re.findall(r"^ +\d+ +(\d\.\d{5}) +\d\.\d{5} ", result.stdout, re.M)]
    assert len(losses) == 50
    assert losses[-1] < losses[0]
