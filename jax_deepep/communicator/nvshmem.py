"""NVSHMEM in this process: carries rows between the hosts of a group of GPUs.

NVSHMEM exists once per process, and initialising it is collective and unbounded. So a child process tries the
library first, and the rest runs on threads that are given up at a deadline. It is never finalised: with a
dead peer that would never end.
"""

import ctypes
import functools
import importlib.util
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from jax_deepep.communicator.native_types import CudaModule
from jax_deepep.communicator.topology import Topology

# The first: less GPU memory. The second: the unit in which memory of communicators is registered. The next
# two are for collectives of NVSHMEM, which we do not use: NCCL takes GPU memory, and rejects ranks that share
# a GPU. The last: hosts reach each other by the network, not as one NVLink domain, for which our memory could
# not be registered.
VARIABLES = {
    "NVSHMEM_MAX_TEAMS": "7", "NVSHMEM_CUMEM_GRANULARITY": "2M", "NVSHMEM_DISABLE_NVLS": "1",
    "NVSHMEM_DISABLE_NCCL": "1", "NVSHMEM_DISABLE_MNNVL": "1",
}  # fmt: skip

LIBRARY = pathlib.Path(__file__).parents[1] / "_nvshmem.so"
_HOST_LIBRARY = "libnvshmem_host.so.3"

# What a child process runs: arguments are the host library, ours and the GPU.
_PROBE = """
import ctypes, sys
ctypes.CDLL(sys.argv[1])
probe = ctypes.CDLL(sys.argv[2]).jax_deepep_nvshmem_probe
probe.restype = ctypes.c_char_p
sys.exit((probe(int(sys.argv[3])) or b"").decode() or 0)
"""
_PROBE_S = 60.0

_given_up = ""  # why NVSHMEM cannot be used any more: the peers of a call that hangs may be in the next one

_ONE_GPU_EACH = (
    "start one process for each GPU, for example python -m jax_deepep.launch -n GPUS_OF_A_HOST --hosts HOSTS "
    "-- python train.py"
)


def unsupported_reason(topology: Topology, process: int) -> str:
    """Return why this process cannot put rows to other hosts, or an empty string."""
    num_devices = len(topology.local_devices(process))
    if num_devices != 1:
        return (
            f"NVSHMEM, which carries rows between hosts, has one GPU per process, and "
            f"{topology.describe_process(process)} has {num_devices}: {_ONE_GPU_EACH}"
        )
    if not LIBRARY.exists():
        return (
            f"jax_deepep was installed without NVSHMEM, which carries rows between hosts ({LIBRARY.name} is "
            "missing): install nvidia-nvshmem-cu13, or -cu12, and then jax_deepep again"
        )
    if _host_library() is None:
        return (
            f"NVSHMEM, which carries rows between hosts, is not installed ({_HOST_LIBRARY}): install "
            "nvidia-nvshmem-cu13, or -cu12, or set NVSHMEM_HOME"
        )
    if os.environ.get("NVSHMEM_REMOTE_TRANSPORT") == "libfabric":
        return (
            "NVSHMEM_REMOTE_TRANSPORT=libfabric cannot be used, because NVSHMEM registers no memory of "
            "others for it: unset it"
        )
    ordering = "NVSHMEM_IB_ENABLE_RELAXED_ORDERING"
    if os.environ.get(ordering, "0")[:1].lower() not in ("", "0", "n", "f"):  # as NVSHMEM reads it
        return f"{ordering} cannot be used, because a flag could overtake the rows it announces: unset it"
    return _given_up


def _loaded_library() -> str | None:
    """Return the one that this process has: JAX loads the wheel's, and ours takes that, by its name."""
    with open("/proc/self/maps") as file:
        paths = [line.rstrip("\n").split(maxsplit=5)[-1] for line in file]
    # Of a name with the whole version, where the loaded one is a link to it.
    return next((path for path in paths if pathlib.PurePath(path).name.startswith(_HOST_LIBRARY)), None)


def _host_library() -> str | None:
    if (loaded := _loaded_library()) is not None:
        return loaded
    folders = []
    if home := os.environ.get("NVSHMEM_HOME"):
        folders.append(pathlib.Path(home))
    spec = importlib.util.find_spec("nvidia")
    if spec is not None:
        folders += [pathlib.Path(path) / "nvshmem" for path in spec.submodule_search_locations or []]
    paths = [folder / "lib" / _HOST_LIBRARY for folder in folders]
    return next((str(path) for path in paths if path.exists()), None)


def load(module: CudaModule, device: int) -> None:
    """Load the library into this process, once a child process has tried it on a GPU.

    Args:
        module: that loads it.
        device: the ordinal of the GPU.

    Raises:
        RuntimeError: it cannot be loaded, or does not work here.
    """
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    host_library = _host_library()
    assert host_library is not None, "unsupported_reason was not asked"
    if text := _probe(host_library, device):
        raise RuntimeError(f"NVSHMEM does not work on this host: {text}")
    ctypes.CDLL(host_library)  # ours finds it by its name
    module.load_remote_library(str(LIBRARY))


@functools.cache
def _probe(host_library: str, device: int) -> str:
    """Return why a process alone cannot use NVSHMEM, or an empty string."""
    command = [sys.executable, "-c", _PROBE, host_library, str(LIBRARY), str(device)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_S)
    except subprocess.TimeoutExpired:
        return f"a process alone could not initialise it in {_PROBE_S:g} s"
    if child.returncode == 0:
        return ""
    lines = (child.stderr + child.stdout).strip().splitlines()
    return " / ".join(lines[-3:]) or f"the process that tried it ended with status {child.returncode}"


def within(seconds: float, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that may never return, on a thread; return its result.

    Raises:
        TimeoutError: it did not end in time. The thread goes on.
    """
    results: list[Any] = []
    errors: list[Exception] = []

    def call() -> None:
        try:
            results.append(function(*arguments))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=call, name=what, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        global _given_up
        _given_up = (
            f"{what} did not end before, and a call of NVSHMEM is still waiting in this process: restart the "
            "processes"
        )
        raise TimeoutError(
            f"{what} did not end in {seconds:.3g} s: a process of another host may have ended, or the hosts "
            "cannot reach each other; NVSHMEM_DEBUG=INFO shows more, NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME names "
            "the network interface for the start"
        )
    return results[0]
