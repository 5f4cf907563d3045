"""dispatch of rows of integers: copied bit for bit, along routes that rows of floats share."""

import functools
from typing import NamedTuple

import jax
import numpy as np
import oracle
from implementations import assert_same_bits, assert_same_sums, cases
from jax.dtypes import float0
from meshes import run_per_device
from problems import Inputs, Problem, inputs_of

import jax_deepep as ep

# A row may have as many bytes as hidden_size float32, 148 here: no multiple of 16.
PROBLEMS = [
    Problem("integers", hidden_size=37, routing="some_none"),
    Problem("integers, invalid entries", hidden_size=37, num_topk=5, routing="invalid"),
    Problem("integers, alignment 8", hidden_size=37, alignment=8),
    Problem("integers, both capacities, alignment 4", hidden_size=37, capacity=12, expert_capacity=5,
            alignment=4, routing="skewed"),
    Problem("integers, token-major", hidden_size=37, num_topk=5, layout="token", routing="invalid"),
    Problem("integers, token-major, capacity, alignment 8", hidden_size=37, layout="token", capacity=16,
            alignment=8, routing="skewed"),
    Problem("integers, capacity 0", hidden_size=37, capacity=0),
    Problem("integers, no tokens", hidden_size=37, num_tokens=0, alignment=4),
    Problem("integers, token-major, no tokens", hidden_size=37, num_tokens=0, layout="token", capacity=3),
    Problem("integers, one device", "one device", hidden_size=37, alignment=4),
]  # fmt: skip

# Multiples of 16 bytes, and others: a single byte, the longest rows, and sizes in between.
ROWS = [("uint8", 37), ("int8", 1), ("int8", 148), ("uint16", 8), ("int16", 24), ("int32", 5), ("uint32", 37)]


# JAX code is the same for all types; it differs between the layouts, and where no row is sent.
IN_XLA = {"integers", "integers, token-major", "integers, capacity 0", "integers, no tokens"}
ROWS_IN_XLA = [("uint8", 37), ("int32", 5)]

pytestmark = cases("problem", PROBLEMS, in_xla=lambda problem: problem.name in IN_XLA)


def random_rows(inputs: Inputs, dtype: str, width: int) -> np.ndarray:
    """Return rows [devices, T, width] of all the values that the dtype has."""
    info = np.iinfo(dtype)
    rng = np.random.default_rng(width)
    shape = (*inputs.x.shape[:2], width)
    return rng.integers(info.min, info.max, shape, np.dtype(dtype), endpoint=True)


class Outcome(NamedTuple):
    inputs: Inputs
    integers: list[np.ndarray]
    cotangents: np.ndarray
    dispatched: list[tuple]  # of every kind of rows, with separate routes and along those of floats
    floats: ep.ExpertMajor | ep.TokenMajor
    handle: ep.Handle
    out: np.ndarray
    weight_gradients: np.ndarray


@functools.cache
def outcome(problem: Problem, implementation: str) -> Outcome:
    """Dispatch every kind of rows, floats along the routes of the last, and gradients through the first."""
    comm = problem.communicator(implementation)
    inputs = inputs_of(problem)
    rows = ROWS_IN_XLA if implementation == "xla" else ROWS
    integers = [random_rows(inputs, dtype, width) for dtype, width in rows]
    expert_major = problem.layout == "expert"
    here = inputs.from_oracle(lambda routes, _: routes.mask if expert_major else routes.row_topk[0] >= 0)
    # Cotangents of rows without a token reach no gradient.
    cotangents = np.random.default_rng(0).normal(size=here.shape)
    cotangents = np.where(here, cotangents, np.nan).astype(np.float32)

    def program(x, integers, topk_idx, topk_weights, y, bias, cotangents):
        def dispatch(rows, topk_weights):
            return ep.dispatch(rows, topk_idx, topk_weights, comm=comm, **problem.dispatch_options)

        def weights(integers, topk_weights):
            dispatched, handle = dispatch(integers, topk_weights)
            again, _ = ep.dispatch(integers, handle=handle, comm=comm)
            return dispatched.weights if expert_major else again.topk_weights

        _, of_floats = dispatch(x, topk_weights)
        results = []
        for rows in integers:
            dispatched, handle = dispatch(rows, topk_weights)
            again, _ = ep.dispatch(rows, handle=of_floats, comm=comm)
            results.append((dispatched, again))
        # The last handle also serves floats.
        floats, _ = ep.dispatch(x, handle=handle, comm=comm)
        out = ep.combine(y, handle, comm=comm, bias=bias)
        _, backward = jax.vjp(weights, integers[0], topk_weights)
        of_integers, of_weights = backward(cotangents)
        assert of_integers.dtype == float0
        return results, floats, handle, out, of_weights

    arrays = (
        inputs.x, integers, inputs.topk_idx, inputs.topk_weights, inputs.y, inputs.bias, cotangents
    )  # fmt: skip
    results = run_per_device(program, problem.mesh, problem.axis_name, *arrays)
    return Outcome(inputs, integers, cotangents, *results)


def assert_copied(problem: Problem, dispatched, inputs: Inputs, x: np.ndarray) -> None:
    """Compare rows of tokens and of padding; the others are not specified."""
    by_group = inputs.by_group(x)
    expected = inputs.from_oracle(lambda routes, group: oracle.copy_rows(routes, by_group[group]))
    written = np.concatenate([routes.written for routes in inputs.routes])
    assert dispatched.tokens.shape == expected.shape
    assert_same_bits(dispatched.tokens[written], expected[written])
    np.testing.assert_array_equal(dispatched.mask, np.concatenate([routes.mask for routes in inputs.routes]))


def test_integers_arrive_bit_for_bit(problem: Problem, implementation: str) -> None:
    inputs, integers, _, results, *_ = outcome(problem, implementation)
    for (dispatched, again), rows in zip(results, integers, strict=True):
        assert_copied(problem, dispatched, inputs, rows)
        assert_copied(problem, again, inputs, rows)
        if problem.layout == "expert":
            expected = np.concatenate([routes.row_weights for routes in inputs.routes])
            assert_same_bits(dispatched.weights, expected)
        else:
            expected = inputs.from_oracle(lambda routes, _: routes.row_topk[1])
            assert_same_bits(dispatched.topk_weights, expected)


def test_floats_along_the_routes_of_integers(problem: Problem, implementation: str) -> None:
    inputs, _, _, _, floats, handle, out, _ = outcome(problem, implementation)
    for name in ("source", "num_received", "num_dropped", "num_invalid"):
        expected = np.concatenate([getattr(routes, name) for routes in inputs.routes])
        np.testing.assert_array_equal(getattr(handle, name), expected)
    assert_copied(problem, floats, inputs, inputs.x)
    y, bias = inputs.by_group(inputs.y), inputs.by_group(inputs.bias)
    expected = inputs.from_oracle(
        lambda routes, group: oracle.combine(
            routes, y[group], weighted=problem.layout == "expert", bias=bias[group]
        )
    )
    assert_same_sums(out, expected, implementation)


def test_router_weights_of_integers_have_gradients(problem: Problem, implementation: str) -> None:
    """Gradients of rows' weights return to their entries; integers themselves have none."""
    inputs, _, cotangents, *_, got = outcome(problem, implementation)
    rows, cotangents = inputs.by_group(inputs.y), inputs.by_group(cotangents)
    expected = inputs.from_oracle(
        lambda routes, group: oracle.dispatch_gradients(routes, rows[group], cotangents[group]).topk_weights
    )
    assert_same_bits(got, expected)
