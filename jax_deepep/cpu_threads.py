"""How many threads XLA's CPU client needs so that several virtual devices cannot deadlock.

XLA:CPU runs the devices of one process on one thread pool, sized by the number of cores or by the
environment variable NPROC. When more than 32 programs are in flight, the launch of the next one
blocks a thread per device, and the running program needs one per device as well: with fewer than
twice as many threads as devices nothing moves any more. That is so for every program of several
devices, XLA's own collectives included.
"""

import os
import re
import warnings

import jax

from jax_deepep import jax_compat

THREADS_PER_DEVICE = 2


def _num_threads() -> int:
    """Return the size that XLA's pool has, or will have once the client exists."""
    try:
        return int(os.environ["NPROC"])
    except (KeyError, ValueError):
        return len(os.sched_getaffinity(0))


def _num_configured_devices() -> int:
    """Return how many CPU devices this process asks for, before the client exists."""
    configured = int(getattr(jax.config, "jax_num_cpu_devices", -1))
    flags = os.environ.get("XLA_FLAGS", "")
    forced = re.findall(r"--xla_force_host_platform_device_count=(\d+)", flags)
    return max([configured, 1, *map(int, forced)])


def reserve_cpu_threads() -> None:
    """Set NPROC for the devices asked for, unless the user set it or the client exists already."""
    needed = THREADS_PER_DEVICE * _num_configured_devices()
    if "NPROC" in os.environ or jax_compat.backends_are_initialized() or _num_threads() >= needed:
        return
    os.environ["NPROC"] = str(needed)


def warn_of_too_few_threads(num_devices: int) -> None:
    """Warn when XLA's pool is too small for `num_devices` devices of this process."""
    needed = THREADS_PER_DEVICE * num_devices
    if num_devices > 1 and _num_threads() < needed:
        warnings.warn(
            f"XLA's CPU client has {_num_threads()} threads for {num_devices} devices; with more "
            f"than 32 programs in flight it can deadlock below {needed}. Set NPROC={needed} in the "
            "environment, or import jax_deepep before JAX is first used, with the number of CPU "
            "devices already set.",
            stacklevel=4,
        )
