"""What is measured: a shape, inputs drawn from a seed, and a capacity that they just fit."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepep.bench.problems import AXIS, Problem
from jax_deepep.capacity import round_up

DTYPE = jnp.bfloat16  # of the floors, and so of everything here


@dataclass(frozen=True)
class RoutedInputs:
    """Operands of a dispatch on all ranks, split over the mesh along their first axis.

    Attributes:
        problem: the shape, with a capacity that drops nothing.
        x: [R·T, H].
        topk_idx, topk_weights: as `Problem.draw_routing` returns them.
        rows: that all ranks receive together.
    """

    problem: Problem
    x: jax.Array
    topk_idx: jax.Array
    topk_weights: jax.Array
    rows: int

    @property
    def bytes_moved(self) -> int:
        """Bytes of all received rows."""
        return self.rows * self.problem.row_bytes


def per_device(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of one device's values; those of all devices are joined along their first axis."""
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False)
    return jax.jit(mapped)


def put_on_ranks(mesh: Mesh, shape: tuple[int, ...], part: Callable[[slice], np.ndarray]) -> jax.Array:
    """Make an array of which every process holds its own part: `part` of a range of the first axis."""

    def own_part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # the array is sharded
        return part(index[0])

    return jax.make_array_from_callback(shape, NamedSharding(mesh, P(AXIS)), own_part)


def rows_of_ranks(topk_idx: np.ndarray, problem: Problem) -> np.ndarray:
    """Return how many rows each rank receives."""
    owners = topk_idx // (problem.experts // problem.devices)
    if problem.layout == "expert":
        return np.bincount(owners.ravel(), minlength=problem.devices)
    there = np.zeros((len(topk_idx), problem.devices), bool)
    np.put_along_axis(there, owners, True, axis=1)
    return there.sum(axis=0)


def fitting_capacity(most_rows: int) -> int:
    """Return the smallest multiple of 128 that holds the rows; of 8, for a few rows."""
    return round_up(most_rows, 128 if most_rows >= 1024 else 8)


def draw(problem: Problem, mesh: Mesh, seed: int = 0) -> RoutedInputs:
    """Draw the inputs of `problem`, whose capacity is replaced by one that they fit."""
    total = problem.devices * problem.tokens
    # Every process draws the routing of all ranks: the capacity depends on it.
    topk_idx, topk_weights = problem.draw_routing(np.random.default_rng(seed))
    rows = rows_of_ranks(topk_idx, problem)
    problem = dataclasses.replace(problem, capacity=str(fitting_capacity(int(rows.max()))))

    def part_of_x(part: slice) -> np.ndarray:
        own = np.random.default_rng((seed, part.start or 0))
        return own.standard_normal((problem.tokens, problem.hidden), np.float32).astype(DTYPE)

    return RoutedInputs(
        problem,
        put_on_ranks(mesh, (total, problem.hidden), part_of_x),
        put_on_ranks(mesh, topk_idx.shape, lambda part: topk_idx[part]),
        put_on_ranks(mesh, topk_weights.shape, lambda part: topk_weights[part]),
        int(rows.sum()),
    )
