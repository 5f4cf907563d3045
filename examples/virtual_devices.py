"""Splits one CPU into eight devices, unless other devices were chosen. Import it before JAX."""

import os

# A shell of salloc has SLURM_NTASKS too, but is not a task of a job step.
IS_SLURM_TASK = {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= os.environ.keys()
NUM_TASKS = os.environ.get("SLURM_NTASKS" if IS_SLURM_TASK else "OMPI_COMM_WORLD_SIZE", "1")
# Whether a launcher started several processes of this script.
LAUNCHED = "JAX_COORDINATOR_ADDRESS" in os.environ or int(NUM_TASKS) > 1
if not LAUNCHED and "JAX_NUM_CPU_DEVICES" not in os.environ:
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
