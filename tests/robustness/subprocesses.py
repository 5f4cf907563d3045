"""Runs a piece of Python in a separate process, so that a deadlock or a crash fails one test."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
from quick_compilation import QUICK_COMPILATION

TESTS = pathlib.Path(__file__).parents[1]

PREAMBLE = """
import faulthandler, os, time
faulthandler.dump_traceback_later({timeout_s} - 5, exit=True)
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 {flags}"
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jax.numpy as jnp
import numpy as np
import jax_deepep as ep
from jax.sharding import PartitionSpec as P
from meshes import device_axis, fetch, mesh_named, per_device, put_on_mesh
"""


def run_python(
    code: str,
    *,
    num_threads: int | None = None,
    preload: pathlib.Path | None = None,
    timeout_s: int = 120,
    exit_status: int = 0,
) -> str:
    """Run `code` on 8 CPU devices and return what it printed; fail with all of it if it does not end so.

    `num_threads` is NPROC, the size of XLA's thread pool; None leaves it to the package. `preload` is a
    library to load before the system's own.
    """
    environment = {name: value for name, value in os.environ.items() if name != "NPROC"}
    if num_threads is not None:
        environment["NPROC"] = str(num_threads)
    if preload is not None:
        environment["LD_PRELOAD"] = str(preload)
    paths = [str(TESTS), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    program = PREAMBLE.format(timeout_s=timeout_s, flags=QUICK_COMPILATION) + textwrap.dedent(code)
    try:
        ended = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as expired:
        pytest.fail(f"hung for {timeout_s} s\n{expired.stdout}\n{expired.stderr}")
    printed = f"exit status {ended.returncode}\n{ended.stdout}\n{ended.stderr[-8000:]}"
    assert ended.returncode == exit_status, printed
    return ended.stdout
