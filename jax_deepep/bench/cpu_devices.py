"""The CPU split into devices, for benchmarks that are started by hand."""

import os

from jax_deepep.cpu_threads import reserve_cpu_threads


def prepare_cpu(num_devices: int) -> None:
    """Split the CPU into devices, unless the environment says how.

    To be called before the first look at a device, when XLA's backend starts.
    """
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={num_devices}")
    reserve_cpu_threads()
