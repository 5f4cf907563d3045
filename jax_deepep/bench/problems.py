"""What is measured: shapes, and inputs drawn from a seed."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepep.capacity import Layout, worst_case_rows
from jax_deepep.checks import checked_integer
from jax_deepep.communicator import Communicator, Implementation

AXIS = "expert"
DTYPES = ("bfloat16", "float16", "float32")


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
        capacity: rows that a device can receive: "worst" for the default of the ops, a number of
            rows, or a number followed by x, in units of the mean number of rows ("1.25x").
    """

    tokens: int = 1024
    hidden: int = 2048
    topk: int = 8
    experts: int = 64
    devices: int = 8
    dtype: str = "bfloat16"
    layout: Layout = "expert"
    capacity: str = "worst"

    def __post_init__(self) -> None:
        for name in ("tokens", "hidden", "topk", "experts", "devices"):
            checked_integer(name, getattr(self, name), minimum=1)
        if self.experts % self.devices:
            raise ValueError(f"experts: got {self.experts}; takes a multiple of devices={self.devices}.")
        if self.topk > self.experts:
            raise ValueError(f"topk: got {self.topk}; takes at most experts={self.experts}.")
        try:
            takes_capacity = self.capacity_rows is None or self.capacity_rows > 0
        except ValueError:
            takes_capacity = False
        if not takes_capacity:
            raise ValueError(
                f'capacity: got {self.capacity!r}; takes "worst", rows ("4096"), or a multiple of the mean '
                'number of rows ("1.25x").'
            )

    @property
    def name(self) -> str:
        """The shape in one line."""
        return (
            f"T={self.tokens} H={self.hidden} K={self.topk} E={self.experts} R={self.devices} "
            f"{self.dtype} {self.layout}-major C={self.capacity}"
        )

    @property
    def mean_rows(self) -> float:
        """Rows that a device receives on average under uniform routing."""
        if self.layout == "expert":
            return float(self.tokens * self.topk)
        # A token misses a device if all its K experts are elsewhere.
        here = self.experts // self.devices
        misses = math.comb(self.experts - here, self.topk) / math.comb(self.experts, self.topk)
        return self.devices * self.tokens * (1 - misses)

    @property
    def capacity_rows(self) -> int | None:
        """C, or None for the default of the ops."""
        if self.capacity == "worst":
            return None
        if self.capacity.endswith("x"):
            worst = worst_case_rows(
                layout=self.layout,
                num_ranks=self.devices,
                num_tokens=self.tokens,
                num_experts_per_tok=self.topk,
                num_local_experts=self.experts // self.devices,
                alignment=1,
            )
            return min(worst, math.ceil(float(self.capacity[:-1]) * self.mean_rows))
        return int(self.capacity)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.hidden * jnp.dtype(self.dtype).itemsize

    def as_dict(self) -> dict[str, int | str]:
        """Return the fields by name."""
        return dataclasses.asdict(self)

    def communicator(self, mesh: Mesh, implementation: Implementation, **options: Any) -> Communicator:
        """Make a communicator of these sizes; it is the caller's to close."""
        return Communicator(
            mesh,
            AXIS,
            num_experts=self.experts,
            num_experts_per_tok=self.topk,
            max_tokens=self.tokens,
            hidden_size=self.hidden,
            implementation=implementation,
            **options,
        )

    def draw_routing(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw (topk_idx int32 [R·T, K], topk_weights float32 [R·T, K]).

        A token chooses K different experts, all equally often, with positive weights of sum 1.
        """
        total = self.devices * self.tokens
        scores = random.random((total, self.experts), np.float32)
        topk_idx = np.argpartition(scores, self.topk - 1, axis=1)[:, : self.topk].astype(np.int32)
        topk_weights = random.random((total, self.topk), np.float32) + np.float32(0.1)
        return topk_idx, topk_weights / topk_weights.sum(axis=1, keepdims=True)


DEFAULT_PROBLEMS = (
    Problem(capacity="1.25x"),
    Problem(layout="token", tokens=256),
    Problem(tokens=64, hidden=1024),
    Problem(hidden=512, topk=2, experts=16, dtype="float32"),
)


@dataclass(frozen=True)
class Inputs:
    """Operands of a dispatch on all devices, split over the mesh along their first axis.

    Attributes:
        x: [R·T, H].
        topk_idx, topk_weights: as `Problem.draw_routing` returns them.
    """

    x: jax.Array
    topk_idx: jax.Array
    topk_weights: jax.Array


def draw_inputs(problem: Problem, mesh: Mesh, seed: int = 0) -> Inputs:
    """Draw the inputs of `problem`."""
    random = np.random.default_rng(seed)
    total = problem.devices * problem.tokens
    x = random.standard_normal((total, problem.hidden), np.float32)
    topk_idx, topk_weights = problem.draw_routing(random)
    sharding = NamedSharding(mesh, P(AXIS))
    return Inputs(
        jax.device_put(x.astype(jnp.dtype(problem.dtype)), sharding),
        jax.device_put(topk_idx, sharding),
        jax.device_put(topk_weights, sharding),
    )
