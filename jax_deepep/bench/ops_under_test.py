"""The jitted programs that are timed, one op or gradient in each, over all devices."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_deepep.bench.problems import AXIS, Inputs, Problem
from jax_deepep.communicator import Communicator, Implementation
from jax_deepep.ops.combine import combine
from jax_deepep.ops.dispatch import dispatch
from jax_deepep.ops.handle import Handle

# How often each op moves the rows that the devices receive: see `report.BYTES_MOVED`.
PASSES = {
    "dispatch": 1,
    "combine": 1,
    "dispatch + combine": 2,
    "dispatch backward": 1,
    "combine backward": 1,
}


@dataclass(frozen=True)
class OpsUnderTest:
    """The programs of one implementation for one problem.

    Attributes:
        programs: by name, functions that launch a compiled program and return its results, which
            are ready only after `jax.block_until_ready`.
        rows: rows that all devices receive together, after dropping.
        round_trip: [R·T, H], what "dispatch + combine" computes.
    """

    programs: dict[str, Callable[[], Any]]
    rows: int
    round_trip: jax.Array


def build(
    problem: Problem, mesh: Mesh, inputs: Inputs, implementation: Implementation
) -> tuple[Communicator, OpsUnderTest]:
    """Compile every op of `problem`; the communicator is the caller's to close."""
    comm = problem.communicator(mesh, implementation)

    def per_device(function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS)))

    def send(x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array) -> tuple[jax.Array, Handle]:
        dispatched, handle = dispatch(
            x, topk_idx, topk_weights, comm=comm, layout=problem.layout, capacity=problem.capacity_rows
        )
        return dispatched.tokens, handle

    def send_stacked(x, topk_idx, topk_weights):
        tokens, handle = send(x, topk_idx, topk_weights)
        return tokens, _stacked(handle)

    def bring_back(y: jax.Array, weights: jax.Array, handle: Handle) -> jax.Array:
        handle = dataclasses.replace(_unstacked(handle), weights=weights)
        return combine(y, handle, comm=comm)

    def there_and_back(x, topk_idx, topk_weights):
        return combine(*send(x, topk_idx, topk_weights), comm=comm)

    operands = (inputs.x, inputs.topk_idx, inputs.topk_weights)
    dispatch_program = per_device(send_stacked)
    combine_program = per_device(bring_back)
    round_trip_program = per_device(there_and_back)
    tokens, handle = dispatch_program(*operands)
    # The router weights travel outside of the handle, to be differentiated.
    weights = handle.weights.reshape(-1, *handle.weights.shape[2:])

    # A pullback is a pytree of residuals, so it is an operand of the backward program, which then
    # holds nothing of the forward op.
    @per_device
    def send_differentiable(x, topk_idx, topk_weights):
        tokens, handle = send(x, topk_idx, topk_weights)
        return tokens, handle.weights

    pull_back = jax.jit(lambda pullback, cotangent: pullback(cotangent))
    cotangent, dispatch_pullback = jax.vjp(
        lambda x, topk_weights: send_differentiable(x, inputs.topk_idx, topk_weights),
        inputs.x,
        inputs.topk_weights,
    )
    out, combine_pullback = jax.vjp(lambda y, w: combine_program(y, w, handle), tokens, weights)

    programs: dict[str, Callable[[], Any]] = {
        "dispatch": lambda: dispatch_program(*operands),
        "combine": lambda: combine_program(tokens, weights, handle),
        "dispatch + combine": lambda: round_trip_program(*operands),
        "dispatch backward": lambda: pull_back(dispatch_pullback, cotangent),
        "combine backward": lambda: pull_back(combine_pullback, out),
    }
    rows = int(jnp.sum(handle.num_rows))
    return comm, OpsUnderTest(programs, rows, round_trip_program(*operands))


def empty_program(mesh: Mesh) -> Callable[[], Any]:
    """Return a program over all devices that does next to nothing: the price of a launch."""
    add_one = jax.jit(jax.shard_map(lambda value: value + 1, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS)))
    values = jax.device_put(jnp.zeros(mesh.size), jax.sharding.NamedSharding(mesh, P(AXIS)))
    return lambda: add_one(values)


def check_agreement(one: OpsUnderTest, other: OpsUnderTest) -> None:
    """Raise unless both computed the same: a wrong result has no speed.

    Raises:
        RuntimeError: they differ.
    """
    # 2⁻⁶ is two roundings of bfloat16, whose results the implementations may round differently.
    a, b = (np.asarray(ops.round_trip).astype(np.float32) for ops in (one, other))
    if one.rows != other.rows or not np.allclose(a, b, rtol=2**-6, atol=2**-6):
        raise RuntimeError(
            f"dispatch + combine: the implementations differ by up to {np.abs(a - b).max():g} and received "
            f"{one.rows} and {other.rows} rows; run the tests before measuring."
        )


def _stacked(handle: Handle) -> Handle:
    """Give every leaf a leading axis, along which shard_map joins the devices."""
    return jax.tree.map(lambda leaf: leaf[None], handle)


def _unstacked(handle: Handle) -> Handle:
    return jax.tree.map(lambda leaf: leaf[0], handle)
