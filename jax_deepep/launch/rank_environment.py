"""The variables that make a process rank r of R.

How a bare `jax.distributed.initialize()` finds its rank. JAX reads the coordinator's address, the
address to bind and the local devices from its own variables (`JAX_COORDINATOR_ADDRESS`,
`JAX_COORDINATOR_BIND_ADDRESS`, `JAX_LOCAL_DEVICE_IDS`), but has none for the number of processes and
the process id: these come only from its cluster detection. Of the clusters that it detects, SLURM
needs only five variables, is the same in every JAX from 0.10 to 0.11 and requires no network and no
further package; Open MPI changed with version 5 and now requires mpi4py. So a rank is presented to
JAX as a SLURM task, and the variables of Open MPI, which JAX would prefer, are removed. A `ClusterEnv`
subclass would be cleaner, but every interpreter would have to import it first, also behind a shell
script, which is not possible from outside without `sitecustomize`. Variables are always inherited.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jax_deepep.cpu_threads import set_num_threads
from jax_deepep.launch_variables import PREFIX

PYTEST_PLUGIN = "jax_deepep.launch.inside_rank.pytest_plugin"
_SLURM_TASK = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_JAX_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS", "JAX_LOCAL_DEVICE_IDS")
_DEVICE_COUNT_FLAG = re.compile(r"--xla_force_host_platform_device_count=\S+")


@dataclass(frozen=True)
class JobPosition:
    """The ranks of this host among all ranks of the job."""

    first_rank: int
    num_local: int
    num_ranks: int
    coordinator: str  # host:port that every rank connects to
    coordinator_bind: str  # host:port that rank 0 listens on
    first_local_index: int = 0  # after the ranks of other launchers on this host, and their devices

    @property
    def ranks(self) -> range:
        """The ranks that this launcher starts."""
        return range(self.first_rank, self.first_rank + self.num_local)


@dataclass(frozen=True)
class RankSettings:
    """What the command line says about the devices of each rank."""

    platform: str | None = None  # "cpu", "cuda"; None: JAX's own choice
    devices_per_process: int | None = None
    share_gpu: bool = False
    memory_fraction: float = 0.65  # with share_gpu: of the GPU, for the pools of all ranks together


def without_launch(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables without those of an outer launcher.

    A rank (a test, for example) may itself run a launcher: the inner job must not detect the outer one as a
    SLURM cluster, nor join its coordinator.
    """
    clean = dict(environ)
    if PREFIX + "RANK" in clean:
        ours = [name for name in clean if name.startswith(PREFIX) and name != PREFIX + "TEST_TIMEOUT"]
        for name in [*_SLURM_TASK, *_JAX_VARIABLES, *ours]:
            clean.pop(name, None)
        plugins = [
            name for name in clean.pop("PYTEST_PLUGINS", "").split(",") if name not in ("", PYTEST_PLUGIN)
        ]
        if plugins:
            clean["PYTEST_PLUGINS"] = ",".join(plugins)
    return clean


def rank_environ(
    base: Mapping[str, str], position: JobPosition, local_rank: int, settings: RankSettings, log_dir: Path
) -> dict[str, str]:
    """Return the environment of one rank.

    Args:
        base: the launcher's own environment, already without an outer launch.
        position: of this host's ranks in the job.
        local_rank: index among them.
        settings: devices, as given on the command line.
        log_dir: absolute; where the rank's files go.
    """
    rank = position.first_rank + local_rank
    index = position.first_local_index + local_rank
    env = {name: value for name, value in base.items() if not _misleads_jax(name)}
    env.update(
        {
            "SLURM_JOB_ID": base.get("SLURM_JOB_ID", "0"),
            "SLURM_STEP_NODELIST": base.get("SLURM_STEP_NODELIST", position.coordinator.rsplit(":", 1)[0]),
            "SLURM_NTASKS": str(position.num_ranks),
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(index),
            "JAX_COORDINATOR_ADDRESS": position.coordinator,
            "JAX_COORDINATOR_BIND_ADDRESS": position.coordinator_bind,
            "JAX_LOCAL_DEVICE_IDS": _local_device_ids(index, settings),
            PREFIX + "RANK": str(rank),
            PREFIX + "NUM_RANKS": str(position.num_ranks),
            PREFIX + "LOCAL_RANK": str(local_rank),
            PREFIX + "LOG_DIR": str(log_dir),
        }
    )
    # Output goes through a pipe, which Python would buffer by blocks: a rank that dies would lose its last
    # lines. A segfault or an abort should print where in the program it happened.
    env.setdefault("PYTHONUNBUFFERED", "1")
    env.setdefault("PYTHONFAULTHANDLER", "1")
    # gRPC would take the coordinator through a proxy.
    direct = env.get("no_grpc_proxy") or env.get("no_proxy")
    host = position.coordinator.rsplit(":", 1)[0].strip("[]")
    env["no_grpc_proxy"] = ",".join(filter(None, [direct, host]))
    if settings.platform is not None:
        # JAX runs callbacks on a CPU device, also those of programs on GPUs.
        env["JAX_PLATFORMS"] = settings.platform if settings.platform == "cpu" else f"{settings.platform},cpu"
    _set_cpu_devices(env, settings)
    if settings.share_gpu:
        # Preallocation stays at JAX's default (on): only a preallocated pool can be mapped by peers.
        env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{settings.memory_fraction / position.num_local:.4f}"
        env["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"  # NCCL >= 2.30; older ones reject ranks that share a GPU
    plugins = [name for name in env.get("PYTEST_PLUGINS", "").split(",") if name not in ("", PYTEST_PLUGIN)]
    env["PYTEST_PLUGINS"] = ",".join([*plugins, PYTEST_PLUGIN])
    _keep_package_importable(env)
    return env


def _misleads_jax(name: str) -> bool:
    return name.startswith("OMPI_COMM_WORLD_") or name in ("OMPI_MCA_orte_hnp_uri", *_JAX_VARIABLES)


def _local_device_ids(index: int, settings: RankSettings) -> str:
    if settings.share_gpu:
        return "0"
    count = settings.devices_per_process or 1
    return ",".join(str(device) for device in range(index * count, (index + 1) * count))


def _set_cpu_devices(env: dict[str, str], settings: RankSettings) -> None:
    count = settings.devices_per_process
    if count is None and settings.platform == "cpu":
        count = 1
    if count is not None:
        flags = _DEVICE_COUNT_FLAG.sub("", env.get("XLA_FLAGS", "")).split()
        env["XLA_FLAGS"] = " ".join([*flags, f"--xla_force_host_platform_device_count={count}"])
    if settings.platform != "cuda":
        set_num_threads(env, count or 1)


def _keep_package_importable(env: dict[str, str]) -> None:
    """Let the ranks import this very package, also from a checkout that is not installed.

    `python -m` puts the current folder on the path, the `pytest` command does not. An installed
    package needs nothing, and its site-packages must not leak into another interpreter.
    """
    root = Path(__file__).resolve().parents[2]
    if root.name not in ("site-packages", "dist-packages"):
        env["PYTHONPATH"] = os.pathsep.join(part for part in (env.get("PYTHONPATH"), str(root)) if part)
