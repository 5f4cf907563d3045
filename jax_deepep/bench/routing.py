"""python -m jax_deepep.bench routing: where rows go, with and without replicas of hot experts."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepep import gating
from jax_deepep.balancing import plan_experts, to_physical_experts
from jax_deepep.bench.command_line import add_sizes, positive_int
from jax_deepep.bench.problem import AXIS, Problem
from jax_deepep.bench.processes import start_jax
from jax_deepep.bench.report import Report, Result, add_outputs
from jax_deepep.bench.routing_plot import draw
from jax_deepep.ops.dispatch import dispatch


@dataclass(frozen=True)
class Routing:
    """Where the rows of one dispatch went.

    Attributes:
        name: of the expert map.
        rows_sent: [R, R], rows that device i sent to device j: one per (token, device).
        expert_load: [E], tokens that chose each expert.
        replicas: [E], physical experts that hold each expert.
        rows: [R], expert-major rows that each device received and kept.
        dropped: [R], those that did not fit into the capacity.
    """

    name: str
    rows_sent: np.ndarray
    expert_load: np.ndarray
    replicas: np.ndarray
    rows: np.ndarray
    dropped: np.ndarray

    @property
    def imbalance(self) -> float:
        """Rows of the fullest device over the mean, before dropping."""
        rows = self.rows + self.dropped
        return float(rows.max() / rows.mean())

    @property
    def share_dropped(self) -> float:
        """Dropped rows over all rows."""
        return float(self.dropped.sum() / (self.rows + self.dropped).sum())

    def result(self, problem: Problem, skew: float) -> Result:
        """Return the numbers, and the arrays as lists."""
        values = {
            "rows of a device: largest / mean": self.imbalance,
            "dropped %": 100 * self.share_dropped,
            "rows sent: largest / mean of a pair": float(self.rows_sent.max() / self.rows_sent.mean()),
        }
        arrays = {name: value.tolist() for name, value in vars(self).items() if name != "name"}
        return Result(problem, f"popularity 1 / n^{skew:g}", self.name, values={**values, **arrays})


def popular_logits(experts: int, tokens: int, skew: float, *, step: int, seed: int = 0) -> jax.Array:
    """Draw float32 [tokens, experts]; a token's K largest are its choice.

    The n-th most popular expert has a popularity of 1 / n^skew; the order depends on the seed alone. A
    token draws K different ones in turn, each with a probability proportional to its popularity.
    """
    popularity = np.random.default_rng(seed).permutation(np.arange(1, experts + 1.0) ** -skew)
    noise = np.random.default_rng((seed, step)).gumbel(size=(tokens, experts))
    return jnp.asarray(np.log(popularity) + noise, jnp.float32)


def draw_choices(
    problem: Problem, skew: float, mesh: Mesh, step: int, seed: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Draw (topk_idx int32 [R·T, K], topk_weights float32 [R·T, K]) of one step, sharded over the mesh."""
    logits = popular_logits(problem.experts, problem.devices * problem.tokens, skew, step=step, seed=seed)
    choice = gating.group_limited_topk(logits, num_experts_per_tok=problem.topk, score_function="softmax")
    return jax.device_put(choice, NamedSharding(mesh, P(AXIS)))


def measure(
    problem: Problem, mesh: Mesh, choices: tuple[jax.Array, jax.Array], name: str, expert_map: np.ndarray
) -> Routing:
    """Dispatch once; return where the rows went."""
    comm = dataclasses.replace(problem, experts=len(expert_map)).communicator(mesh, "native")

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P(AXIS), P(AXIS), P()), out_specs=P(AXIS))
    def send(topk_idx: jax.Array, topk_weights: jax.Array, expert_map: jax.Array) -> Any:
        load = gating.expert_load(topk_idx, problem.experts)
        token = jax.lax.axis_index(AXIS) * problem.tokens + jnp.arange(problem.tokens)
        slots = to_physical_experts(topk_idx, token, expert_map, num_experts=problem.experts)
        x = jnp.zeros((problem.tokens, problem.hidden), problem.dtype)
        sent, handle = dispatch(x, slots, topk_weights, comm=comm, capacity=problem.capacity_rows)
        return load[None], sent.num_rows.sum()[None], handle.num_dropped[None]

    with comm:
        load, rows, dropped = jax.device_get(send(*choices, expert_map))
        replicas = np.bincount(expert_map, minlength=problem.experts)
        return Routing(name, comm.stats().rows_sent[0], load.sum(axis=0), replicas, rows, dropped)


def run(problem: Problem, skew: float, replicas: Sequence[int], *, keep_home: bool = True) -> list[Routing]:
    """Measure without replicas and with `replicas` more physical experts per device, on the same tokens.

    Replicas are planned from the load of other tokens, as in practice.
    """
    mesh = jax.make_mesh((problem.devices,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    alone = np.arange(problem.experts, dtype=np.int32)
    before = measure(problem, mesh, draw_choices(problem, skew, mesh, step=0), "", alone)
    choices = draw_choices(problem, skew, mesh, step=1)
    routings = [measure(problem, mesh, choices, "every expert once", alone)]
    for count in replicas:
        expert_map = plan_experts(
            before.expert_load, num_physical=problem.experts + count * problem.devices,
            num_devices=problem.devices, keep_home=keep_home,
        )  # fmt: skip
        name = f"{count} more per device"
        routings.append(measure(problem, mesh, choices, name, expert_map))
    return routings


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    default = Problem(hidden=128, capacity="1.5x")
    parser = argparse.ArgumentParser(
        prog="python -m jax_deepep.bench routing",
        description="Plot where rows go: from device to device, to each expert, and how many are dropped.",
    )
    sizes = ("tokens", "hidden", "topk", "experts", "devices")
    add_sizes(parser, sizes, vars(default))
    parser.add_argument("--capacity", default=default.capacity,
                        help="rows per device: worst, 4096, 1.5x the mean (%(default)s)")  # fmt: skip
    parser.add_argument("--skew", type=float, default=1.0, help="s in the popularity 1 / n^s (%(default)s)")
    parser.add_argument("--replicas", "--copies", dest="replicas", type=positive_int, nargs="*", default=[1],
                        metavar="N", help="more physical experts per device, for replicas of hot ones: a run "
                        "for each number (%(default)s)")  # fmt: skip
    anywhere = "move experts from their home devices, too, not only the replicas"
    parser.add_argument("--anywhere", action="store_true", help=anywhere)
    add_outputs(parser)
    parser.set_defaults(plot=Path("routing.png"))
    options = parser.parse_args(arguments)
    try:
        options.problem = Problem(**{name: getattr(options, name) for name in (*sizes, "capacity")})
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str]) -> int:
    """Measure, print and draw; return the exit status."""
    options = parse(arguments)
    problem = options.problem
    start_jax(problem.devices)
    report = Report(options, "Rows of one dispatch, independent of the machine.")
    routings = run(problem, options.skew, options.replicas, keep_home=not options.anywhere)
    report.add(routing.result(problem, options.skew) for routing in routings)
    report.draw(partial(draw, routings, f"{problem.name}, popularity 1 / n^{options.skew:g}"))
    print(f"drawn: {options.plot}")
    return 0
