"""The CPU split into devices, for benchmarks that are started by hand."""

import os


def prepare_cpu(num_devices: int) -> None:
    """Split the CPU into devices, unless the environment says how.

    XLA reads these when its backend starts, that is, at the first look at a device. The devices wait
    for each other in collectives, so its thread pool must hold more threads than there are devices.
    """
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={num_devices}")
    os.environ.setdefault("NPROC", str(max(16, 2 * num_devices)))
