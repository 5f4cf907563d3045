"""The conformance suite between processes, under the launcher: the same tests, the same eight devices.

By default a selection, because every process compiles every program. All of it, some minutes per layout:

    JAX_DEEPEP_WHOLE_CONFORMANCE=1 pytest tests/multiprocess/test_conformance_under_launcher.py
"""

import faulthandler
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launcher_runs import ROOT, launcher
from own_processes import starts_its_own_processes

pytestmark = starts_its_own_processes

CONFORMANCE = str(Path(__file__).parent.parent / "conformance")
WHOLE = "JAX_DEEPEP_WHOLE_CONFORMANCE" in os.environ
SELECTION = "native and (invalid or skewed or signs or drop)"
NIGHTLY_SELECTION = "native and (some or drop or invalid or node or signs)"
DEADLINE_S = 1500 if WHOLE else 200


# The bits of four processes are compared with those of one in `test_layouts.py`.
@pytest.mark.parametrize(
    ("num_processes", "num_devices", "selection"),
    [
        (2, 4, SELECTION),
        *(
            pytest.param(*layout, NIGHTLY_SELECTION, marks=pytest.mark.nightly)
            for layout in ((2, 4), (4, 2), (8, 1))
        ),
    ],
)
def test_conformance(num_processes: int, num_devices: int, selection: str) -> None:
    faulthandler.cancel_dump_traceback_later()  # this test has its own deadline
    suite = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", CONFORMANCE]
    suite += [] if WHOLE else ["-k", selection]
    options = ["-n", num_processes, "--platform", "cpu", "--devices-per-process", num_devices, "--"]
    with launcher(*map(str, options), *suite, cwd=ROOT) as process:
        try:
            output, _ = process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # upon which it ends its ranks
            output, _ = process.communicate(timeout=30)
            pytest.fail(f"not through after {DEADLINE_S} s:\n{output}")
    assert process.returncode == 0, output
    assert len(re.findall(r"\d+ passed", output)) == 1, output  # of all ranks together
    assert "skipped" not in output
