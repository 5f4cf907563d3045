"""The limits of the links between GPUs: rows pushed to peers, or pulled from them, and nothing else.

Slots are known in advance and the bench owns the memory: nothing is routed, counted, grouped or allocated.
Chains are captured in a CUDA graph, and the time of a step is the slope between two lengths. One process per
GPU is required; see `xla_ffi/bench/links.h`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jax_deepep.bench.baselines import cuda_module
from jax_deepep.bench.problem import Problem
from jax_deepep.bench.processes import exchange_with_all
from jax_deepep.bench.report import Result, Spread
from jax_deepep.bench.trials import slopes
from jax_deepep.communicator.topology import machine_identity

PART = "link"
TRIALS = 15
CHAIN = (8, 108)  # steps; a quarter of them above LONG_ROWS
LONG_ROWS = 1000
COPY_ROWS = 40_000
COPY_SMS = (4, 8, 16, 24, 64, 132)
ROUND_TRIPS = 2000


class Links:
    """The memory of this rank and its peers for such measurements. Collective, as are all methods.

    Args:
        mesh: one GPU per process, none of them shared: see `unsupported_reason`.
        hidden: of the widest rows, in bfloat16.
        rows: the most that a rank sends, bounded by what the kernels support.
    """

    def __init__(self, mesh: Mesh, hidden: int, rows: int) -> None:
        module = cuda_module.load()
        [device] = mesh.local_devices
        self._module = module
        self._rank = [d.process_index for d in mesh.devices.flat].index(device.process_index)
        self._num_sms = getattr(device, "core_count", 0) or COPY_SMS[-1]
        self._rows = min(rows, module.max_link_rows)
        row_bytes = hidden * 2
        self._copy_bytes = COPY_ROWS * row_bytes // module.piece_bytes * module.piece_bytes
        self._link = module.LinkRank(
            device.local_hardware_id, self._rank, mesh.size, self._rows, row_bytes, self._copy_bytes
        )
        own = {"rank": self._rank, "handle": self._link.handle.hex()}
        for facts in exchange_with_all("links", own).values():
            if facts["rank"] != self._rank:
                self._link.attach(facts["rank"], bytes.fromhex(facts["handle"]))
        self._known: dict[tuple[Any, int], Spread] = {}

    def per_step(self, step: str, rows: int) -> Spread:
        """Return seconds of one step of a chain (a name of `ChainStep`) on the slowest rank."""
        if (step, rows) not in self._known:
            lengths = [length // 4 if rows > LONG_ROWS else length for length in CHAIN]
            kind = getattr(self._module.ChainStep, step)
            trials = [self._slowest(self._link.chain(kind, rows, length, TRIALS)) for length in lengths]
            self._known[step, rows] = Spread.of(slopes(lengths, trials))
        return self._known[step, rows]

    def limits_of_op(self, rows: int) -> dict[str, Spread]:
        """Return seconds in which `rows` rows of each rank cross the links once; empty for too many rows."""
        if rows > self._rows:
            return {}
        return {"link: push": self.per_step("PUSH", rows), "link: pull": self.per_step("PULL", rows)}

    def limits_of_pair(self, rows: int) -> dict[str, Spread]:
        """Return the same for a round trip with a sum at the end."""
        if rows > self._rows:
            return {}
        return {
            "link: push, pull back": self.per_step("PUSH_PULL_BACK", rows),
            "link: push, push back": self.per_step("PUSH_PUSH_BACK", rows),
        }

    def results(self, problem: Problem) -> Iterator[Result]:
        """Measure links, independent of the ops."""

        def result(case: str, seconds: Any, bytes_moved: int = 0) -> Result:
            return Result(problem, PART, case, {"device": Spread.of(seconds)}, bytes_moved=bytes_moved)

        for with_row, case in ((False, "round trip of a flag"), (True, "round trip of a row and a flag")):
            yield result(case, self._slowest(self._link.round_trips(with_row, ROUND_TRIPS, TRIALS)))
        for step, case in (("NOTHING", "empty kernel, captured"), ("FLAG", "kernel with a flag, captured")):
            yield Result(problem, PART, case, {"device": self.per_step(step, 1)})
        ways = [("loads", False, COPY_SMS), ("bulk copies", True, COPY_SMS), ("copy engine", False, (0,))]
        for push in (False, True):
            for way, bulk, all_sms in ways:
                for num_sms in all_sms:
                    if num_sms > self._num_sms:
                        continue
                    trials = self._link.copy(push, bulk, num_sms, self._copy_bytes, TRIALS)
                    case = f"{'push' if push else 'pull'} by {way}" + (f", {num_sms} SMs" if num_sms else "")
                    yield result(case, self._slowest(trials), self._copy_bytes)

    def _slowest(self, seconds: list[float]) -> np.ndarray:
        everyones = exchange_with_all("seconds", {"seconds": seconds}).values()
        return np.max([of_rank["seconds"] for of_rank in everyones if of_rank["seconds"]], axis=0)


def unsupported_reason(mesh: Mesh) -> str:
    """Return why there are no links to measure, or an empty string: the same in all processes."""
    local = mesh.local_devices
    try:
        gpus = [cuda_module.load().gpu(device.local_hardware_id) for device in local]
        failure = (
            "" if len(gpus) == 1 else f"links: expected one GPU per process, got {len(gpus)}; launch more"
        )
    except (ImportError, RuntimeError) as error:
        gpus, failure = [], f"links: {error}"
    own = {"gpus": [f"{machine_identity()}/{gpu}" for gpu in gpus], "failure": failure}
    everyones = exchange_with_all("gpus", own).values()
    if text := next(filter(None, (facts["failure"] for facts in everyones)), ""):
        return text
    all_gpus = [gpu for facts in everyones for gpu in facts["gpus"]]
    if len(all_gpus) < 2:
        return "links: expected several ranks, got one; start more with the launcher"
    if len(set(all_gpus)) < len(all_gpus):
        return "links: expected a GPU for each rank, got one that ranks share; rows cross no link there"
    return ""
