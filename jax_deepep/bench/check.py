"""`python -m jax_deepep.bench check`: whether devices reach each other natively, how fast, and why not."""

import argparse
import functools
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_deepep.bench.command_line import add_sizes, positive_int
from jax_deepep.bench.problem import AXIS, put_on_devices
from jax_deepep.bench.processes import end_jax, exchange_with_all, start_jax
from jax_deepep.bench.report import Spread, Table
from jax_deepep.bench.trials import interleaved, wall_clock
from jax_deepep.communicator import Communicator
from jax_deepep.communicator.topology import host_identity
from jax_deepep.ops.dispatch import dispatch

TRIALS = 5
TIMEOUT_S = 60.0
SAME, IN_HOST, BETWEEN = "itself", "a rank of its host", "a rank of another host"


@dataclass(frozen=True)
class Facts:
    """What a process knows of its host.

    Attributes:
        host: equal for processes that can share memory.
        name: of the host.
        devices: of the process, by kind, in the order of their ids.
        network: the RDMA devices of the host, and whether they can access the memory of GPUs.
    """

    host: str
    name: str
    devices: list[str]
    network: str

    @classmethod
    def here(cls) -> "Facts":
        """Look at this process."""
        devices = [device.device_kind for device in jax.local_devices()]
        return cls(host_identity(), socket.gethostname(), devices, _network())


def _network(root: Path = Path("/sys")) -> str:
    folder = root / "class/infiniband"
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not names:
        return "no RDMA devices"
    shown = ", ".join(names[:2]) + (", …" if len(names) > 2 else "")
    peer_memory = any((root / "module" / name).is_dir() for name in ("nvidia_peermem", "nv_peer_mem"))
    modules = "nvidia_peermem is loaded" if peer_memory else "nvidia_peermem is not loaded (DMA-BUF may do)"
    return f"{len(names)} RDMA devices ({shown}); {modules}"


def describe_hosts(everyones: Mapping[int, Facts]) -> list[str]:
    """Return a line for each kind of host."""
    of_host: dict[str, list[int]] = {}
    for process, facts in everyones.items():
        of_host.setdefault(facts.host, []).append(process)
    kinds: dict[str, list[str]] = {}
    for processes in of_host.values():
        devices = [device for process in processes for device in everyones[process].devices]
        first = everyones[processes[0]]
        text = f"{len(devices)} devices ({', '.join(sorted(set(devices)))}) of {len(processes)} process(es)"
        kinds.setdefault(f"{text}; {first.network}", []).append(first.name)
    return [
        f"{len(names)} with {kind}: {', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
        for kind, names in kinds.items()
    ]


def make_communicator(devices: np.ndarray, options: argparse.Namespace) -> tuple[Communicator | None, str]:
    """Make a native communicator whose groups are the rows of `devices`, with an expert on each device.

    Returns:
        It, and how rows reach peers; or None, and the error.
    """
    try:
        comm = Communicator(
            Mesh(devices, ("group", AXIS)),
            num_experts=devices.shape[1],
            num_experts_per_tok=1,
            max_tokens=options.tokens,
            hidden_size=options.hidden,
            implementation="native",
            timeout_s=TIMEOUT_S,
        )
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    described = dict(line.split(None, 1) for line in comm.describe().splitlines()[1:])
    return comm, f"native; {described['transport']}"


def of_hosts(hosts: Sequence[str]) -> np.ndarray | None:
    """Return the positions of devices by host, [hosts, devices]; None if hosts have different numbers."""
    positions = [[i for i, other in enumerate(hosts) if other == host] for host in dict.fromkeys(hosts)]
    return np.array(positions) if len({len(of_host) for of_host in positions}) == 1 else None


class Links:
    """Dispatches in which all tokens of a device go to one other device."""

    def __init__(self, comm: Communicator, hidden: int) -> None:
        self.comm = comm
        self.hidden = hidden
        mapped = jax.shard_map(
            lambda x, idx, weights: dispatch(x, idx, weights, comm=comm, layout="token")[0].tokens,
            mesh=comm.mesh, in_specs=P(comm.mesh.axis_names), out_specs=P(comm.mesh.axis_names),
            check_vma=False,
        )  # fmt: skip
        self._dispatch = jax.jit(mapped)

    def seconds(self, distances: Sequence[int], tokens: int) -> dict[int, np.ndarray]:
        """Return the seconds of the slowest rank in each trial, by how far away tokens go."""
        timers = {str(d): self._timer(d, tokens) for d in distances}
        return {int(name): trials for name, trials in interleaved(timers, TRIALS).items()}

    def _timer(self, distance: int, tokens: int) -> Callable[[], float]:
        size = self.comm.size

        def part(rows: slice) -> np.ndarray:
            rank = (rows.start or 0) // tokens
            return np.full((tokens, 1), (rank + distance) % size, np.int32)

        def ones(dtype: Any, width: int) -> Callable[[slice], np.ndarray]:
            return lambda rows: np.ones((tokens, width), dtype)

        put = functools.partial(put_on_devices, Mesh(self.comm.mesh.devices[0], (AXIS,)))
        operands = (
            put((size * tokens, self.hidden), ones(ml_dtypes.bfloat16, self.hidden)),
            put((size * tokens, 1), part),
            put((size * tokens, 1), ones(np.float32, 1)),
        )

        def run() -> float:
            seconds = wall_clock(lambda: self._dispatch(*operands))
            self.comm.check()
            if self.comm.platform != "cuda":
                return seconds
            return max(op.seconds for op in self.comm.last_ops())

        return run


def kinds_of(hosts: Sequence[str], distance: int) -> set[str]:
    """Return what rows cross when every rank sends to the one at a distance."""
    if distance == 0:
        return {SAME}
    others = [hosts[(rank + distance) % len(hosts)] for rank in range(len(hosts))]
    return {IN_HOST if host == other else BETWEEN for host, other in zip(hosts, others, strict=True)}


def measure(comm: Communicator, hosts: Sequence[str], tokens: int, hidden: int) -> Table:
    """Measure the links; a distance counts as the slowest kind of link that it has."""
    links = Links(comm, hidden)
    distances: dict[str, list[int]] = {}
    for distance in range(len(hosts)):
        kinds = kinds_of(hosts, distance)
        kind = BETWEEN if BETWEEN in kinds else kinds.pop()
        # A few suffice, of links that are alike; the first and the last are neighbours.
        distances.setdefault(kind, []).append(distance)
    chosen = {
        kind: found if len(found) <= 4 else [*found[:2], *found[-2:]] for kind, found in distances.items()
    }
    all_chosen = sorted({distance for found in chosen.values() for distance in found})
    many, one = links.seconds(all_chosen, tokens), links.seconds(all_chosen, 1)
    rows = []
    for kind, found in chosen.items():
        rates = Spread.of(np.concatenate([tokens * hidden * 2 / many[d] / 1e9 for d in found]))
        times = Spread.of(np.concatenate([one[d] * 1e6 for d in found]))
        rows.append([kind, ", ".join(map(str, found)), rates.text(1.0), times.text(1.0)])
    title = f"every rank sends {tokens} rows of {2 * hidden} bytes to one other, or one row; {TRIALS} trials"
    columns = ["to", "ranks apart", "GB/s", "us of one row"]
    return Table(title, columns, rows, text_columns=("to", "ranks apart"))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_deepep.bench check",
        description="Tell whether the devices of a job reach each other natively, and how fast, or why they "
        "do not and what to do; then the status is 1. Run it under the launcher of the job.",
    )
    add_sizes(parser, ("tokens", "hidden"), {"tokens": 1024, "hidden": 7168})
    parser.add_argument(
        "--devices", type=positive_int, default=2, help="of a CPU, without a launcher (%(default)s)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Check and print; return the exit status."""
    options = parse(arguments)
    start_jax(options.devices)
    everyones = {p: Facts(**f) for p, f in exchange_with_all("facts", vars(Facts.here())).items()}
    devices = np.array(jax.devices())
    hosts = [everyones[device.process_index].host for device in devices]
    for text in describe_hosts(everyones):
        _say("hosts", text)
    comm, text = make_communicator(devices[np.newaxis], options)
    _say("all devices", text)
    by_host = of_hosts(hosts)
    if comm is None and by_host is not None and len(by_host) > 1:
        inside, text = make_communicator(devices[by_host], options)
        _say("in a host", text)
        if inside is not None:
            inside.close()
    table = measure(comm, hosts, options.tokens, options.hidden) if comm is not None else None
    if table is not None and jax.process_index() == 0:
        print(f"\n{table.markdown()}", flush=True)
    if comm is not None:
        comm.close()
    end_jax()
    return 0 if comm is not None else 1


def _say(name: str, text: str) -> None:
    """Print a line at once: what comes next may take until its deadline."""
    if jax.process_index() == 0:
        print(f"{name:<12} {text}", flush=True)
