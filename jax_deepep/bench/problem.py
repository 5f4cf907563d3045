"""The shape of a measurement, and inputs drawn from a seed."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepep.capacity import Layout, round_up, worst_case_rows
from jax_deepep.checks import checked_integer
from jax_deepep.communicator import Communicator, Implementation

AXIS = "expert"
DTYPES = ("bfloat16", "float16", "float32")
WORST, FITTING = "worst", "fitting"


@dataclass(frozen=True)
class Problem:
    """One shape, per device of a group.

    Attributes:
        tokens: T, tokens per device.
        hidden: H, elements of a row.
        topk: K, experts per token.
        experts: E, over all devices.
        devices: R.
        dtype: of the rows.
        layout: "expert" or "token".
        capacity: rows that a device can receive: "worst" for the default of the ops; a number of rows; a
            number followed by x, in units of the mean number of rows ("1.25x"); or "fitting", the smallest
            multiple of 128 (of 8 below 1024 rows) that drops none of the drawn rows.
        intermediate: F, the inner size of an expert; None where no expert runs.
    """

    tokens: int = 1024
    hidden: int = 2048
    topk: int = 8
    experts: int = 64
    devices: int = 8
    dtype: str = "bfloat16"
    layout: Layout = "expert"
    capacity: str = WORST
    intermediate: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "hidden", "topk", "experts", "devices"):
            checked_integer(name, getattr(self, name), minimum=1)
        if self.experts % self.devices:
            raise ValueError(
                f"experts: expected a multiple of devices={self.devices}, got {self.experts}; choose others."
            )
        if self.topk > self.experts:
            raise ValueError(
                f"topk: expected at most experts={self.experts}, got {self.topk}; choose others."
            )
        try:
            valid = self.capacity in (WORST, FITTING) or self.capacity_rows > 0
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(
                f'capacity: expected "{WORST}", "{FITTING}", rows ("4096") or a multiple of the mean number '
                f'of rows ("1.25x"), got {self.capacity!r}; give one of these.'
            )

    @property
    def name(self) -> str:
        """The shape in one line."""
        inner = "" if self.intermediate is None else f"F={self.intermediate} "
        layout = f"{self.layout}-major " if self.intermediate is None else ""
        return (
            f"T={self.tokens} H={self.hidden} {inner}K={self.topk} E={self.experts} R={self.devices} "
            f"{self.dtype} {layout}C={self.capacity}"
        )

    @property
    def num_local_experts(self) -> int:
        """L, experts of one device."""
        return self.experts // self.devices

    @property
    def mean_rows(self) -> float:
        """Rows that a device receives on average under uniform routing."""
        if self.layout == "expert":
            return float(self.tokens * self.topk)
        # A token misses a device if all its K experts are elsewhere.
        elsewhere = self.experts - self.num_local_experts
        misses = math.comb(elsewhere, self.topk) / math.comb(self.experts, self.topk)
        return self.devices * self.tokens * (1 - misses)

    @property
    def capacity_rows(self) -> int:
        """C; a ValueError for "fitting" before the inputs are drawn."""
        if self.capacity != WORST and not self.capacity.endswith("x"):
            return int(self.capacity)
        worst = worst_case_rows(
            layout=self.layout,
            num_ranks=self.devices,
            num_tokens=self.tokens,
            num_experts_per_tok=self.topk,
            num_local_experts=self.num_local_experts,
            alignment=1,
        )
        if self.capacity == WORST:
            return worst
        return min(worst, math.ceil(float(self.capacity[:-1]) * self.mean_rows))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.hidden * jnp.dtype(self.dtype).itemsize

    def communicator(self, mesh: Mesh, implementation: Implementation, **options: Any) -> Communicator:
        """Make a communicator of these sizes, for the caller to close."""
        sizes = {
            "num_experts": self.experts,
            "num_experts_per_tok": self.topk,
            "max_tokens": self.tokens,
            "hidden_size": self.hidden,
        }
        return Communicator(mesh, AXIS, implementation=implementation, **{**sizes, **options})

    def draw_routing(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw (topk_idx int32 [R·T, K], topk_weights float32 [R·T, K]).

        A token chooses K different experts, all equally often, with positive weights of sum 1.
        """
        total = self.devices * self.tokens
        scores = random.random((total, self.experts), np.float32)
        topk_idx = np.argpartition(scores, self.topk - 1, axis=1)[:, : self.topk].astype(np.int32)
        topk_weights = random.random((total, self.topk), np.float32) + np.float32(0.1)
        return topk_idx, topk_weights / topk_weights.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class Inputs:
    """Operands of a dispatch on all devices, sharded along their first axis.

    Attributes:
        problem: the shape, with a capacity in rows where it was "fitting".
        x: [R·T, H].
        topk_idx, topk_weights: as `Problem.draw_routing` returns them.
        rows: received by all devices together, after dropping.
        remote_tokens: (token, other device) pairs of a device, on average.
    """

    problem: Problem
    x: jax.Array
    topk_idx: jax.Array
    topk_weights: jax.Array
    rows: int
    remote_tokens: int

    @property
    def bytes_moved(self) -> int:
        """Bytes of all received rows."""
        return self.rows * self.problem.row_bytes


def draw_inputs(problem: Problem, mesh: Mesh, seed: int = 0) -> Inputs:
    """Draw the inputs of `problem`: in every process, the routing of all devices and its own part of x."""
    topk_idx, topk_weights = problem.draw_routing(np.random.default_rng(seed))
    received = rows_of_devices(topk_idx, problem)
    if problem.capacity == FITTING:
        problem = dataclasses.replace(problem, capacity=str(fitting_capacity(int(received.max()))))
    targets = devices_of_tokens(topk_idx, problem)
    remote = targets.sum() - targets[np.arange(len(targets)), np.arange(len(targets)) // problem.tokens].sum()

    def part_of_x(part: slice) -> np.ndarray:
        own = np.random.default_rng((seed, part.start or 0))
        return own.standard_normal((problem.tokens, problem.hidden), np.float32).astype(
            jnp.dtype(problem.dtype)
        )

    return Inputs(
        problem,
        put_on_devices(mesh, (len(topk_idx), problem.hidden), part_of_x),
        put_on_devices(mesh, topk_idx.shape, lambda part: topk_idx[part]),
        put_on_devices(mesh, topk_weights.shape, lambda part: topk_weights[part]),
        int(np.minimum(received, problem.capacity_rows).sum()),
        round(remote / problem.devices),
    )


def devices_of_tokens(topk_idx: np.ndarray, problem: Problem) -> np.ndarray:
    """Return bool [R·T, R]: whether a token has an expert on a device."""
    there = np.zeros((len(topk_idx), problem.devices), bool)
    np.put_along_axis(there, topk_idx // problem.num_local_experts, True, axis=1)
    return there


def rows_of_devices(topk_idx: np.ndarray, problem: Problem) -> np.ndarray:
    """Return how many rows each device receives, before dropping."""
    if problem.layout == "token":
        return devices_of_tokens(topk_idx, problem).sum(axis=0)
    return np.bincount((topk_idx // problem.num_local_experts).ravel(), minlength=problem.devices)


def fitting_capacity(most_rows: int) -> int:
    """Return the smallest multiple of 128 that holds the rows; of 8 below 1024 rows."""
    return round_up(most_rows, 128 if most_rows >= 1024 else 8)


def per_device(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of one device's values; arrays are sharded along their first axis."""
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False)
    return jax.jit(mapped)


def put_on_devices(mesh: Mesh, shape: tuple[int, ...], part: Callable[[slice], np.ndarray]) -> jax.Array:
    """Make an array sharded along the first axis: `part` returns the values of a range of it."""

    def own_part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # the array is sharded
        return part(index[0])

    return jax.make_array_from_callback(shape, NamedSharding(mesh, P(AXIS)), own_part)
