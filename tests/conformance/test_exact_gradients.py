"""The gradients of dispatch and of combine against the oracle: native bit for bit, xla up to rounding.

Gradients of whole layers, and how transformations treat them, are in ../transforms.
"""

import functools

import jax
import numpy as np
import oracle
import pytest
from implementations import EXACT, assert_same_bits, assert_same_sums
from meshes import run_per_device
from moe_layer import assert_close
from problems import WITH_GRADIENTS, Inputs, Problem, inputs_of

import jax_deepep as ep


@functools.cache
def outcome(problem: Problem, implementation: str):
    """Return gradients by the op, the inputs, and the cotangents by the name of their result."""
    comm = problem.communicator(implementation)
    inputs = inputs_of(problem)
    cotangents = {"tokens": inputs.y, "weights": weight_cotangent(inputs), "out": inputs.x2}
    weights_name = "weights" if problem.layout == "expert" else "topk_weights"

    def program(x, topk_idx, topk_weights, y, bias, cotangents):
        def dispatch(x, topk_weights):
            dispatched, _ = ep.dispatch(x, topk_idx, topk_weights, comm=comm, **problem.dispatch_options)
            return dispatched.tokens, getattr(dispatched, weights_name)

        def combine(y, topk_weights, bias):
            _, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm, **problem.dispatch_options)
            return ep.combine(y, handle, comm=comm, bias=bias)

        def unweighted(y):
            _, handle = ep.dispatch(x, topk_idx, topk_weights, comm=comm, **problem.dispatch_options)
            return ep.combine(y, handle, comm=comm, weighted=False)

        _, of_dispatch = jax.vjp(dispatch, x, topk_weights)
        _, of_combine = jax.vjp(combine, y, topk_weights, bias)
        _, of_unweighted = jax.vjp(unweighted, y)
        return {
            "dispatch": of_dispatch((cotangents["tokens"], cotangents["weights"])),
            "combine": of_combine(cotangents["out"]),
            "unweighted": of_unweighted(cotangents["out"]),
        }

    arrays = (inputs.x, inputs.topk_idx, inputs.topk_weights, inputs.y, inputs.bias, cotangents)
    return run_per_device(program, problem.mesh, problem.axis_name, *arrays), inputs, cotangents


def weight_cotangent(inputs: Inputs) -> np.ndarray:
    """A cotangent of the router weights of all rows, NaN where there is none."""
    rng = np.random.default_rng(0)
    if inputs.routes[0].layout == "expert":
        here = np.concatenate([routes.mask for routes in inputs.routes])
    else:
        here = np.concatenate([routes.row_topk[0] >= 0 for routes in inputs.routes])
    return np.where(here, rng.normal(size=here.shape), np.nan).astype(np.float32)


@pytest.fixture(params=WITH_GRADIENTS, ids=lambda problem: problem.name)
def problem(request: pytest.FixtureRequest) -> Problem:
    return request.param


def test_gradients_of_dispatch(problem: Problem, implementation: str) -> None:
    """Whatever stands in the cotangents of rows of no token reaches nothing."""
    gradients, inputs, cotangents = outcome(problem, implementation)
    tokens, weights = inputs.by_group(cotangents["tokens"]), inputs.by_group(cotangents["weights"])
    expected = [
        oracle.dispatch_gradients(routes, tokens[group], weights[group])
        for group, routes in enumerate(inputs.routes)
    ]
    x, topk_weights = gradients["dispatch"]
    assert_same_sums(x, np.concatenate([each.x for each in expected]), implementation)
    assert_same_bits(topk_weights, np.concatenate([each.topk_weights for each in expected]))


def expected_of_combine(problem: Problem, inputs: Inputs, g: np.ndarray, *, weighted: bool) -> dict:
    y, g = inputs.by_group(inputs.y), inputs.by_group(g)
    by_group = [
        oracle.combine_gradients(routes, y[group], g[group], weighted=weighted)
        for group, routes in enumerate(inputs.routes)
    ]
    return {
        name: np.concatenate([getattr(each, name) for each in by_group])
        for name in oracle.CombineGradients._fields
    }


def test_gradients_of_combine(problem: Problem, implementation: str) -> None:
    gradients, inputs, cotangents = outcome(problem, implementation)
    y, _, bias = gradients["combine"]
    weighted = problem.layout == "expert"
    expected = expected_of_combine(problem, inputs, cotangents["out"], weighted=weighted)
    assert_same_sums(y, expected["y"], implementation)
    assert_same_bits(bias, expected["bias"])
    (y,) = gradients["unweighted"]
    assert_same_bits(y, expected_of_combine(problem, inputs, cotangents["out"], weighted=False)["y"])


def test_gradient_of_combine_for_the_router_weights(problem: Problem, implementation: str) -> None:
    """A dot product per row, whose order of sums is part of the contract."""
    gradients, inputs, cotangents = outcome(problem, implementation)
    _, topk_weights, _ = gradients["combine"]
    weighted = problem.layout == "expert"
    expected = expected_of_combine(problem, inputs, cotangents["out"], weighted=weighted)["topk_weights"]
    if implementation in EXACT:
        assert_same_bits(topk_weights, expected)
    else:
        assert_close(topk_weights, expected)
