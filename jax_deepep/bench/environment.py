"""The environment of a measurement: machine, versions, command."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def custom_calls_are_captured() -> bool:
    """Return whether XLA is configured to capture custom calls in CUDA graphs."""
    return "CUSTOM_CALL" in os.environ.get("XLA_FLAGS", "") and jax.devices()[0].platform == "gpu"


def environment() -> dict[str, Any]:
    """Return the environment to store with measurements, ready for JSON."""
    devices = jax.devices()
    return {
        "command": "python -m jax_deepep.bench " + " ".join(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "processor": _processor(),
        "cores": usable_cores(),
        "load_average": os.getloadavg()[0],
        "devices": f"{len(devices)} {devices[0].platform} ({devices[0].device_kind})",
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": {
            "jax_deepep": importlib.metadata.version("jax_deepep"),
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    """Return the git commit of the package, with a + where files differ from it; None outside of git."""
    here = Path(__file__).parent
    try:
        describe = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
