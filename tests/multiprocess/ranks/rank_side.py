"""The inside of a rank: how the scripts of this folder join the others, report to the test, and leave.

A script runs as `python script.py ADDRESS RANK NUM_PROCESSES [ARGUMENTS]`, see ../rank_processes.py.
"""

import glob
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from leftovers import shared_segments

from jax_deepep import jax_compat

ADDRESS = sys.argv[1]
RANK = int(sys.argv[2])
NUM_PROCESSES = int(sys.argv[3])
ARGUMENTS = sys.argv[4:]

REPORT = "REPORT "  # begins a line of findings, for ../rank_processes.py
BARRIER_S = 60

if ranks_per_host := os.environ.get("RANKS_PER_HOST"):
    os.environ["JAX_DEEPEP_HOST_ID"] = f"pretended {RANK // int(ranks_per_host)}"


def join() -> None:
    """Connect to the coordinator; the first thing that a script does. On GPUs, ranks take them in turns."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    num_gpus = len(visible.split(",") if visible else glob.glob("/dev/nvidia[0-9]*"))
    jax.distributed.initialize(
        ADDRESS,
        NUM_PROCESSES,
        RANK,
        local_device_ids=[RANK % num_gpus] if num_gpus > 0 else None,
        initialization_timeout=60,
        shutdown_timeout_seconds=60,
    )


def barrier(name: str, processes: Sequence[int] | None = None) -> None:
    """Wait for the other processes outside of any program; a name is used once."""
    jax_compat.coordination_client().wait_at_barrier(name, 1000 * BARRIER_S, process_ids=processes)


def report(name: str, **findings: Any) -> None:
    """Report findings to the test, as JSON values, with the shared memory that this process holds."""
    line = json.dumps({"name": name, "segments": sorted(shared_segments()), **findings})
    sys.stdout.write(f"{REPORT}{line}\n")  # in one write, so that a kill cannot split the line
    sys.stdout.flush()


def leave_without_the_dead() -> NoReturn:
    """End the process without JAX's shutdown barrier, which waits for all processes, dead ones too."""
    sys.stdout.flush()
    if RANK == 0:
        sys.stdin.buffer.read()  # until all others have ended
    os._exit(0)


def error_of(function: Callable[[], Any]) -> str:
    """Call a function that must raise; return the type and the text of its error."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
