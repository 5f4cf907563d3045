"""Native ops whose tokens are some rows of a larger array: XLA would copy a slice for a custom call."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import LOW_LATENCY, ON_GPUS, assert_same_bits
from meshes import run_per_device
from moe_layer import LAYER, communicator, layer_inputs
from problems import Problem

import jax_deepep as ep
from jax_deepep.ops import native, pairs

FIRST, AFTER = 3, 2  # rows before those of the op, and after them
ALL = FIRST + LAYER.num_tokens + AFTER

CASES = [
    pytest.param(dataclasses.replace(LAYER, hidden_size=7), None, id="rows of 14 bytes"),
    pytest.param(dataclasses.replace(LAYER, hidden_size=128), "fp8", id="fp8"),
]


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def whole(call) -> list[jax.Array]:
    return call.run()


def in_parts(call) -> list[jax.Array]:
    results, _ = pairs.run_beside(call, 1, lambda one: (jnp.sin(one), None), call.operands[0])
    return results


def run(problem: Problem, program: Callable[..., Any], *more: np.ndarray) -> Any:
    """Run `program(larger x, larger bias, topk_idx, topk_weights, *more)` in bfloat16 on every device."""
    inputs = layer_inputs(problem)
    around = ((0, 0), (FIRST, AFTER), (0, 0))
    x, bias = (np.pad(value, around, constant_values=9) for value in (inputs.x, inputs.bias))
    x, bias, *more = (value.astype(jnp.bfloat16) for value in (x, bias, *more))
    operands = (x, bias, inputs.topk_idx, inputs.topk_weights, *more)
    return run_per_device(program, problem.mesh, problem.axis_name, *operands)


def own(array: jax.Array) -> jax.Array:
    return array[FIRST : FIRST + LAYER.num_tokens]


def sent(comm, x, topk_idx, topk_weights):
    """Return rows for combine, and the handle."""
    dispatched, handle = ep.dispatch(own(x), topk_idx, topk_weights, comm=comm)
    return jnp.where(dispatched.mask[:, None], dispatched.tokens, 0), handle


@pytest.mark.parametrize("implementation", ["native", LOW_LATENCY])
@pytest.mark.parametrize("way", [whole, in_parts])
@pytest.mark.parametrize(("problem", "wire"), CASES)
def test_dispatch_reads_its_rows(problem: Problem, wire: Any, way: Any, implementation: str) -> None:
    comm = communicator(implementation, problem)

    def program(x, _, topk_idx, topk_weights):
        y, handle = sent(comm, x, topk_idx, topk_weights)
        shape, routes = handle.route_shape, handle.routes
        live, results = y[:, 0] != 0, []
        for rows, first_token in ((own(x), 0), (x, FIRST)):
            call = native.dispatch_call(
                shape, rows, topk_idx, topk_weights, wire=wire, first_token=first_token
            )
            tokens, _, _, source, destination, *_ = way(call)
            call = native.cached_dispatch_call(
                shape, rows, routes, weights=handle.weights, y=y, zero_rest=True, wire=wire,
                first_token=first_token,
            )  # fmt: skip
            again, _, _, products, _ = way(call)
            results.append((jnp.where(live[:, None], tokens, 0), source, destination, again, products))
        return results

    of_slice, of_larger = run(problem, program)
    jax.tree.map(assert_same_bits, of_larger, of_slice)


@pytest.mark.parametrize("implementation", ["native", LOW_LATENCY])
@pytest.mark.parametrize("way", [whole, in_parts])
@pytest.mark.parametrize(("problem", "wire"), CASES)
def test_combine_writes_its_rows(problem: Problem, wire: Any, way: Any, implementation: str) -> None:
    """The others are those of `into`, which is as before for whatever else reads it."""
    comm = communicator(implementation, problem)

    def program(x, bias, topk_idx, topk_weights, into):
        y, handle = sent(comm, x, topk_idx, topk_weights)
        combine = functools.partial(native.combine_call, handle.route_shape, y, handle.routes, wire=wire)
        alone, *_ = way(combine(weights=handle.weights, bias=own(bias)))
        sums, gradients, _ = way(combine(row_gradients=handle.weights))
        combine = functools.partial(combine, first_token=FIRST, out_tokens=ALL)
        fresh, *_ = way(combine(weights=handle.weights, bias=bias))
        kept, *_ = way(combine(weights=handle.weights, bias=bias, into=into))
        dead, own_gradients, _ = way(combine(row_gradients=handle.weights, into=2 * into))
        expected = [
            value.at[FIRST : FIRST + LAYER.num_tokens].set(rows)
            for value, rows in ((into, alone), (2 * into, sums))
        ]
        return [own(fresh), kept, dead, own_gradients, into], [alone, *expected, gradients, into]

    into = numbers(problem.mesh.size, ALL, problem.hidden_size)
    jax.tree.map(assert_same_bits, *run(problem, program, into))


def test_vmap() -> None:
    """Over `into` alone, which every op of the loop returns with its rows replaced."""
    comm = communicator("native")

    def program(x, _, topk_idx, topk_weights, intos):
        y, handle = sent(comm, x, topk_idx, topk_weights)

        def combine(into, way=whole, **where):
            return way(native.combine_call(handle.route_shape, y, handle.routes, into=into, **where))[0]

        where = {"first_token": FIRST, "out_tokens": ALL}
        expected = jnp.stack([combine(into, **where) for into in intos])
        return [
            (jax.vmap(lambda into, way=way: combine(into, way, **where))(intos), expected)
            for way in (whole, in_parts)
        ]

    for result, expected in run(LAYER, program, numbers(LAYER.mesh.size, 3, ALL, LAYER.hidden_size)):
        assert_same_bits(result, expected)


@pytest.mark.skipif(ON_GPUS, reason="an op that cannot be launched ends its communicator there")
@pytest.mark.parametrize(
    ("op", "first_token", "words"),
    [
        ("dispatch", -1, "first_token: expected at least 0, got -1"),
        ("dispatch", ALL - 4, f"x: expected 5 rows from first_token={ALL - 4} on, got {ALL} in all"),
        ("cached_dispatch", ALL, f"x: expected 5 rows from first_token={ALL} on, got {ALL} in all"),
        ("combine", -2, "first_token: expected at least 0, got -2"),
        ("combine", ALL - 4, f"out: expected 5 rows from first_token={ALL - 4} on, got {ALL} in all"),
    ],
)
def test_rows_that_the_array_does_not_have(op: str, first_token: int, words: str) -> None:
    comm = communicator("native")

    def program(x, _, topk_idx, topk_weights):
        y, handle = sent(comm, x, topk_idx, topk_weights)
        shape, routes = handle.route_shape, handle.routes
        calls = {
            "dispatch": lambda: native.dispatch_call(
                shape, x, topk_idx, topk_weights, first_token=first_token
            ),
            "cached_dispatch": lambda: native.cached_dispatch_call(shape, x, routes, first_token=first_token),
            "combine": lambda: native.combine_call(shape, y, routes, first_token=first_token, out_tokens=ALL),
        }
        return calls[op]().run()[0]

    with pytest.raises(jax.errors.JaxRuntimeError, match=words):
        run(LAYER, program)
