"""Eight devices out of one CPU, unless something else was asked for. To be imported before JAX."""

import os

# Whether a launcher started several processes of this script.
LAUNCHED = "JAX_COORDINATOR_ADDRESS" in os.environ or any(
    int(os.environ.get(name, "1")) > 1 for name in ("OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS")
)
# Eight devices of one CPU wait for each other in collectives, so XLA's thread pool (NPROC) must hold
# more threads than that, however few cores there are.
if not LAUNCHED and "JAX_NUM_CPU_DEVICES" not in os.environ:
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("NPROC", "16")
