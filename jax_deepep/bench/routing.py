"""Where rows go: python -m jax_deepep.bench routing. With and without copies of hot experts."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepep import gating
from jax_deepep.balancing import plan_experts, to_slots
from jax_deepep.bench.cpu_devices import prepare_cpu
from jax_deepep.bench.numbers import positive_int
from jax_deepep.bench.problems import AXIS, Problem
from jax_deepep.bench.routing_plot import draw
from jax_deepep.bench.surroundings import surroundings
from jax_deepep.bench.tables import Table, markdown, print_tables
from jax_deepep.ops.dispatch import dispatch


@dataclass(frozen=True)
class Routing:
    """Where the rows of one dispatch went.

    Attributes:
        name: of the placement of experts.
        rows_sent: [R, R], rows that device i sent to device j: one per (token, device).
        expert_load: [E], tokens that chose each expert.
        copies: [E], slots that hold each expert.
        rows: [R], expert-major rows that each device received and kept.
        dropped: [R], those that did not fit into the capacity.
    """

    name: str
    rows_sent: np.ndarray
    expert_load: np.ndarray
    copies: np.ndarray
    rows: np.ndarray
    dropped: np.ndarray

    @property
    def imbalance(self) -> float:
        """Rows of the device with most over the mean, before dropping."""
        rows = self.rows + self.dropped
        return float(rows.max() / rows.mean())

    @property
    def share_dropped(self) -> float:
        """Dropped rows over all."""
        return float(self.dropped.sum() / (self.rows + self.dropped).sum())


def draw_choices(
    problem: Problem, skew: float, mesh: Mesh, step: int, seed: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Draw (topk_idx int32 [R·T, K], topk_weights float32 [R·T, K]) of one step, split over the mesh.

    The n-th most popular expert has a popularity of 1 / n^skew; which one it is depends on the seed alone. A
    token draws K different ones, one after the other, each with a chance that is proportional to this.
    """
    popularity = np.random.default_rng(seed).permutation(np.arange(1, problem.experts + 1.0) ** -skew)
    noise = np.random.default_rng((seed, step)).gumbel(
        size=(problem.devices * problem.tokens, problem.experts)
    )
    logits = (np.log(popularity) + noise).astype(np.float32)
    choice = gating.group_limited_topk(logits, num_experts_per_tok=problem.topk, score_function="softmax")
    return jax.device_put(choice, NamedSharding(mesh, P(AXIS)))


def measure(
    problem: Problem, mesh: Mesh, choices: tuple[jax.Array, jax.Array], name: str, placement: np.ndarray
) -> Routing:
    """Dispatch once; return where the rows went."""
    comm = dataclasses.replace(problem, experts=len(placement)).communicator(mesh, "native")

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P(AXIS), P(AXIS), P()), out_specs=P(AXIS))
    def send(topk_idx: jax.Array, topk_weights: jax.Array, placement: jax.Array) -> Any:
        load = gating.expert_load(topk_idx, problem.experts)
        token = jax.lax.axis_index(AXIS) * problem.tokens + jnp.arange(problem.tokens)
        slots = to_slots(topk_idx, token, placement, num_experts=problem.experts)
        x = jnp.zeros((problem.tokens, problem.hidden), problem.dtype)
        sent, handle = dispatch(x, slots, topk_weights, comm=comm, capacity=problem.capacity_rows)
        return load[None], sent.num_rows.sum()[None], handle.num_dropped[None]

    with comm:
        load, rows, dropped = jax.device_get(send(*choices, placement))
        copies = np.bincount(placement, minlength=problem.experts)
        return Routing(name, comm.stats().rows_sent[0], load.sum(axis=0), copies, rows, dropped)


def run(problem: Problem, skew: float, slots: Sequence[int], *, own_first: bool = True) -> list[Routing]:
    """Measure without copies and with so many further slots on each device, on the same tokens.

    The copies were planned from the load of other tokens, as they are in use.
    """
    mesh = jax.make_mesh((problem.devices,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    alone = np.arange(problem.experts, dtype=np.int32)
    before = measure(problem, mesh, draw_choices(problem, skew, mesh, step=0), "", alone)
    choices = draw_choices(problem, skew, mesh, step=1)
    routings = [measure(problem, mesh, choices, "every expert once", alone)]
    for count in slots:
        placement = plan_experts(
            before.expert_load, num_physical=problem.experts + count * problem.devices,
            num_devices=problem.devices, own_first=own_first,
        )  # fmt: skip
        name = f"{count} slot{'s' * (count > 1)} for copies per device"
        routings.append(measure(problem, mesh, choices, name, placement))
    return routings


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    default = Problem(hidden=128, capacity="1.5x")
    parser = argparse.ArgumentParser(
        prog="python -m jax_deepep.bench routing",
        description="Draw where rows go: from device to device, to each expert, and how many are dropped.",
    )
    sizes = {
        "tokens": "T, tokens per device",
        "hidden": "H, elements of a row",
        "topk": "K, experts per token",
        "experts": "E, experts over all devices",
        "devices": "R, devices of the group",
        "capacity": 'rows a device can receive: "worst", "4096", or "1.5x" the mean',
    }
    for name, what in sizes.items():
        value = getattr(default, name)
        parser.add_argument(
            f"--{name}",
            type=positive_int if isinstance(value, int) else str,
            default=value,
            help=f"{what} (%(default)s)",
        )
    parser.add_argument("--skew", type=float, default=1.0, help="s of a popularity of 1 / n^s (%(default)s)")
    copies = "slots for copies of hot experts on each device, a run for each number (%(default)s)"
    parser.add_argument("--copies", type=positive_int, nargs="*", default=[1], metavar="N", help=copies)
    anywhere = "place all experts anew, and not the copies alone"
    parser.add_argument("--anywhere", action="store_true", help=anywhere)
    plot = Path("routing.png")
    parser.add_argument("--plot", type=Path, default=plot, metavar="PATH", help="the picture (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all numbers there")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the table there")
    options = parser.parse_args(arguments)
    try:
        options.problem = Problem(**{name: getattr(options, name) for name in sizes})
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str]) -> int:
    """Measure, print and draw; return the exit status."""
    options = parse(arguments)
    problem = options.problem
    prepare_cpu(problem.devices)
    routings = run(problem, options.skew, options.copies, own_first=not options.anywhere)
    title = f"{problem.name}, popularity 1 / n^{options.skew:g}"
    columns = (
        "experts",
        "rows of a device: largest / mean",
        "dropped",
        "rows sent: largest / mean of a pair",
    )
    table = Table(title, columns, [
        [r.name, f"{r.imbalance:.2f}", f"{r.share_dropped:.1%}",
         f"{r.rows_sent.max() / r.rows_sent.mean():.2f}"] for r in routings
    ])  # fmt: skip
    print_tables([table])
    if options.markdown:
        options.markdown.write_text(markdown([table]))
    if options.json:
        runs = [dataclasses.asdict(routing) for routing in routings]
        document = {**surroundings(), "problem": problem.as_dict(), "skew": options.skew, "runs": runs}
        options.json.write_text(json.dumps(document, indent=2, default=np.ndarray.tolist) + "\n")
    draw(routings, title, options.plot)
    print(f"drawn: {options.plot}")
    return 0
