"""How many threads XLA's CPU client needs so that several virtual devices cannot deadlock.

XLA:CPU runs the devices of one process on one thread pool, sized by the number of cores or by the
environment variable NPROC. When more than 32 programs are in flight, the launch of the next one
blocks a thread per device, and the running program needs one per device as well: with fewer than
twice as many threads as devices they deadlock. This applies to every program of several
devices, XLA's own collectives included.
"""

import os
import re
import sys
import warnings
from collections.abc import Mapping, MutableMapping

THREADS_PER_DEVICE = 2

_written: str | None = None  # the NPROC that this module has set in this process's environment


def _num_threads() -> int:
    """Return the size that XLA's pool has, or will have once the client exists."""
    try:
        return int(os.environ["NPROC"])
    except (KeyError, ValueError):
        return len(os.sched_getaffinity(0))


def _num_configured_devices() -> int:
    """Return how many CPU devices this process asks for, before the client exists."""
    if "jax" in sys.modules:
        configured = int(getattr(sys.modules["jax"].config, "jax_num_cpu_devices", -1))
    else:  # JAX will read this when it is imported
        variable = os.environ.get("JAX_NUM_CPU_DEVICES", "")
        configured = int(variable) if variable.isdigit() else -1
    flags = os.environ.get("XLA_FLAGS", "")
    forced = re.findall(r"--xla_force_host_platform_device_count=(\d+)", flags)
    return max([configured, 1, *map(int, forced)])


def set_num_threads(environ: MutableMapping[str, str], num_devices: int) -> None:
    """Set NPROC for a process with `num_devices` CPU devices, if it has fewer cores and NPROC is unset.

    Args:
        environ: of that process; an NPROC that this module has set counts as unset.
        num_devices: a single one never deadlocks, and needs nothing.
    """
    needed = THREADS_PER_DEVICE * num_devices
    if num_devices > 1 and not _set_by_user(environ) and needed > len(os.sched_getaffinity(0)):
        environ["NPROC"] = str(needed)


def _set_by_user(environ: Mapping[str, str]) -> bool:
    return environ.get("NPROC", _written) != _written


def _client_exists() -> bool:
    if "jax" not in sys.modules:  # not imported for this: the launcher does not need it
        return False
    from jax_deepep import jax_compat

    return jax_compat.backends_are_initialized()


def reserve_cpu_threads() -> None:
    """Set NPROC for the devices that this process asks for, unless the client exists already."""
    global _written
    if _client_exists() or _set_by_user(os.environ):
        return
    set_num_threads(os.environ, _num_configured_devices())
    _written = os.environ.get("NPROC")


def warn_of_too_few_threads(num_devices: int) -> None:
    """Warn when XLA's pool is too small for `num_devices` devices of this process."""
    needed = THREADS_PER_DEVICE * num_devices
    if num_devices > 1 and _num_threads() < needed:
        warnings.warn(
            f"XLA's CPU client has {_num_threads()} threads for {num_devices} devices; with more "
            f"than 32 programs in flight it can deadlock below {needed}. Set NPROC={needed} in the "
            "environment, or import jax_deepep before JAX is first used, with the number of CPU "
            "devices already set.",
            stacklevel=4,  # where a communicator is made
        )
