"""Which launcher this is, of how many, and where the first one is: pure functions of variables and arguments.

A cluster's own starter (srun, mpirun, a Kubernetes Job) starts launchers, usually one per host; each
launcher then starts its ranks. The order of precedence follows JAX: Open MPI before SLURM, because mpirun
inside an allocation leaves SLURM variables that describe its own daemons, not the ranks.
"""

import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from jax_deepep.launch.hosts.kubernetes_job import KubernetesJob, read_job

LOOPBACK = "127.0.0.1"
_MOST_HOSTS = 65536


class PositionError(ValueError):
    """The arguments and variables do not determine this launcher's position in the job."""


@dataclass(frozen=True)
class LauncherPosition:
    """One launcher among those of a job."""

    index: int  # this launcher, from 0; launcher 0 starts rank 0
    count: int
    coordinator: str  # host name or address of launcher 0
    port: int | None = None  # where launcher 0 listens; None: derived from the job
    local_index: int = 0  # this launcher among those on the same host
    job: str = ""  # distinguishes this job from others on the same hosts
    found_in: str = "the command line"


def position_from_arguments(
    hosts: str | None, coordinator: str | None, node_rank: int | None, environ: Mapping[str, str] = os.environ
) -> LauncherPosition:
    """Return the position that `--hosts`, `--coordinator` and `--node-rank` describe.

    Args:
        hosts: "host0,host1,…", or their number.
        coordinator: "host" or "host:port"; by default the first of `hosts`.
        node_rank: index of this host; by default that of the host whose name or address is this machine's,
            or the pod's index in Kubernetes.
        environ: variables, for `JOB_COMPLETION_INDEX`.
    """
    address, port = split_address(coordinator) if coordinator is not None else (None, None)
    names: list[str] = []
    if hosts is None:
        count = 1
    elif hosts.isdecimal():
        count = int(hosts)
    else:
        names = [name.strip() for name in hosts.split(",")]
        count = len(names)
    if not 1 <= count <= _MOST_HOSTS or "" in names:
        raise PositionError(
            f"--hosts: expected 'host0,host1,…' or a number of hosts from 1 to {_MOST_HOSTS}, got {hosts!r}"
        )
    if address is None:
        if count > 1 and not names:
            raise PositionError(
                f"--hosts: expected host names, got the number {count}, which does not say where rank 0 is; "
                "add --coordinator HOST[:PORT], or list the hosts by name"
            )
        address = names[0] if names else LOOPBACK
    if node_rank is None:
        node_rank = 0 if count == 1 else _own_index(names, environ)
    if not 0 <= node_rank < count:
        raise PositionError(
            f"--node-rank: expected 0..{count - 1}, one for each of the {count} hosts, got {node_rank}"
        )
    return LauncherPosition(node_rank, count, address, port, job=f"{hosts} {coordinator}")


def split_address(address: str) -> tuple[str, int | None]:
    """Split "host", "host:port", "[v6]" or "[v6]:port"."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.%\w]+\]|[^:\[\]\s]+)(?::(\d{1,5}))?", address)
    if match is None or not 0 < int(match[2] or 1) < 65536:
        raise PositionError(
            f"--coordinator: expected HOST or HOST:PORT, for example 10.0.0.1:6000, got {address!r}"
        )
    return match[1].strip("[]"), int(match[2]) if match[2] else None


def position_from_cluster(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    kubernetes: Callable[[Mapping[str, str]], KubernetesJob] = read_job,
) -> LauncherPosition | None:
    """Return the position that a cluster's variables describe, or None outside of clusters.

    Args:
        environ: the launcher's variables.
        coordinator: "host" or "host:port", where the variables lack it or have a wrong one.
        kubernetes: reads the Job of this pod; replaced in tests.
    """
    position = next((found for find in (_open_mpi, _slurm, _pmi) if (found := find(environ))), None)
    if position is None and "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        job, index = kubernetes(environ), _integer(environ, "JOB_COMPLETION_INDEX")
        position = LauncherPosition(
            index, job.parallelism, job.coordinator, job=job.name, found_in="Kubernetes"
        )
    if position is not None and coordinator is not None:
        address, port = split_address(coordinator)
        return replace(position, coordinator=address, port=port)
    if position is not None and position.coordinator == "":
        raise PositionError(
            f"--coordinator: the variables of {position.found_in} do not say where the first process runs; "
            "add --coordinator HOST[:PORT] (which launcher this is, and of how many, is known)"
        )
    return position


def _own_index(names: Sequence[str], environ: Mapping[str, str]) -> int:
    mine = [index for index, name in enumerate(names) if _is_this_machine(name)]
    if len(mine) == 1:
        return mine[0]
    if not mine and "JOB_COMPLETION_INDEX" in environ:
        return _integer(environ, "JOB_COMPLETION_INDEX")
    found = "none of --hosts is" if not mine else f"{', '.join(names[i] for i in mine)} are all"
    raise PositionError(
        f"--node-rank: {found} this machine, so it must be given: 0 on the first host, 1 on the next, …"
    )


def _is_this_machine(name: str) -> bool:
    own = socket.gethostname()
    if name in (own, own.split(".")[0]):
        return True
    try:
        family, _, _, _, address = socket.getaddrinfo(name, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind(address)  # only an address of this machine can be bound
    except OSError:
        return False
    return True


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise PositionError(
            f"{name}: expected an integer, as the cluster sets it, got {text!r}; unset it, or pass --hosts"
        ) from None


def _open_mpi(environ: Mapping[str, str]) -> LauncherPosition | None:
    if "OMPI_COMM_WORLD_RANK" not in environ or "OMPI_COMM_WORLD_SIZE" not in environ:
        return None
    count = _integer(environ, "OMPI_COMM_WORLD_SIZE")
    address = LOOPBACK
    if _integer(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", 0) != count:
        # "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", the machine that mpirun runs on
        uri = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", environ.get("OMPI_MCA_orte_hnp_uri", ""))
        address = (uri[1] or uri[2]) if uri is not None else ""  # Open MPI 5 has no such variable
    return LauncherPosition(
        _integer(environ, "OMPI_COMM_WORLD_RANK"), count, address,
        local_index=_integer(environ, "OMPI_COMM_WORLD_LOCAL_RANK", 0),
        job=environ.get("OMPI_MCA_orte_hnp_uri", environ.get("PMIX_NAMESPACE", "")), found_in="Open MPI",
    )  # fmt: skip


def _slurm(environ: Mapping[str, str]) -> LauncherPosition | None:
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if any(name not in environ for name in names):
        return None  # also in a shell of salloc, which has no step
    count = _integer(environ, "SLURM_NTASKS")
    if _integer(environ, "PMI_SIZE", count) != count:
        return None  # srun started the daemons of another starter, which started this process
    return LauncherPosition(
        _integer(environ, "SLURM_PROCID"), count,
        first_slurm_host(environ["SLURM_STEP_NODELIST"]) if count > 1 else LOOPBACK,
        local_index=_integer(environ, "SLURM_LOCALID"),
        job=f"{environ['SLURM_JOB_ID']}.{environ.get('SLURM_STEP_ID', '')}", found_in="SLURM",
    )  # fmt: skip


def first_slurm_host(node_list: str) -> str:
    """Return the first name of "node001", "node001,other", "node[001-015],other" or "a[1,3]b-x"."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\]([^,\[]*))?", node_list)
    if match is None:
        raise PositionError(
            f"SLURM_STEP_NODELIST: expected a host list such as node[001-004], got {node_list!r}"
        )
    return "".join(part or "" for part in match.groups())


def _pmi(environ: Mapping[str, str]) -> LauncherPosition | None:
    if "PMI_RANK" not in environ or "PMI_SIZE" not in environ:
        return None
    count = _integer(environ, "PMI_SIZE")
    all_here = count == 1 or _integer(environ, "MPI_LOCALNRANKS", 0) == count
    return LauncherPosition(
        _integer(environ, "PMI_RANK"), count, LOOPBACK if all_here else "",
        local_index=_integer(environ, "MPI_LOCALRANKID", 0),
        job=environ.get("PMI_JOBID", ""), found_in="PMI",
    )  # fmt: skip
